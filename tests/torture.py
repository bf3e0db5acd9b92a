"""Kills a training run again and again, starts it again, and compares it with one that was left alone.

    python tests/torture.py --kills=100 [--processes=1,2] [--seed=0] [--folder=/tmp/torture]

The run is the real command: a small T5 with dropout on a shuffled, packed mixture of two tasks that are read from .zst
and Parquet files, with evaluations and checkpoints. It is killed by SIGKILL or told to stop by SIGTERM at each point of
torture_faults.py in turn, and now and then killed at random, until it is done; then its conversion is, and the next run
begins, until there have been so many kills and stops. Each run must have every record of metrics.jsonl once, with the
same loss to the last bit, and so must TensorBoard; the parameters, the optimizer's state and the predictions of the
last step must be the same to the last bit; and a conversion that was ended must be absent, and the same when it is done
again. A summary with the number of times that each point was met is printed as JSON.
"""

import argparse
import contextlib
import json
import logging
import random
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torture_faults
import torture_starts
from torture_starts import NO_FAULT, Fault, run

STEPS, EVAL_PERIOD, CHECKPOINT_PERIOD, KEEP_LAST = 24, 6, 3, 2
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
SCAN_LAYERS = False
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
FILES = {"doubles": ".jsonl.zst", "words": ".parquet"}  # the endings of the training files
TASKS = f"""
import seqio
from tasks import user_files
files = {FILES}
for name, ending in files.items():
    user_files.register_files(f"{{name}}_in_memory", f"{{name}}-train-*{{ending}}", f"{{name}}-eval.jsonl")
user_files.MEMORY_LIMIT, user_files._SHUFFLE_WINDOW = 0, 40  # files are read while the run trains
for name, ending in files.items():
    user_files.register_files(name, f"{{name}}-train-*{{ending}}", f"{{name}}-eval.jsonl")
seqio.MixtureRegistry.add("in_memory", [("doubles_in_memory", 3.0), ("words_in_memory", 1.0)])
seqio.MixtureRegistry.add("torture", [("doubles", 1.0), ("words", 1.0)])
"""
MOST_DIFFERENCES = 5  # after which no run begins
WALL_TIMES = {"seconds_per_step", "tokens_per_second", "mfu"}


def prepare(folder: Path) -> None:
    """Writes the two tasks' files, the module that registers them, and the gin file."""
    import pyarrow as pa
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for split, count in (("train", 150), ("eval", 7)):
        numbers = [rng.randint(0, 99) for _ in range(count)]
        rows = {
            "doubles": [{"inputs": f"double {n} please", "targets": str(2 * n)} for n in numbers],
            "words": [{"inputs": f"how many: {'so ' * (n % 7)}", "targets": f"{n % 7} of them"} for n in numbers],
        }
        for name, of in rows.items():
            if split == "eval":
                (folder / f"{name}-eval.jsonl").write_text(_json_lines(of))
                continue
            for part in range(2):  # one a host
                file, of_part = folder / f"{name}-train-{part}{FILES[name]}", of[part::2]
                if file.suffix == ".parquet":
                    pyarrow.parquet.write_table(pa.Table.from_pylist(of_part), file, row_group_size=20)
                else:
                    with pa.CompressedOutputStream(str(file), "zstd") as stream:
                        stream.write(_json_lines(of_part).encode())
    (folder / "torture.gin").write_text(CONFIG)
    (folder / "torture_tasks.py").write_text(TASKS)


def _json_lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def curve(model_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the time of day."""
    records = [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in WALL_TIMES} for record in records]


def events(model_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: of each tag, steps and values."""
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))  # TensorFlow stays unloaded
    from tensorboard.backend.event_processing import event_accumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each restart of a run
    shown = event_accumulator.EventAccumulator(str(model_dir), size_guidance={"scalars": 0})
    shown.Reload()
    tags = [tag for tag in shown.Tags()["scalars"] if tag.split("/")[-1] not in WALL_TIMES]
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in sorted(tags)}


def saved(model_dir: Path) -> dict[str, np.ndarray]:
    """The parameters and the optimizer's state of the last step."""
    import orbax.checkpoint as ocp
    from flax import traverse_util

    arrays = {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for part in ("params", "optimizer"):
            folder = model_dir.absolute() / "checkpoints" / str(STEPS) / part
            arguments = ocp.args.PyTreeRestore(restore_args=_as_numpy(reader.metadata(folder)))
            arrays[part] = reader.restore(folder, args=arguments)
    return {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(arrays, sep="/").items()}


def _as_numpy(metadata: Any) -> Any:
    import jax
    import orbax.checkpoint as ocp

    return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.item_metadata.tree)


def compare(found: Path, expected: Path) -> None:
    """Raises AssertionError: a step is missing, there twice, or another; or a number of the last step is."""
    train = [record for record in curve(expected) if record["split"] == "train"]
    assert [record["step"] for record in train] == list(range(1, STEPS + 1)) and train[0]["loss"] != train[-1]["loss"]
    for ours, theirs in zip(curve(found), curve(expected), strict=True):
        assert ours == theirs, (found, ours, theirs)
    shown = events(expected)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, STEPS + 1))
    assert events(found) == shown, found


def compare_last(found: Path, expected: Path) -> None:
    """Raises AssertionError: an array of the last step's checkpoint is another, or its predictions are."""
    ours, theirs = saved(found), saved(expected)
    others = [
        k for k in ours.keys() | theirs.keys() if k not in ours or k not in theirs or not same(ours[k], theirs[k])
    ]
    assert not others and any("kernel" in name for name in ours), (found, others)
    for name in FILES:
        ours, theirs = (path / "predictions" / f"{name}-{STEPS}.jsonl" for path in (found, expected))
        assert ours.read_bytes() == theirs.read_bytes(), ours


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two arrays are the same to the last bit."""
    kinds = [(array.shape, array.dtype) for array in (ours, theirs)]
    return kinds[0] == kinds[1] and ours.tobytes() == theirs.tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def checkpoints(model_dir: Path) -> list[int]:
    """The steps that are saved."""
    folder = model_dir / "checkpoints"
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []


class Faults:
    """Each point that can be met from where a run is, in turn, shuffled; now and then, a random time."""

    def __init__(self, rng: random.Random, seconds: float):
        self._rng, self._seconds = rng, seconds
        self._due: list[str] = []
        self._given = 0

    def next(self, model_dir: Path) -> Fault:
        self._given += 1
        if self._given % 15 == 0:
            return Fault(torture_starts.RANDOM, int(1000 * self._rng.uniform(0.1, 1.0) * self._seconds))
        counts = torture_faults.passes(checkpoints(model_dir), STEPS, EVAL_PERIOD, CHECKPOINT_PERIOD, KEEP_LAST)
        possible = {point for point, of in counts.items() if of}
        if possible.isdisjoint(self._due):
            self._due += self._rng.sample(sorted(counts), len(counts))
        point = next(point for point in self._due if point in possible)
        self._due.remove(point)
        return Fault(point, self._rng.choice(counts[point][:9] if "start" not in point else counts[point]))


class Torture:
    """Kills and stops runs of so many processes, and counts."""

    def __init__(self, folder: Path, processes: int, seed: int):
        self._folder, self._processes, self._rng = folder, processes, random.Random(seed)
        self.met: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.counts = dict.fromkeys(("runs", "starts", "conversions", "differences"), 0)
        self._alone = f"alone-{processes}"
        begun = time.monotonic()
        assert run(folder, self._alone, processes=processes, cold=processes == 1).code == 0
        self._planned = Faults(self._rng, time.monotonic() - begun)
        self._conversions: list[str] = []
        assert torture_starts.convert(folder, self._alone, f"{self._alone}-converted").code == 0

    def run(self, ends: int) -> None:
        """Goes on until there have been so many kills and stops."""
        while (left := ends - self.met.total()) > 0 and self.counts["differences"] < MOST_DIFFERENCES:
            self._difference(lambda ends=left: self._one_run(min(self._rng.randint(8, 14), ends)))

    def _one_run(self, faults: int) -> None:
        """Ends a run so many times, and then lets it be done."""
        name = f"run-{self._processes}-{self.counts['runs']}"
        self.counts["runs"] += 1
        code = -1
        while code != 0:
            fault = self._planned.next(self._folder / name) if faults else NO_FAULT
            faults = max(faults - 1, 0)
            first = fault.point.removeprefix("told ") in torture_faults.OF_THE_FIRST
            victim = 0 if first else self._rng.randrange(self._processes)
            cold = fault.point == torture_starts.RANDOM
            may_stop = STEPS not in checkpoints(self._folder / name)
            code = self._count(name, fault, run(self._folder, name, fault, self._processes, victim, cold))
            lost = code == 0 and may_stop and fault.point in torture_faults.BEFORE_THE_FIRST_STEP
            assert not lost, f"{name} was told to stop ({fault.point}) and went on to the end"
        ours, alone = self._folder / name, self._folder / self._alone
        self._difference(lambda: compare(ours, alone))
        self._difference(lambda: compare_last(ours, alone))
        self._convert(name)

    def _convert(self, name: str) -> None:
        """Ends a run's conversion twice, and then lets it be done."""
        dest = self._folder / f"{name}-converted"
        for _ in range(2):
            if not self._conversions:
                points = (*torture_faults.CONVERTING, *torture_faults.TOLD_CONVERTING)
                self._conversions = self._rng.sample(points, len(points))
            fault = Fault(self._conversions.pop())
            self._count(name, fault, torture_starts.convert(self._folder, name, dest.name, fault))
            self._difference(lambda: absent(dest))
        self._count(name, NO_FAULT, torture_starts.convert(self._folder, name, dest.name))
        self.counts["conversions"] += 1
        self._difference(lambda: compare_converted(dest, self._folder / f"{self._alone}-converted"))

    def _count(self, name: str, fault: Fault, end: torture_starts.End) -> int:
        self.counts["starts"] += 1
        if fault.point != NO_FAULT.point:
            (self.met if end.met else self.missed)[fault.point] += 1
        print(f"{time.strftime('%X')} {name}: {fault.point} {fault.count} -> {end}", flush=True)
        return end.code

    def _difference(self, check: Any) -> None:
        try:
            check()
        except (AssertionError, ValueError, OSError) as error:
            self.counts["differences"] += 1
            print(f"DIFFERENCE: {type(error).__name__}: {error}", flush=True)

    def summary(self) -> dict[str, Any]:
        killed = {point: count for point, count in self.met.items() if not point.startswith("told ")}
        kills = sum(killed.values())
        known = {
            *torture_faults.passes([3, 6], 24, 6, 3, 2),
            *torture_faults.CONVERTING,
            *torture_faults.TOLD_CONVERTING,
        }
        return {
            "processes": self._processes,
            "kills": kills,
            "stops": self.met.total() - kills,
            **self.counts,
            "met": dict(sorted(self.met.items())),
            "not met": sorted(known - self.met.keys()),
            "passed by": dict(self.missed),
        }


def absent(dest: Path) -> None:
    """Raises AssertionError: an ended conversion has left something that looks complete."""
    assert not dest.exists(), sorted(contents(dest))


def compare_converted(found: Path, expected: Path) -> None:
    """Raises AssertionError: two conversions differ, or one has left more than its folder."""
    assert contents(found) == contents(expected), found
    assert (expected / "model.safetensors").stat().st_size > 1000
    assert not (found.parent / f".{found.name}.partial").exists(), found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if there was a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="so many kills and stops, of all numbers of processes")
    parser.add_argument("--processes", default="1,2", help="numbers of processes; one process gets two thirds of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(arguments)
    folder, begun = (options.folder or Path(tempfile.mkdtemp(prefix="torture-"))).absolute(), time.monotonic()
    print(f"in {folder}", flush=True)
    prepare(folder)
    numbers = [int(number) for number in options.processes.split(",")]
    weights = [2 if number == 1 else 1 for number in numbers]
    summaries, left = [], options.kills
    for number, weight, rest in zip(numbers, weights, (sum(weights[i:]) for i in range(len(weights))), strict=True):
        torture = Torture(folder, number, options.seed)
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends it with its summary
            torture.run(round(left * weight / rest))
        left -= torture.met.total()
        summaries.append(torture.summary())
        print(json.dumps(summaries[-1], indent=1), flush=True)
    differences = sum(summary["differences"] for summary in summaries)
    ends = sum(summary["kills"] + summary["stops"] for summary in summaries)
    minutes = (time.monotonic() - begun) / 60
    print(f"{ends} kills and stops, {differences} differences, {minutes:.0f} minutes")
    return int(differences > 0)


if __name__ == "__main__":
    sys.exit(main())
