"""Real processes on one machine (Gloo): several train as one does, stop when one is killed, and any number goes on."""

import json
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import forks
import pytest

from t5x_lite import distributed

REPO = Path(__file__).resolve().parents[2]

TINY = """
T5Config:
    d_model = 16
    d_ff = 24
    num_heads = 2
    head_dim = 8
    num_encoder_layers = 1
    num_decoder_layers = 1
    vocab_size = 384
TRAIN_FILES = "train.jsonl"
EVAL_FILES = "eval.jsonl"
VOCABULARY = "bytes"
TASK_FEATURE_LENGTHS = {"inputs": 24, "targets": 8}
DATA_SHARDS = 2
BATCH_SIZE = 8
TRAIN_STEPS = 24
LOG_PERIOD = 1
EVAL_PERIOD = 24
CHECKPOINT_PERIOD = 8
DROPOUT_RATE = 0.1
DTYPE = "float32"
WARMUP_STEPS = 10
LEARNING_RATE = 0.1
MESH = {"data": 2, "fsdp": -1, "tensor": 1}
"""
LAUNCH = """
import sys
import run
from t5x_lite import distributed
distributed.HEARTBEAT_SECONDS = 10
sys.exit(run.main(sys.argv))
"""


def start(folder: Path, name: str, processes: int, devices: int, *flags: str) -> list[subprocess.Popen]:
    """One command on each of the hosts; their output is in NAME.<index>.log."""
    environment = os.environ | forks.devices(devices) | {"PYTHONPATH": str(REPO)}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(processes):
        at = [f"--coordinator_address=localhost:{port}", f"--process_count={processes}", f"--process_index={index}"]
        command = ["--gin_file=tiny.gin", f"--gin.MODEL_DIR='{name}'", *(at if processes > 1 else []), *flags]
        with open(folder / f"{name}.{index}.log", "a") as output:
            started.append(
                subprocess.Popen(
                    [*forks.python(), "-c", LAUNCH, *command], cwd=folder, env=environment, stdout=output, stderr=output
                )
            )
    return started


def finished(folder: Path, name: str, processes: list[subprocess.Popen]) -> list[dict]:
    codes = [process.wait(timeout=300) for process in processes]
    logs = [(folder / f"{name}.{index}.log").read_text() for index in range(len(processes))]
    assert codes == [0] * len(processes), "\n".join(logs)[-6000:]
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hosts")
    (path / "tiny.gin").write_text(TINY)
    rng = random.Random(0)
    for name, numbers in (("train", [rng.randint(0, 99) for _ in range(200)]), ("eval", range(13))):
        rows = ({"inputs": f"double {n} please", "targets": str(2 * n)} for n in numbers)
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def one(folder) -> list[dict]:
    return finished(folder, "one", start(folder, "one", 1, 4))


def same_curve(found: list[dict], expected: list[dict]) -> None:
    assert [(x["step"], x["split"]) for x in found] == [(x["step"], x["split"]) for x in expected]
    losses = [x["loss"] for x in expected if x["split"] == "train"]
    assert len(losses) == 24 and losses[-1] < losses[0] / 2
    for x, y in zip(found, expected, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5), x["step"]


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_and_one_that_goes_on_train_as_one(folder, one):
    first, second = processes = start(folder, "two", 2, 2)
    deadline = time.monotonic() + 200
    while not (folder / "two/checkpoints/8").exists():
        assert time.monotonic() < deadline and first.poll() is None, (folder / "two.0.log").read_text()[-3000:]
        time.sleep(0.05)
    second.send_signal(signal.SIGKILL)
    assert first.wait(timeout=60) != 0  # the heartbeat is 10 s here
    log = (folder / "two.0.log").read_text()
    # Gloo, the CPUs' transport, sometimes ends the process itself.
    messages = ("another task died", "start the same command again on all hosts", "gloo::EnforceNotMet")
    assert any(message in log for message in messages), log[-3000:]
    assert all(process.poll() is not None for process in processes)
    assert len((folder / "two/metrics.jsonl").read_text().splitlines()) < len(one)
    same_curve(finished(folder, "two", start(folder, "two", 1, 4)), one)
    assert "Resuming" in (folder / "two.0.log").read_text()


@pytest.mark.exhaustive  # four processes on two cores take two minutes
def test_four_processes_two_of_which_share_each_row_train_as_one(folder, one):
    mesh = "--gin.MESH={'data': 2, 'fsdp': 1, 'tensor': 2}"
    same_curve(finished(folder, "four", start(folder, "four", 4, 1, mesh)), one)
    predictions = [(folder / name / "predictions/files-24.jsonl").read_text() for name in ("one", "four")]
    assert predictions[0] == predictions[1] and predictions[0].count("\n") == 13
    for index in (1, 2, 3):
        log = [line for line in (folder / f"four.{index}.log").read_text().splitlines() if "Gloo" not in line]
        assert log == [], "only the first process speaks"


def test_half_an_address_is_refused():
    with pytest.raises(ValueError, match="--process_count and --process_index go together"):
        distributed.connect("localhost:1")
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        distributed.connect("localhost", 2, 0)
    with pytest.raises(ValueError, match="below --process_count=2"):
        distributed.connect("localhost:1", 2, 2)
