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
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402

import run as command  # noqa: E402
from t5x_lite import checkpoint, step  # noqa: E402
from t5x_lite.checkpoint import checksums, saving  # noqa: E402
from t5x_lite.machine import Machine  # noqa: E402


class Nothing:
    def save(self, path: str) -> None:
        pathlib.Path(path, "position").write_bytes(bytes(1 << 20))

    def restore(self, path: str) -> None:
        pathlib.Path(path, "position").read_bytes()


def of_state(model: str, optimizer: str, folder: pathlib.Path) -> None:
    bindings = ["BATCH_SIZE = 8", f"OPTIMIZER = @{optimizer}()", "TRAIN_STEPS = 1", f"MODEL_DIR = '{folder}'"]
    run = command.configure([f"models/t5_1_1/{model}.gin"], bindings)
    machine = Machine(run)
    state = jax.block_until_ready(step.init_state(run.model, run.optimizer, jax.random.key(0), machine.abstract))
    held, written = [], []
    with saving.Checkpointer(folder, keep_last=1) as saver:
        for number in range(1, 6):
            begun = time.perf_counter()
            saver.save(number, state, Nothing())
            held.append(time.perf_counter() - begun)
            saver.wait()
            written.append(time.perf_counter() - begun)
    last = checkpoint.find_checkpoint(folder)
    assert last is not None
    size = sum(file.stat().st_size for file in pathlib.Path(last).rglob("*") if file.is_file())
    times = {"held_up_ms": [1000 * x for x in held], "until_committed_ms": [1000 * x for x in written]}
    begun = time.perf_counter()
    assert not checkpoint.damage(last)
    times["verify_ms"] = [1000 * (time.perf_counter() - begun)]
    begun = time.perf_counter()
    checksums.write(last)
    times["checksums_ms"] = [1000 * (time.perf_counter() - begun)]
    with saving.Checkpointer(folder) as saver:
        begun = time.perf_counter()
        jax.block_until_ready(saver.restore(5, machine.abstract, Nothing()))
        times["restore_ms"] = [1000 * (time.perf_counter() - begun)]
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    said = {name: [round(x) for x in of] for name, of in times.items()}
    print(json.dumps({"model": model, "optimizer": optimizer, "state_MB": state_bytes / 1e6, "written_MB": size / 1e6}))
    print(json.dumps(said | {"held_up_median_ms": round(1000 * statistics.median(held))}))


def of_position(steps: list[int]) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import torture  # pyright: ignore[reportMissingImports]

    import tasks
    from t5x_lite import data

    with tempfile.TemporaryDirectory() as folder:
        torture.prepare(pathlib.Path(folder))
        os.chdir(folder)
        sys.path.insert(0, folder)
        __import__("torture_tasks")
        tasks.vocabulary.set_default("bytes")

        def batches() -> data.TrainBatches:
            return data.TrainBatches("torture", {"inputs": 48, "targets": 24}, batch_size=4, seed=0)

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
    parser.add_argument("--optimizer", default="adafactor")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "checkpoints"))
    parser.add_argument("--position", action="store_true")
    parser.add_argument("--steps", default="0,1000,10000")
    options = parser.parse_args()
    if options.position:
        of_position([int(number) for number in options.steps.split(",")])
    else:
        shutil.rmtree(options.folder, ignore_errors=True)
        of_state(options.model, options.optimizer, options.folder.absolute())
