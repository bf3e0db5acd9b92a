"""The loop: steps that are not finite, notices to stop, and what is watched."""

import logging
import os
import signal
import time

import jax
import numpy as np
import pytest
import tiny
from core.test_step import program

from t5x_lite import sharding
from t5x_lite.data import packing
from t5x_lite.training import loop, monitors, step

BAD = 999  # no token of the vocabulary: the loss is NaN


def batch(token):
    return packing.joined(np.array([[3, 4, 1, 0], [7, 8, 9, 1]]), np.array([[5, 6, 1], [token, 1, 0]]))


class Kept:
    """A logger and saver that keeps what it is given."""

    def __init__(self):
        self.metrics, self.saved, self.scores = {}, [], {}

    def train(self, step, metrics, seconds):
        self.metrics[step] = dict(metrics)

    def evaluation(self, step, scores):
        self.scores[step] = scores

    def save(self, step, state, iterator, metrics):
        self.saved.append((step, int(state.step), jax.device_get(state.params)))

    def latest_step(self):
        return self.saved[-1][0] if self.saved else None


def run(tokens, **options):
    compiler, abstract, train_step = program(tiny.SMALL, (1, 1, 1), tiny.DESCENT, step.T5_LOSS, 1)
    state = tiny.random_state(tiny.DESCENT, abstract)
    kept = options.pop("kept", None) or Kept()
    trained = loop.train(
        state,
        train_step,
        iter([batch(token) for token in tokens]),
        jax.device_put(jax.random.key(1), compiler.replicated()),
        rows=sharding.batch_sharding(compiler.mesh),
        logger=kept,
        saver=kept,
        **{"schedule": loop.Schedule(len(tokens), save=1), **options},
    )
    return trained, kept


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(caplog):
    trained, kept = run([4, BAD, 5], max_skipped_steps=1)
    assert int(trained.step) == 3
    assert [kept.metrics[n]["skipped"] for n in (1, 2, 3)] == [0, 1, 0]
    assert not np.isfinite(kept.metrics[2]["loss"]) and np.isfinite(kept.metrics[3]["loss"])
    first, second, third = (params["decoder"] for _, _, params in kept.saved)
    for a, b, c in zip(*(jax.tree.leaves(x) for x in (first, second, third)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(b, c)
    assert "Step 2 is skipped" in caplog.text


def test_too_many_such_steps_stop_the_run_and_keep_the_batch():
    dumped = {}

    def dump(number, rows):
        dumped[number] = rows
        return "It is in batch.npz."

    with pytest.raises(FloatingPointError, match=r"step 4 is not finite .*newest checkpoint is step 3.*in batch.npz"):
        run([4, BAD, BAD, BAD, 5], max_skipped_steps=2, dump=dump)
    assert list(dumped) == [4] and BAD in dumped[4]["decoder_target_tokens"]
    run([BAD, BAD, 4, BAD, BAD, 4], max_skipped_steps=2)  # in a row is what counts


def test_told_to_stop_it_saves_at_the_next_step():
    kept = Kept()
    with pytest.raises(monitors.Preempted) as stopped:
        run([4] * 9, stop=lambda number: number == 5, schedule=loop.Schedule(9, save=100), kept=kept)
    assert stopped.value.code == 75
    assert [(number, at) for number, at, _ in kept.saved] == [(5, 5)]


def test_sigterm_is_heard_once_and_again():
    before = signal.getsignal(signal.SIGTERM)
    with monitors.PreemptionSignal().listening() as stop:
        assert not stop(1)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2) and stop(3)
    assert signal.getsignal(signal.SIGTERM) is before


def test_several_hosts_hear_a_signal_from_before_the_first_step_they_make(monkeypatch):
    chosen = 1  # what JAX chooses where no step has been heard of
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(monitors.multihost_utils, "reached_preemption_sync_point", lambda step: step == chosen)
    monkeypatch.setattr(monitors.multihost_utils, "process_allgather", lambda mine: np.stack([mine, False]))
    assert monitors.PreemptionSignal()(7), "a run that resumes at step 6"
    chosen = 9
    stop = monitors.PreemptionSignal()
    assert [stop(step) for step in (7, 8, 9, 10)] == [False, False, True, False]
    chosen = -1
    monkeypatch.setattr(monitors.multihost_utils, "process_allgather", lambda mine: np.stack([mine, True]))
    assert monitors.PreemptionSignal()(7), "the other host has heard of it"


def test_a_run_that_stands_still_says_where(caplog, capfd):
    with monitors.HangDetector(seconds=0.2).watched() as progress:
        progress.step(7)
        deadline = time.monotonic() + 10
        while "No progress" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "since step 7" in caplog.text
    assert "test_a_run_that_stands_still_says_where" in capfd.readouterr().err  # this thread's stack


def test_a_jump_of_the_loss_is_warned_of(caplog):
    caplog.set_level(logging.WARNING)
    random = np.random.default_rng(0)
    spikes = monitors.LossSpikeDetector(window=50)
    falling = 6.0 - np.linspace(0, 1, 400) + random.normal(0, 0.05, 400)
    assert not any(spikes(n, float(x)) for n, x in enumerate(falling))
    assert spikes(400, 7.0) and "step 400 is 7" in caplog.text
    assert not monitors.LossSpikeDetector()(0, 1e9)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_stop_a_run_as_sigterm_does(number):
    before = signal.signal(number, signal.default_int_handler)  # a process in the background ignores SIGINT
    try:
        with monitors.PreemptionSignal().listening() as stop:
            assert not stop(1)
            os.kill(os.getpid(), number)
            assert stop(2)
            if number == signal.SIGINT:
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), number)
                    time.sleep(1)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_signal_ignored_from_the_start_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with monitors.PreemptionSignal().listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_evaluation_that_fails_does_not_cost_the_state():
    def evaluate(state):
        raise RuntimeError("a metric")

    kept = Kept()
    with pytest.raises(RuntimeError, match="a metric"):
        run([5, 6], kept=kept, evaluate=evaluate, schedule=loop.Schedule(2, evaluate=1))
    assert [saved for saved, *_ in kept.saved] == [1]
