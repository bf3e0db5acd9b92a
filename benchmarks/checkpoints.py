"""Times checkpoints: how long a save holds up training, what it writes, and what it takes to go on; prints JSON lines.

    python benchmarks/checkpoints.py [--model=small] [--optimizer=adafactor] [--folder=/tmp/checkpoints]
    python benchmarks/checkpoints.py --position [--steps=0,1000,10000]

The first is of a T5 1.1's training state, five saves. The second is of the data position alone, of a packed, shuffled
mixture of two tasks after so many batches.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402

from benchmarks.train_step import model_config  # noqa: E402
from t5x_lite import checkpoint, sharding  # noqa: E402
from t5x_lite.checkpoint import checksums, saving  # noqa: E402
from t5x_lite.training import optim, step  # noqa: E402

Advance = Callable[[step.TrainState], step.TrainState]


class FixedPosition:
    """Stands for a data iterator whose position takes 1 MiB."""

    def save(self, path: str) -> None:
        pathlib.Path(path, "position").write_bytes(bytes(1 << 20))

    def restore(self, path: str) -> None:
        pathlib.Path(path, "position").read_bytes()


def measure(state: step.TrainState, abstract: step.TrainState, folder: pathlib.Path, saves: int = 5) -> dict[str, Any]:
    """Saves `state` several times and restores it once; returns times in milliseconds and sizes in MB.

    held_up_ms: until the state may be changed again. until_committed_ms: until the checkpoint counts.
    """
    held_up, committed = [], []
    with saving.Checkpointer(folder, keep_last=1) as checkpointer:
        for number in range(1, saves + 1):
            started = time.perf_counter()
            checkpointer.save(number, state, FixedPosition())
            held_up.append(time.perf_counter() - started)
            checkpointer.wait()
            committed.append(time.perf_counter() - started)
    last = checkpoint.find_checkpoint(folder)
    assert last is not None
    size = sum(file.stat().st_size for file in pathlib.Path(last).rglob("*") if file.is_file())
    seconds = {"held_up_ms": held_up, "until_committed_ms": committed}
    started = time.perf_counter()
    assert not checkpoint.damage(last)
    seconds["verify_ms"] = [time.perf_counter() - started]
    started = time.perf_counter()
    checksums.write(last)
    seconds["checksums_ms"] = [time.perf_counter() - started]
    with saving.Checkpointer(folder) as checkpointer:
        started = time.perf_counter()
        jax.block_until_ready(checkpointer.restore(saves, abstract, FixedPosition()))
        seconds["restore_ms"] = [time.perf_counter() - started]
    times = {name: [round(1000 * x) for x in values] for name, values in seconds.items()}
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    sizes = {"state_MB": state_bytes / 1e6, "written_MB": size / 1e6}
    return sizes | times | {"held_up_median_ms": round(1000 * statistics.median(held_up))}


def steps_during_a_save(
    state: step.TrainState, advance: Advance, folder: pathlib.Path, steps: int = 5, limit: int = 200
) -> dict[str, Any]:
    """Trains `steps` steps alone, then saves and trains on until the save has ended; returns milliseconds.

    The steps wait for the device, as a run does when it fetches the metrics of the step before.
    """

    def timed(state: step.TrainState) -> tuple[step.TrainState, float]:
        started = time.perf_counter()
        state = jax.block_until_ready(advance(state))
        return state, 1000 * (time.perf_counter() - started)

    alone, during = [], []
    state, _ = timed(state)
    for _ in range(steps):
        state, milliseconds = timed(state)
        alone.append(milliseconds)
    with saving.Checkpointer(folder, keep_last=1) as checkpointer:
        started = time.perf_counter()
        checkpointer.save(1, state, FixedPosition())
        held_up = 1000 * (time.perf_counter() - started)
        writer = threading.Thread(target=checkpointer.wait)
        writer.start()
        while writer.is_alive() and len(during) < limit:
            state, milliseconds = timed(state)
            during.append(milliseconds)
        writer.join()
    step_ms = statistics.median(alone)
    return {
        "step_ms": round(step_ms, 2),
        "step_during_save_ms": round(statistics.median(during), 2) if during else None,
        "save_call_ms": round(held_up, 1),
        "lost_to_a_save_ms": round(held_up + sum(ms - step_ms for ms in during), 1),
    }


def of_state(model: str, optimizer: str, folder: pathlib.Path) -> None:
    config = model_config(f"t5_1_1/{model}")
    optimizers = {"adafactor": optim.adafactor, "adamw": optim.adamw}
    transform = optim.Optimizer(optimizers[optimizer](), optim.constant(1e-3))
    abstract = step.abstract_state(config, transform, sharding.make_mesh())
    state = jax.block_until_ready(step.init_state(config, transform, jax.random.key(0), abstract))
    print(json.dumps({"model": model, "optimizer": optimizer} | measure(state, abstract, folder)))


def of_position(steps: list[int]) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import torture  # pyright: ignore[reportMissingImports]

    import tasks
    from t5x_lite.data import pipeline

    with tempfile.TemporaryDirectory() as folder:
        torture.prepare(pathlib.Path(folder))
        os.chdir(folder)
        sys.path.insert(0, folder)
        __import__("torture_tasks")
        tasks.vocabulary.set_default("bytes")

        def batches() -> pipeline.TrainBatches:
            return pipeline.TrainBatches("in_memory", {"inputs": 48, "targets": 24}, batch_size=4, seed=0)

        at, ours = 0, batches()
        for number in steps:
            while at < number:
                next(ours)
                at += 1
            with tempfile.TemporaryDirectory() as saved:
                begun = time.perf_counter()
                ours.save(saved)
                save = time.perf_counter() - begun
                size = sum(file.stat().st_size for file in pathlib.Path(saved).iterdir())
                other = batches()
                begun = time.perf_counter()
                other.restore(saved)
                next(other)
                restore = time.perf_counter() - begun
            said = {"save_ms": round(1000 * save), "restore_and_next_ms": round(1000 * restore), "kB": size // 1000}
            print(json.dumps({"step": number} | said))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--optimizer", default="adafactor", choices=["adafactor", "adamw"])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "checkpoints"))
    parser.add_argument("--position", action="store_true")
    parser.add_argument("--steps", default="0,1000,10000")
    options = parser.parse_args()
    if options.position:
        of_position([int(number) for number in options.steps.split(",")])
    else:
        shutil.rmtree(options.folder, ignore_errors=True)
        of_state(options.model, options.optimizer, options.folder.absolute())
