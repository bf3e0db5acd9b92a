"""The commands, ended when they come to a point for the n-th time.

    python torture_faults.py POINT N FLAGS               run.py with its flags
    python torture_faults.py POINT N convert ARGUMENTS   python -m t5x_lite.convert

They are ended by SIGKILL; at the points whose names begin with "told", by SIGTERM. They write MET to stderr before.
The points are put into the product from here, so that it has no code for being tested.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MET = "==== met"


def signalled(number: int) -> None:
    os.write(2, f"{MET}\n".encode())
    os.kill(os.getpid(), number)


def at(
    count: int,
    end: Callable[[], None],
    owner: Any,
    name: str,
    before: Callable[..., Any] | None = None,
    after: bool = False,
) -> None:
    """Calls `end` at the `count`-th call of `owner.name`: at once, after `before(*arguments)`, or after the call."""
    original, calls = getattr(owner, name), 0

    def called(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != count:
            return original(*args, **options)
        result = original(*args, **options) if after else None
        if before is not None:
            before(*args, **options)
        end()
        return result if after else original(*args, **options)  # a process that is told goes on

    setattr(owner, name, called)


def half_deleted(_: Any, step: int, target: Any) -> None:
    files = sorted(path for path in Path(target).rglob("*") if path.is_file())
    for file in files[::2]:
        file.unlink()


def half_put_down(part: Any, directory: Any, args: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / sorted(args.files)[0]).write_bytes(b"half")


def half_the_checksums(folder: Any) -> None:
    (folder / "checksums.json").write_text('{"files": {')


def half_a_line(logger: Any, step: int, *_: Any) -> None:
    if logger._lines is not None:
        logger._lines.write(f'{{"step": {step}, "split": "tr'.encode())


def half_the_scores(logger: Any, step: int, scores: Any) -> None:
    from t5x_lite.metrics import metric_logger

    task = sorted(scores)[0]
    if logger._writes:
        logger._write(metric_logger._record(step, "validation", task, scores[task]))


def half_the_predictions(path: Any, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / f"{path.name}.partial").write_text('{"inputs": "dou')


def half_the_weights(file: Path, tensors: Any) -> None:
    file.write_bytes(b"\x40\0\0\0\0\0\0\0" + b" " * 50)


def reading(count: int, end: Callable[[], None], ending: str, training: bool) -> None:
    """Calls `end` between two rows of a file with that ending: of the checks at the start, or of the training data."""
    import tasks  # noqa: F401  before seqio is used
    from t5x_lite.data import pipeline
    from tasks import file_formats

    original, counts, number = file_formats.rows, not training, 0

    def rows(path: str, *args: Any) -> Iterator[tuple[int, dict]]:
        nonlocal number
        for row in original(path, *args):
            yield row
            number += counts and path.endswith(ending)
            if number == count and path.endswith(ending):
                end()

    file_formats.rows = rows
    opened = pipeline.TrainBatches._opened

    def then_counts(self: pipeline.TrainBatches) -> Any:
        nonlocal counts
        counts = training
        return opened(self)

    pipeline.TrainBatches._opened = then_counts


def plant(point: str, count: int) -> None:
    from orbax.checkpoint._src.path import deleter

    from t5x_lite import checkpoint, convert, report
    from t5x_lite.checkpoint import checksums, data_state, saving
    from t5x_lite.cli import train
    from t5x_lite.convert import tensors
    from t5x_lite.metrics import metric_logger

    told, name = point.startswith("told "), point.removeprefix("told ").removeprefix("last ").split(" at an ")[0]
    end = functools.partial(signalled, signal.SIGTERM if told else signal.SIGKILL)

    def put(owner: Any, name: str, before: Callable[..., Any] | None = None, after: bool = False) -> None:
        at(count, end, owner, name, None if told else before, after)

    def evaluating(name: str, before: Callable[..., Any] | None = None) -> None:
        import tasks  # noqa: F401  before seqio is used
        from t5x_lite.data import pipeline  # noqa: F401  which takes TensorFlow off the accelerators
        from t5x_lite.inference import evaluator

        put({"run": evaluator.Evaluation}.get(name, evaluator), name, before)

    plants: dict[str, Callable[[], None]] = {
        "never": lambda: None,
        "started": lambda: put(checkpoint, "choose_start", after=True),
        ".zst at the start": lambda: reading(count, end, ".zst", training=False),
        "Parquet at the start": lambda: reading(count, end, ".parquet", training=False),
        "restored": lambda: put(saving.Checkpointer, "restore", after=True),
        "metrics taken back": lambda: put(metric_logger.os, "fsync"),
        "first step": lambda: put(train.loop, "train"),
        "logging": lambda: put(metric_logger.MetricLogger, "train", half_a_line),
        ".zst in training": lambda: reading(count, end, ".zst", training=True),
        "Parquet in training": lambda: reading(count, end, ".parquet", training=True),
        "evaluating": lambda: evaluating("run"),
        "predictions": lambda: evaluating("write_whole", half_the_predictions),
        "scores": lambda: put(metric_logger.MetricLogger, "evaluation", half_the_scores),
        "save begun": lambda: put(data_state.DataPositionSave, "of", after=True),
        "save halfway": lambda: put(data_state.DataPositionHandler, "async_save", half_put_down),
        "save written": lambda: put(checksums, "write"),
        "checksums halfway": lambda: put(checksums, "write", half_the_checksums),
        "before commit": lambda: put(checksums, "write", after=True),
        "after commit": lambda: put(deleter.StandardCheckpointDeleter, "delete_steps"),
        "deleting": lambda: put(deleter.StandardCheckpointDeleter, "_delete_step_permanently", half_deleted),
        "save done": lambda: put(saving.Checkpointer, "close", after=True),
        "reporting": lambda: put(report, "after_training"),
        "model read": lambda: put(convert, "read", after=True),
        "weights": lambda: put(tensors, "write_safetensors"),
        "weights halfway": lambda: put(tensors, "write_safetensors", half_the_weights),
        "tokenizer": lambda: put(convert, "copy_tokenizer"),
        "all but the name": lambda: put(convert, "copy_tokenizer", after=True),
    }
    plants[name]()


# What only the first of several processes does.
OF_THE_FIRST = (
    *("metrics taken back", "save written", "checksums halfway", "before commit", "deleting", "predictions"),
    *("last save written", "last checksums halfway", "reporting"),
)
# Of a conversion, each once.
CONVERTING = ("model read", "weights", "weights halfway", "tokenizer", "all but the name")
TOLD_CONVERTING = tuple(f"told {point}" for point in CONVERTING if point != "weights halfway")
# Where SIGTERM ends the process as it ends any other: there is nothing yet to save.
ENDED_BY_SIGTERM = ("told started", "told .zst at the start", "told Parquet at the start", *TOLD_CONVERTING)
# A run that is told there, and has a step left, does not go on to the end.
BEFORE_THE_FIRST_STEP = (
    *("told started", "told .zst at the start", "told Parquet at the start", "told restored", "told first step"),
)
_NOT_TOLD = ("metrics taken back", "reporting", "checksums halfway", "save done")
# Rows of a training file that are read in any case: by the checks at the start, and when the data is opened.
ROWS_AT_THE_START, ROWS_IN_TRAINING = 100, 12


def passes(checkpoints: list[int], steps: int, evaluate: int, save: int, keep: int) -> dict[str, range]:
    """The counts at which each point is met on the way to the last of `steps`, from the newest of the checkpoints.

    Args:
      evaluate, save: after so many steps.
      keep: so many checkpoints.
    """
    here = max(checkpoints, default=0)
    evaluations, saves = (steps // period - here // period for period in (evaluate, save))
    until_evaluation = (evaluate - 1 - here) % evaluate or evaluate  # it is told when the step after it is under way

    def up_to(count: int, *points: str) -> dict[str, range]:
        return {point: range(1, count + 1) for point in points}

    saving = ("save begun", "save halfway", "save written", "checksums halfway", "before commit", "after commit")
    kills = {
        **up_to(1, "started", "first step", "last save done", "reporting"),
        **up_to(here > 0, "restored", "metrics taken back"),
        **up_to(ROWS_AT_THE_START, ".zst at the start", "Parquet at the start"),
        **up_to(ROWS_IN_TRAINING * (here < steps), ".zst in training", "Parquet in training"),
        **up_to(steps - here - 1, "logging"),
        **up_to(evaluations, "evaluating", "scores"),
        **up_to(2 * evaluations, "predictions"),
        **up_to(saves, *saving),
        **{f"last {point}": range(saves, saves + (saves > 0)) for point in saving[1:4]},
        **up_to(saves - (keep - len(checkpoints)), "deleting"),
    }
    told = {f"told {point}": counts for point, counts in kills.items() if not point.endswith(_NOT_TOLD)}
    told["told logging at an evaluation"] = range(
        until_evaluation, until_evaluation + (here + until_evaluation < steps)
    )
    return kills | told


def keep_compiled() -> None:
    """Lets this process keep what it compiles. JAX has only the first do so, and on CPUs the others do not find it."""
    from jax._src import compilation_cache, compiler

    def write(key: str, seconds: float, name: str, backend: Any, executable: Any, host_callbacks: Any) -> None:
        compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))

    compiler._cache_write = write


def main(arguments: list[str]) -> int:
    if "--process_index=1" in arguments:
        keep_compiled()
    plant(arguments[0], int(arguments[1]))
    if arguments[2] == "convert":
        from t5x_lite.convert import __main__ as convert

        return convert.main(arguments[3:])
    from t5x_lite.cli import main as run

    return run.main(["run.py", *arguments[2:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
