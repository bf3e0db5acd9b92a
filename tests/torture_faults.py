"""The command, killed when it comes to a point for the n-th time: `python torture_faults.py POINT N FLAGS`.

By SIGKILL; at the points whose names begin with "told", by SIGTERM.

The points are put into the product from here, so that it has no code for being tested.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tell() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def at(
    count: int,
    owner: Any,
    name: str,
    before: Callable[..., Any] | None = None,
    after: bool = False,
    end: Callable[[], None] = die,
) -> None:
    """Ends at the `count`-th call of `owner.name`: at once, after `before(*arguments)`, or after the call itself."""
    original, calls = getattr(owner, name), 0

    def called(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != count:
            return original(*args, **options)
        if after:
            original(*args, **options)
        if before is not None:
            before(*args, **options)
        return end()

    setattr(owner, name, called)


def half_deleted(_: Any, step: int, target: Any) -> None:
    files = sorted(path for path in Path(target).rglob("*") if path.is_file())
    for file in files[::2]:
        file.unlink()


def half_put_down(part: Any, directory: Any, args: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / sorted(args.files)[0]).write_bytes(b"half")


def half_a_line(logger: Any, step: int, *_: Any) -> None:
    if logger._lines is not None:
        logger._lines.write(f'{{"step": {step}, "split": "tr'.encode())


def half_the_scores(logger: Any, step: int, scores: Any) -> None:
    from t5x_lite.metrics import metric_logger

    task = sorted(scores)[0]
    if logger._writes:
        logger._write(metric_logger._record(step, "validation", task, scores[task]))


def plant(point: str, count: int) -> None:
    from orbax.checkpoint._src.path import deleter

    from t5x_lite import checkpoint, report
    from t5x_lite.checkpoint import checksums, data_state, saving
    from t5x_lite.cli import train
    from t5x_lite.metrics import metric_logger

    point = point.split(" at ")[0]
    if point == "evaluating":
        import tasks  # noqa: F401  before seqio is used
        from t5x_lite.data import pipeline  # noqa: F401  which takes TensorFlow off the accelerators
        from t5x_lite.inference import evaluator

        return at(count, evaluator.Evaluation, "run")
    plants: dict[str, Callable[[], None]] = {
        "never": lambda: None,
        "started": lambda: at(count, checkpoint, "choose_start", after=True),
        "restored": lambda: at(count, saving.Checkpointer, "restore", after=True),
        "metrics taken back": lambda: at(count, metric_logger.os, "fsync"),
        "first step": lambda: at(count, train.loop, "train"),
        "logging": lambda: at(count, metric_logger.MetricLogger, "train", half_a_line),
        "told": lambda: at(count, metric_logger.MetricLogger, "train", after=True, end=tell),
        "scores": lambda: at(count, metric_logger.MetricLogger, "evaluation", half_the_scores),
        "save begun": lambda: at(count, data_state.DataPositionSave, "of", after=True),
        "save halfway": lambda: at(count, data_state.DataPositionHandler, "async_save", half_put_down),
        "save written": lambda: at(count, checksums, "write"),
        "before commit": lambda: at(count, checksums, "write", after=True),
        "after commit": lambda: at(count, deleter.StandardCheckpointDeleter, "delete_steps"),
        "deleting": lambda: at(count, deleter.StandardCheckpointDeleter, "_delete_step_permanently", half_deleted),
        "last save": lambda: at(count, saving.Checkpointer, "close", after=True),
        "reporting": lambda: at(count, report, "after_training"),
    }
    plants[point]()


# What only the first of several processes does.
OF_THE_FIRST = ("metrics taken back", "save written", "before commit", "deleting", "reporting")


def passes(checkpoints: list[int], steps: int, evaluator: int, save: int, keep: int) -> dict[str, int]:
    """How often each point is passed on the way to the last of `steps`, from the newest of the checkpoints there are.

    Args:
      evaluate, save: after so many steps.
      keep: so many checkpoints.
    """
    here = max(checkpoints, default=0)
    evaluations, saves = (steps // period - here // period for period in (evaluator, save))
    until_evaluation = (evaluator - 1 - here) % evaluator or evaluator  # it is told when the step after it is under way
    return {
        **dict.fromkeys(("started", "first step", "last save", "reporting"), 1),
        **dict.fromkeys(("restored", "metrics taken back"), int(here > 0)),
        **dict.fromkeys(("logging", "told"), steps - here - 1),
        "told at an evaluation": until_evaluation if here + until_evaluation < steps else 0,
        **dict.fromkeys(("scores", "evaluating"), evaluations),
        **dict.fromkeys(("save begun", "save halfway", "save written", "before commit", "after commit"), saves),
        "deleting": saves - (keep - len(checkpoints)),
    }


if __name__ == "__main__":
    from t5x_lite.cli import main as run

    plant(sys.argv[1], int(sys.argv[2]))
    sys.exit(run.main(["run.py", *sys.argv[3:]]))
