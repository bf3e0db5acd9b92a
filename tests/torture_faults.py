"""The command, killed by SIGKILL when it comes to a point for the n-th time: `python torture_faults.py POINT N FLAGS`.

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


def at(count: int, owner: Any, name: str, before: Callable[..., Any] | None = None, after: bool = False) -> None:
    """Dies at the `count`-th call of `owner.name`: at once, after `before(*arguments)`, or after the call itself."""
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
        return die()

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
    from t5x_lite import logs

    task = sorted(scores)[0]
    logger._write(logs._record(step, "validation", task, scores[task]))


def plant(point: str, count: int) -> None:
    from orbax.checkpoint._src.path import deleter

    from t5x_lite import checkpoint, jobs, logs, report
    from t5x_lite.checkpoint import checksums, position, saving

    if point == "evaluating":
        import tasks  # noqa: F401  before seqio is used
        from t5x_lite import data, evaluate  # noqa: F401  which takes TensorFlow off the accelerators

        return at(count, evaluate.Evaluation, "run")
    plants: dict[str, Callable[[], None]] = {
        "never": lambda: None,
        "started": lambda: at(count, checkpoint, "choose_start", after=True),
        "restored": lambda: at(count, saving.Checkpointer, "restore", after=True),
        "metrics taken back": lambda: at(count, logs.os, "fsync"),
        "first step": lambda: at(count, jobs.loop, "train"),
        "logging": lambda: at(count, logs.MetricLogger, "train", half_a_line),
        "scores": lambda: at(count, logs.MetricLogger, "evaluation", half_the_scores),
        "save begun": lambda: at(count, position.DataPositionSave, "of", after=True),
        "save halfway": lambda: at(count, position.DataPositionHandler, "async_save", half_put_down),
        "save written": lambda: at(count, checksums, "write"),
        "before commit": lambda: at(count, checksums, "write", after=True),
        "after commit": lambda: at(count, deleter.StandardCheckpointDeleter, "delete_steps"),
        "deleting": lambda: at(count, deleter.StandardCheckpointDeleter, "_delete_step_permanently", half_deleted),
        "last save": lambda: at(count, saving.Checkpointer, "close", after=True),
        "reporting": lambda: at(count, report, "after_training"),
    }
    plants[point]()


POINTS = (  # each with the most that it may be passed before: more often, and a run might end first
    *(("started", 1), ("restored", 1), ("metrics taken back", 1), ("first step", 1), ("logging", 9), ("scores", 2)),
    *(("evaluating", 2), ("save begun", 3), ("save halfway", 3), ("save written", 3), ("before commit", 3)),
    *(("after commit", 3), ("deleting", 2), ("last save", 1), ("reporting", 1)),
)

if __name__ == "__main__":
    import run

    plant(sys.argv[1], int(sys.argv[2]))
    sys.exit(run.main(["run.py", *sys.argv[3:]]))
