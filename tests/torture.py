"""Kills a training run again and again, starts it again, and compares it with one that was left alone.

    python tests/torture.py --kills=50 [--processes=2] [--seed=0] [--folder=/tmp/torture]

The run is the real command: a small T5 with dropout on a shuffled, packed mixture of two tasks, with evaluations and
checkpoints. It is killed by SIGKILL at random times, and at the points of torture_faults.py (at some it is told to stop
by SIGTERM), until it is done; then the next one begins, until there have been so many kills. Each must have every
record of metrics.jsonl once, with the same loss to the last bit, and so must TensorBoard. A summary is printed as JSON.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torture_faults

REPO = Path(__file__).resolve().parents[1]
STEPS, EVAL_PERIOD, CHECKPOINT_PERIOD, KEEP_LAST = 24, 6, 3, 2
TOLD = 75  # the exit code of a run that SIGTERM has told to stop
MODEL = """
T5Config:
    d_model = 16
    d_ff = 24
    num_heads = 2
    head_dim = 8
    num_encoder_layers = 1
    num_decoder_layers = 1
    vocab_size = 384
"""
CONFIG = f"""{MODEL}MIXTURE_OR_TASK_NAME = "torture"
MIXTURE_OR_TASK_MODULE = "torture_tasks"
VOCABULARY = "bytes"
TASK_FEATURE_LENGTHS = {{"inputs": 48, "targets": 24}}
DATA_SHARDS = 2
BATCH_SIZE = 4
TRAIN_STEPS = {STEPS}
LOG_PERIOD = 1
EVAL_PERIOD = {EVAL_PERIOD}
CHECKPOINT_PERIOD = {CHECKPOINT_PERIOD}
KEEP_LAST = {KEEP_LAST}
DROPOUT_RATE = 0.1
DTYPE = "float32"
WARMUP_STEPS = 10
LEARNING_RATE = 0.1
"""
TASKS = """
import seqio
from tasks import user_files
for name in ("doubles", "words"):
    user_files.register_files(name, f"{name}-train.jsonl", f"{name}-eval.jsonl")
seqio.MixtureRegistry.add("torture", [("doubles", 3.0), ("words", 1.0)])
"""
WALL_TIMES = {"seconds_per_step", "tokens_per_second", "mfu"}

Fault = tuple[str, int]  # a point of torture_faults, and how often it is passed; or "random", and milliseconds


def prepare(folder: Path) -> None:
    """Writes the two tasks' files, the module that registers them, and the gin file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for split, count in (("train", 150), ("eval", 7)):
        numbers = [rng.randint(0, 99) for _ in range(count)]
        rows = {
            "doubles": [{"inputs": f"double {n} please", "targets": str(2 * n)} for n in numbers],
            "words": [{"inputs": f"how many: {'so ' * (n % 7)}", "targets": f"{n % 7} of them"} for n in numbers],
        }
        for name, of in rows.items():
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    (folder / "torture.gin").write_text(CONFIG)
    (folder / "torture_tasks.py").write_text(TASKS)


def run(folder: Path, name: str, fault: Fault = ("never", 1), processes: int = 1, victim: int = 0) -> int:
    """Runs the command on MODEL_DIR=folder/name, as many processes; returns 0, -SIGKILL where it was killed, or 75.

    Args:
      victim: the process that meets the fault; the others are killed when it has died.

    Raises AssertionError: it ended in any other way; with its log.
    """
    point, count = fault
    environment = os.environ | {
        "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // processes}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--gin_file=torture.gin", f"--gin.MODEL_DIR='{name}'"]
    started = []
    with open(folder / f"{name}.log", "a") as log:
        print(f"==== {fault}", file=log, flush=True)
        for index in range(processes):
            meets = fault if index == victim and point != "random" else ("never", 1)
            hosts = [f"--coordinator_address=localhost:{port}", f"--process_count={processes}"]
            hosts = [*hosts, f"--process_index={index}"] if processes > 1 else []
            command = [sys.executable, torture_faults.__file__, meets[0], str(meets[1]), *flags, *hosts]
            started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log))
        deadline = time.monotonic() + (count / 1000 if point == "random" else 600)
        while time.monotonic() < deadline and all(process.poll() is None for process in started):
            time.sleep(0.02)
        if point == "random" or any(process.poll() not in (0, TOLD, None) for process in started):
            for process in started:
                process.kill()
        codes = [process.wait(timeout=300) for process in started]
    killed = -signal.SIGKILL in codes
    assert killed or codes in ([0] * processes, [TOLD] * processes), (folder / f"{name}.log").read_text()[-6000:]
    return -signal.SIGKILL if killed else codes[0]


def curve(model_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the time of day."""
    records = [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in WALL_TIMES} for record in records]


def events(model_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: of each tag, steps and values."""
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))  # TensorFlow stays unloaded
    from tensorboard.backend.event_processing import event_accumulator

    shown = event_accumulator.EventAccumulator(str(model_dir), size_guidance={"scalars": 0})
    shown.Reload()
    tags = [tag for tag in shown.Tags()["scalars"] if tag.split("/")[-1] not in WALL_TIMES]
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in sorted(tags)}


def compare(found: Path, expected: Path) -> None:
    """Raises AssertionError: a step is missing, there twice, or another."""
    train = [record for record in curve(expected) if record["split"] == "train"]
    assert [record["step"] for record in train] == list(range(1, STEPS + 1)) and train[0]["loss"] != train[-1]["loss"]
    for ours, theirs in zip(curve(found), curve(expected), strict=True):
        assert ours == theirs, (found, ours, theirs)
    shown = events(expected)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, STEPS + 1))
    assert events(found) == shown, found


class Faults:
    """Each point that can be passed from where a run is, in turn, shuffled, and after each a random time."""

    def __init__(self, rng: random.Random, seconds: float):
        self._rng, self._seconds = rng, seconds
        self._due: list[str] = []
        self._at_random = False

    def next(self, model_dir: Path) -> Fault:
        self._at_random = not self._at_random
        if not self._at_random:
            return "random", int(1000 * self._rng.uniform(0.4, 1.0) * self._seconds)
        folder = model_dir / "checkpoints"
        there = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []
        passes = torture_faults.passes(there, STEPS, EVAL_PERIOD, CHECKPOINT_PERIOD, KEEP_LAST)
        possible = {point: most for point, most in passes.items() if most > 0}
        if possible.keys().isdisjoint(self._due):
            self._due += self._rng.sample(sorted(passes), len(passes))
        point = next(point for point in self._due if point in possible)
        self._due.remove(point)
        return point, possible[point] if "at an" in point else self._rng.randint(1, min(possible[point], 9))


def torture(folder: Path, kills: int, processes: int, seed: int) -> dict[str, Any]:
    """Kills so many times; returns what happened."""
    prepare(folder)
    rng = random.Random(seed)
    assert run(folder, "alone", processes=processes) == 0  # compiles
    begun = time.monotonic()
    assert run(folder, "again", processes=processes) == 0
    compare(folder / "again", folder / "alone")
    seconds = time.monotonic() - begun
    planned, met, runs, starts = Faults(rng, seconds), Counter(), 0, 0
    while sum(met.values()) < kills:
        name, code, left = f"killed{runs}", -1, rng.randint(4, 12)
        runs += 1
        while code != 0:
            fault = planned.next(folder / name) if left and sum(met.values()) < kills else ("never", 1)
            victim = 0 if fault[0] in torture_faults.OF_THE_FIRST else rng.randrange(processes)
            code = run(folder, name, fault, processes, victim)
            starts, left = starts + 1, left - 1
            met[fault[0]] += code != 0
            print(f"run {runs}, start {starts}: {fault} -> {code}", flush=True)
        compare(folder / name, folder / "alone")
    return {"kills": sum(met.values()), "runs": runs, "starts": starts, "processes": processes, "at": dict(met)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    print(f"in {folder}", flush=True)
    print(json.dumps(torture(folder.absolute(), options.kills, options.processes, options.seed), indent=1))


if __name__ == "__main__":
    main()
