"""A run's records in Weights & Biases, and the profiler's trace of some of its steps."""

import functools
import importlib.util
import logging

import pytest
from core.test_train import Kept, run

from t5x_lite.errors import UserError
from t5x_lite.metrics import profiler, wandb_run
from t5x_lite.metrics.metric_logger import MetricLogger

METRICS = {"loss": 2.5, "input_tokens": 30.0, "target_tokens": 10.0}


@pytest.mark.slow
def test_wandb_gets_the_records_and_a_resumed_run_continues_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in ((1, 2), (2, 3)):  # the second process repeats a step
        open_tracker = functools.partial(wandb_run.WandbRun, "a_project", tmp_path, {"BATCH_SIZE": "8"})
        logger = MetricLogger(tmp_path, total_steps=3, open_tracker=open_tracker)
        for step in steps:
            logger.train(step, METRICS, seconds=0.5)
        logger.evaluation(steps[-1], {"squad": {"f1": 50.0}})
        logger.flush()
        logger.close()
    run_id = (tmp_path / wandb_run.RUN_ID_FILE).read_text()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(run_id) for folder in folders)
    written = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    for text in (b"train/loss", b"train/tokens_per_second", b"validation/squad/f1", b"BATCH_SIZE", b"a_project"):
        assert text in written


def test_wandb_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"WANDB_PROJECT = 'mine'.*pip install wandb"):
        wandb_run.check_installed("mine")


@pytest.mark.slow
def test_a_trace_of_the_steps_is_written_and_the_loop_waits_for_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    calls = []

    class Profiler(profiler.StepProfiler):
        def __call__(self, steps_done):
            calls.append((steps_done, sorted(kept.metrics)))
            super().__call__(steps_done)

    kept = Kept()
    run([4, 5, 6, 7], kept=kept, profiler=Profiler(2, 3, tmp_path))
    assert calls == [(1, [1]), (3, [1, 2, 3])], "the steps before are done and logged"
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0 and str(tmp_path / "profile") in caplog.text and "steps 2 to 3" in caplog.text


@pytest.mark.slow
def test_a_trace_ends_with_the_run(tmp_path):
    run([4, 5], profiler=profiler.StepProfiler(2, 9, tmp_path))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_no_trace_begins_in_a_run_that_resumes_behind_it(tmp_path):
    assert not any(profiler.StepProfiler(2, 3, tmp_path).due(steps_done) for steps_done in (3, 4, 5))
