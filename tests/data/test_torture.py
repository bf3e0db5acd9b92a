"""A run that is killed and started again gives what it would have given, to the last bit; `make torture` does it at
length."""

from pathlib import Path

import pytest
import torture

from t5x_lite.metrics import metric_logger


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("torture")
    torture.prepare(path)
    assert torture.run(path, "alone") == 0
    return path


@pytest.mark.slow
def test_a_run_killed_at_the_worst_moments_goes_on_to_the_same_bits(folder):
    for fault in (("save begun", 2), ("evaluating", 1), ("deleting", 1)):
        assert torture.run(folder, "killed", fault) != 0, fault
    assert torture.run(folder, "killed") == 0
    torture.compare(folder / "killed", folder / "alone")


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
