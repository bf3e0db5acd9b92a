"""30 steps of a tiny T5 have the committed losses, however the step is laid out and wherever the run is interrupted."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from loss_curve import train as curve

SCRIPT = Path(curve.__file__)


def assert_committed(losses: dict[int, float], first: int = 1) -> None:
    assert list(losses) == list(range(first, curve.STEPS + 1))
    np.testing.assert_allclose(list(losses.values()), tiny.losses()[first - 1 :], rtol=1e-4)


def test_the_committed_curve_falls_and_its_text_is_read():
    losses = tiny.losses()
    assert len(losses) == curve.STEPS and losses[0] > 6 > 2.5 > losses[-1]
    tokens = tiny.batch(0)["encoder_input_tokens"]
    window = bytes((tokens[0][tokens[0] > tiny.END] - tiny.FIRST_BYTE).clip(0, 255).astype(np.uint8))
    assert window.split(bytes([255]))[0].decode() in (tiny.FOLDER / "text.txt").read_text()


@pytest.mark.slow
def test_one_device():
    assert_committed(curve.train())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 8, 1), (8, 1, 1)])
def test_eight_devices(mesh):
    assert jax.device_count() >= 8
    assert_committed(curve.train(mesh=mesh))


@pytest.mark.slow
def test_microbatches():
    assert_committed(curve.train(num_microbatches=4))


@pytest.mark.slow
def test_layers_unrolled():
    assert tiny.CONFIG.scan_layers
    assert_committed(curve.train(dataclasses.replace(tiny.CONFIG, scan_layers=False)))


@pytest.mark.slow
def test_packed_rows():
    alone, packed = tiny.batch(3), tiny.batch(3, packed=True)
    assert packed["encoder_input_tokens"].shape == (tiny.ROWS // 2, tiny.INPUTS * 2)
    assert (packed["decoder_target_tokens"] > 0).sum() == (alone["decoder_target_tokens"] > 0).sum()
    assert_committed(curve.train(packed=True))


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    command = [sys.executable, SCRIPT, f"--folder={tmp_path}", "--kill_after=17"]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    before = {record["step"]: record["loss"] for record in map(json.loads, killed.stdout.splitlines())}
    assert list(before) == list(range(1, 18))
    after = curve.train(folder=tmp_path)
    assert_committed(after, first=11)
    assert [after[n] for n in range(11, 18)] == [before[n] for n in range(11, 18)]  # to the last bit
