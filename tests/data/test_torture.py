"""A run that is killed and started again gives what it would have given, to the last bit; `make torture` does it at
length."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torture
import torture_faults
import torture_starts
from torture_starts import NO_FAULT, End, Fault

from t5x_lite import convert
from t5x_lite.metrics import metric_logger

KILLED = End(-signal.SIGKILL, met=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("torture")
    torture.prepare(path)
    assert torture.run(path, "alone") == End(0, met=False)
    return path


@pytest.mark.slow
def test_a_run_killed_when_it_deletes_and_told_to_stop_when_it_saves_goes_on_to_the_same_bits(folder):
    assert torture.run(folder, "killed", Fault("deleting")) == KILLED
    steps = torture.STEPS, torture.EVAL_PERIOD, torture.CHECKPOINT_PERIOD, torture.KEEP_LAST
    saves = torture_faults.passes(torture.checkpoints(folder / "killed"), *steps)["told last save halfway"]
    fault = Fault("told last save halfway", saves[0]) if saves else NO_FAULT  # the last is saved, if that is quicker
    assert torture.run(folder, "killed", fault) == End(0, met=bool(saves))
    torture.compare(folder / "killed", folder / "alone")
    torture.compare_last(folder / "killed", folder / "alone")


@pytest.mark.slow
def test_a_killed_conversion_is_absent_and_then_the_same(folder):
    convert.convert(folder / "alone", folder / "whole", "huggingface")
    assert torture_starts.convert(folder, "alone", "part", Fault("weights halfway")) == KILLED
    torture.absent(folder / "part")
    with pytest.raises(AssertionError):  # what it had written is no conversion
        torture.compare_converted(folder / ".part.partial", folder / "whole")
    convert.convert(folder / "alone", folder / "part", "huggingface")
    torture.compare_converted(folder / "part", folder / "whole")


def test_the_comparison_sees_another_bit_and_a_step_twice(tmp_path):
    losses = [{"step": step, "split": "train", "loss": 1 / step} for step in range(1, torture.STEPS + 1)]
    changed = [{**record, "loss": record["loss"] + 1e-15 * (record["step"] == 9)} for record in losses]
    for name, records in (("alone", losses), ("same", losses), ("bit", changed), ("twice", [*losses[:9], *losses[8:]])):
        logger = metric_logger.MetricLogger(tmp_path / name, torture.STEPS)
        for record in records:
            logger.train(record["step"], {"loss": record["loss"]}, 0.0)
        logger.close()
    torture.compare(tmp_path / "same", tmp_path / "alone")
    for name in ("bit", "twice"):
        with pytest.raises((AssertionError, ValueError)):
            torture.compare(tmp_path / name, tmp_path / "alone")


def test_arrays_are_the_same_to_the_last_bit_or_not():
    zeros = np.zeros(3, np.float32)
    assert torture.same(zeros, zeros.copy())
    assert not torture.same(zeros, -zeros)  # equal, but not the same
    assert not torture.same(zeros, zeros.astype(np.float64)) and not torture.same(zeros, zeros[:2])


def test_a_point_is_met_at_the_nth_call_and_one_that_is_told_goes_on():
    program = """if True:
        import functools, signal, sys, types, torture_faults
        number = getattr(signal, sys.argv[1])
        signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
        owner = types.SimpleNamespace(call=lambda n: print(n, flush=True))
        torture_faults.at(2, functools.partial(torture_faults.signalled, number), owner, "call")
        for n in range(3):
            owner.call(n)
    """
    for number, code, out in (("SIGKILL", -signal.SIGKILL, "0"), ("SIGTERM", 0, "0 told 1 2")):
        environment = os.environ | {"PYTHONPATH": str(Path(torture_faults.__file__).parent)}
        done = subprocess.run([sys.executable, "-c", program, number], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout.split()) == (code, out.split())
        assert done.stderr.count(torture_faults.MET) == 1


def test_points_are_passed_only_where_they_can_be():
    def possible(*checkpoints: int) -> set[str]:
        counts = torture_faults.passes(list(checkpoints), 24, 6, 3, 2)
        return {point for point, of in counts.items() if of}

    begun, midway, done = possible(), possible(9, 12), possible(21, 24)
    assert {"first step", "evaluating", "told last save halfway"} <= begun and "restored" not in begun
    assert {"restored", "deleting", ".zst in training"} <= midway
    assert not {"save begun", "logging", "told logging at an evaluation"} & done
    assert torture_faults.passes([9, 12], 24, 6, 3, 2)["last save written"] == range(4, 5)
    assert torture_faults.passes([9, 12], 24, 6, 3, 2)["told logging at an evaluation"] == range(5, 6)
