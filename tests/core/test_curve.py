"""benchmarks/curve.py: our losses beside those that transformers' T5 had on the same batches, and the comparison."""

import json
import math
import shutil

import numpy as np
import pytest

from benchmarks import curve, curve_ours
from t5x_lite.training import optim

STEPS = 12


def losses(folder, optimizer, side, values):
    run = curve.Run(folder, optimizer, side)
    for step, value in enumerate(values, start=1):
        run.append(step, value, 0.0 if step == 1 else step / 2)
    return run


@pytest.fixture
def out(golden, tmp_path):
    """A folder of the benchmark with the batches and torch's losses of a tiny T5, rows of several lengths."""
    return shutil.copytree(golden("curve"), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", list(curve.OPTIMIZERS))
def test_losses_are_those_of_transformers_also_when_resumed(out, golden, optimizer):
    run, start = curve.Run(out, optimizer, "float32"), golden("hf_t5_v11")
    curve_ours.train(run, start, steps=5, save_every=3)
    assert list(run.losses()) == [1, 2, 3, 4, 5]
    run.append(6, 0.0, 1.0)  # of a run that was killed after its newest saved state
    curve_ours.train(run, start, steps=STEPS, save_every=0)
    different = curve.relative_differences(run.losses(), curve.Run(out, optimizer, "torch").losses())
    assert list(different) == list(range(1, STEPS + 1))
    assert max(different.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "other"), [("adafactor", optim.adafactor()), ("adamw", optim.adamw(weight_decay=0.1))]
)
def test_other_settings_have_other_losses(out, golden, monkeypatch, optimizer, other):
    schedule = optim.constant(curve.OPTIMIZERS[optimizer]["learning_rate"])
    monkeypatch.setattr(curve_ours, "make_optimizer", lambda name: optim.make_optimizer(other, schedule))
    run = curve.Run(out, optimizer, "float32")
    curve_ours.train(run, golden("hf_t5_v11"), steps=4, save_every=0)
    different = curve.relative_differences(run.losses(), curve.Run(out, optimizer, "torch").losses())
    assert different[1] < 1e-5 and different[4] > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("side", "least", "most"), [("microbatches", 0.0, 1e-5), ("bfloat16", 1e-5, 1e-2)])
def test_other_sides_stay_near_float32(out, golden, side, least, most):
    for name in ("float32", side):
        curve_ours.train(curve.Run(out, "adafactor", name), golden("hf_t5_v11"), steps=6, save_every=0)
    one, other = (curve.Run(out, "adafactor", name).losses() for name in ("float32", side))
    assert one != other
    assert least < max(curve.relative_differences(other, one).values()) < most


def test_the_difference_is_relative_and_of_shared_steps():
    assert curve.relative_differences({1: 9.0, 2: 4.0, 3: 1.0}, {1: 10.0, 2: 4.0}) == {1: 0.1, 2: 0.0}
    assert curve.relative_differences({1: math.nan, 2: 1.0}, {1: 1.0, 2: 0.0}) == {1: math.inf, 2: math.inf}


def test_rewinding_drops_what_is_not_saved(tmp_path):
    run = losses(tmp_path, "adamw", "torch", [3.0, 2.0, 1.0])
    with run.log.open("a") as file:
        file.write('{"step": 4, "lo')
    assert run.losses() == {1: 3.0, 2: 2.0, 3: 1.0}
    run.rewind(2)
    run.append(3, 1.5, 0.0)
    assert run.losses() == {1: 3.0, 2: 2.0, 3: 1.5}
    with pytest.raises(ValueError, match="lacks steps before 4"):
        run.rewind(4)
    assert run.losses() == {1: 3.0, 2: 2.0, 3: 1.5}
    run.rewind(0)
    assert run.losses() == {}


def test_batches_begin_after_the_steps_done(out):
    every, rest = list(curve.batches(out, 0)), list(curve.batches(out, 10))
    assert len(every) == STEPS and len(rest) == 2
    for name, array in rest[0].items():
        np.testing.assert_array_equal(array, every[10][name])


def test_table_and_picture_of_what_is_there(tmp_path):
    runs = [
        losses(tmp_path, "adafactor", "float32", [10.0, 8.0]),
        losses(tmp_path, "adafactor", "torch", [10.0, 8.004]),
        losses(tmp_path, "adafactor", "bfloat16", [10.1]),
        losses(tmp_path, "adamw", "torch", [10.0, 7.0]),
    ]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in curve.summary(runs).splitlines())
    assert head[-2:] == ["at 1", "at 2"]
    assert [row[2:] for row in rows] == [
        ["2", "10.0000", "8.0000", "1.00", "", "", "", "", ""],
        ["2", "10.0000", "8.0040", "1.00", "5.0e-04", "2", "2.5e-04", "0.0e+00", "5.0e-04"],
        ["1", "10.1000", "10.1000", "", "1.0e-02", "1", "1.0e-02", "1.0e-02", ""],
        ["2", "10.0000", "7.0000", "1.00", "", "", "", "", ""],
    ]
    curve.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert curve.agree(tmp_path, ["adafactor", "adamw"], tolerance=1e-3)
    assert not curve.agree(tmp_path, ["adafactor"], tolerance=1e-4)


def test_a_folder_holds_runs_of_one_setting(tmp_path):
    curve.settings_agree(tmp_path, {"batch_size": 4, "start": "t5_1_1/small"})
    curve.settings_agree(tmp_path, {"batch_size": 4, "start": "t5_1_1/small"})
    with pytest.raises(ValueError, match="batch_size = 4, not 2"):
        curve.settings_agree(tmp_path, {"batch_size": 2, "start": "t5_1_1/small"})
    assert json.loads((tmp_path / "settings.json").read_text())["batch_size"] == 4
