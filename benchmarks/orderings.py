"""`make orderings`: which of the T5 and UL2 papers' orderings hold for the model and the text of `make study`?

    python benchmarks/orderings.py [--out=runs/orderings] [--seeds=0,1,2] [--jobs=2] [--table]
                                   [--pretrain_steps=350] [--finetune_steps=240]

Each objective pre-trains the model of study/model.gin on the study's text, by its recipe (compare/*.gin, or
runs/pretrain.gin with the task of span corruption or UL2) and for equally many steps of equally many tokens of text.
Each of these models, and random parameters, are then fine-tuned on SST-2 and on SQuAD by runs/finetune.gin and
runs/finetune_squad.gin, and evaluated after the last step: on SST-2 accuracy and loss of all dev rows, on SQuAD the
loss of the first dev rows, as many for all. A seed is that of pre-training and of what follows it.

Every run is `run.py` in a folder of its own below --out, with a log beside it. Its result is a line of
OUT/results.jsonl as soon as it ends, and is not computed again: give the command again after an interruption. The
table is also in OUT/orderings.md, the command of each run in OUT/commands.txt; --table only prints the table.

The text takes the place of C4: OUT/data has it as c4/, and glue/, squad/ and vocab/ from $T5X_LITE_DATA_DIR. What is
not equal: inputs and targets that an objective makes of the same text, and so the time of a step (the decoder of the
prefix LM reads half of all text); the text that one example spans, from 127 tokens to 215; joining of short texts,
which the prefix LM alone does not do. UL2's spans of 64 tokens are as long as such rows allow.

Programs that are compiled are kept by run.py and shared by the runs. Cost with the defaults and two cores: 75 minutes,
reckoned from single steps.

An ordering holds if the difference of the means over seeds has the right sign and Welch's t-test gives p < 0.05, does
not hold if it is so with the wrong sign, and is undecided otherwise. The test knows the spread over seeds, not that of
dev rows: a difference of one point on SST-2 is nine rows.
"""

import argparse
import dataclasses
import gzip
import itertools
import math
import os
import pathlib
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import scipy.stats

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import study  # noqa: E402
from benchmarks.transfer import Results, Sample, difference  # noqa: E402
from t5x_lite.metrics import metric_logger  # noqa: E402

RANDOM = "random"
PRETRAIN = "pretrain"  # the other tasks are fine-tuned


@dataclasses.dataclass(frozen=True)
class Objective:
    """A recipe with lengths and rows whose steps have 2,250 tokens of text, to 1 %, on average."""

    recipe: str
    lengths: tuple[int, int]
    rows: int
    name: str | None = None  # of a SeqIO task; None: the recipe's own


OBJECTIVES = {
    "span_corruption": Objective("runs/pretrain.gin", (128, 29), 16, "c4_v220_span_corruption"),
    "iid_denoising": Objective("compare/encoder_decoder_denoising.gin", (142, 48), 16),
    "prefix_lm": Objective("compare/encoder_decoder_lm.gin", (128, 128), 15),
    "ul2": Objective("runs/pretrain.gin", (128, 96), 15, "c4_v220_ul2"),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is fine-tuned. share: steps, as a part of --finetune_steps. eval_steps: batches for the loss, None: all."""

    recipe: str
    name: str
    lengths: tuple[int, int]
    share: float = 1.0
    eval_steps: int | None = None
    eval_examples: int | None = None


TASKS = {
    "sst2": Task("runs/finetune.gin", "glue_sst2_v002", (128, 16)),
    # The answers of so small a model are wrong: one batch is decoded, because run.py wants one.
    "squad": Task(
        "runs/finetune_squad.gin", "squad_v010_allanswers", (384, 16), share=2 / 3, eval_steps=8, eval_examples=32
    ),
}


@dataclasses.dataclass(frozen=True)
class Metric:
    """A name in metrics.jsonl. sign: 1 if larger is better."""

    task: str
    name: str
    sign: int
    title: str


METRICS = (
    Metric("sst2", "accuracy", 1, "SST-2, accuracy"),
    Metric("sst2", "loss", -1, "SST-2, loss"),
    Metric("squad", "loss", -1, "SQuAD, loss"),
)


@dataclasses.dataclass(frozen=True)
class Ordering:
    """`better` is better than `worse`, `by` a paper's words."""

    better: str
    worse: str
    by: str


ORDERINGS = (
    Ordering("span_corruption", RANDOM, "pre-trained >> random (T5, table 1)"),
    Ordering("iid_denoising", "prefix_lm", "denoising > language modelling (T5, table 2)"),
    Ordering("span_corruption", "iid_denoising", "span corruption >= i.i.d. denoising (T5, table 7)"),
    Ordering("ul2", "span_corruption", "UL2's mixture > span corruption (UL2, table 2)"),
)


@dataclasses.dataclass(frozen=True)
class Job:
    start: str
    task: str
    seed: int
    pretrain_steps: int
    finetune_steps: int = 0

    @property
    def pretrained(self) -> str:
        return f"{self.start}-{self.seed}-{self.pretrain_steps}"

    @property
    def name(self) -> str:
        return self.pretrained if self.task == PRETRAIN else f"{self.pretrained}-{self.task}-{self.finetune_steps}"


def jobs(seeds: Sequence[int], pretrain_steps: int, finetune_steps: int) -> Iterator[list[Job]]:
    """Yields lists of jobs that do not need each other, but may need those before them; seed by seed."""
    for seed in seeds:
        # The longest first: two of them side by side end together.
        yield [Job(start, PRETRAIN, seed, pretrain_steps) for start in reversed(OBJECTIVES)]
        yield [
            Job(start, task, seed, pretrain_steps if start in OBJECTIVES else 0, round(finetune_steps * one.share))
            for task, one in TASKS.items()
            for start in (*OBJECTIVES, RANDOM)
        ]


def experiment(job: Job, out: pathlib.Path) -> study.Experiment:
    """The run of a job: a recipe that there is, the study's model, and what they leave open."""
    if job.task == PRETRAIN:
        one, files = OBJECTIVES[job.start], (study.MODEL, "study/pretrain.gin")  # its schedule: linear, from 0.02
        options: dict[str, Any] = {
            "TRAIN_STEPS": job.pretrain_steps,
            "BATCH_SIZE": one.rows,
            "EVAL_BATCH_SIZE": 16,
            "EVAL_STEPS": 4,
        }
    else:
        one, files = TASKS[job.task], (study.MODEL,)
        options = {
            "INITIAL_CHECKPOINT_PATH": None if job.start == RANDOM else str(out / job.pretrained),
            "TRAIN_STEPS": job.finetune_steps,
            "BATCH_SIZE": 4,
            "LEARNING_RATE": 0.003,
            "EVAL_BATCH_SIZE": 32,
            "EVAL_STEPS": one.eval_steps,
            "EVAL_EXAMPLES": one.eval_examples,
            "MAX_DECODE_LENGTH": 8,
        }
    if one.name is not None:
        options["MIXTURE_OR_TASK_NAME"] = one.name
    options |= {
        "TASK_FEATURE_LENGTHS": dict(zip(("inputs", "targets"), one.lengths, strict=True)),
        "RANDOM_SEED": job.seed,
        "EVAL_PERIOD": 0,
        "CHECKPOINT_PERIOD": options["TRAIN_STEPS"],
        "KEEP_LAST": 1,
    }
    return study.Experiment(job.name, (one.recipe, *files), options)


def prepare(out: pathlib.Path, corpora: pathlib.Path) -> pathlib.Path:
    """Makes the study's text and its vocabulary; returns a folder of corpora in which the text takes C4's place."""
    study.prepare(out)
    data = out / "data"
    (data / "c4").mkdir(parents=True, exist_ok=True)
    for split in study.SPLITS.values():
        file = data / "c4" / f"c4-{split}.00000-of-00001.json.gz"
        if not file.exists():
            partial = file.with_suffix(".partial")
            with (out / "corpus" / f"{split}.jsonl").open("rb") as text, gzip.open(partial, "wb") as compressed:
                shutil.copyfileobj(text, compressed)
            partial.rename(file)
    for name in ("glue", "squad", "vocab"):
        if not (data / name).is_symlink():
            (data / name).symlink_to((corpora / name).absolute())
    return data


def read_run(folder: pathlib.Path) -> dict[str, Any]:
    """Metrics after the last step, mean tokens of a step, its median seconds, and the minutes of the whole process."""
    rows = metric_logger.read_metrics(folder)
    train = [row for row in rows if row["split"] == "train"]
    last = [row for row in rows if row["split"] == "validation" and "task" in row][-1]
    seconds = [row["seconds_per_step"] for row in train if "seconds_per_step" in row]  # the first of a start has none
    return {
        "metrics": {name: last[name] for name in ("loss", "accuracy") if name in last},
        "input_tokens": statistics.fmean(row["input_tokens"] for row in train),
        "target_tokens": statistics.fmean(row["target_tokens"] for row in train),
        "seconds_per_step": statistics.median(seconds) if seconds else math.nan,
        "minutes": float((folder / study.DONE).read_text()) / 60,
    }


# The table.


def verdict(sign: int, better: Sample, worse: Sample) -> tuple[float, float, float, str]:
    """Returns the difference of the means, better minus worse, its standard error, Welch's p, and a word on it.

    With one seed on a side, or no spread at all, p is NaN.

    Args:
      sign: 1 where larger is better, -1 where smaller is.
    """
    apart, error = difference(better, worse)
    p = math.nan
    if error > 0:  # False if NaN
        _, p = map(float, scipy.stats.ttest_ind(better.values, worse.values, equal_var=False))
    if not p < 0.05:
        return apart, error, p, "undecided"
    return apart, error, p, "holds" if apart * sign > 0 else "does not hold"


def tables(results: Mapping[Job, Mapping[str, Any]], budget: tuple[int, int]) -> str:
    """Markdown: a row for each ordering and metric, then one for each start; of the results of one budget."""
    pretrain_steps, finetune_steps = budget
    wanted = {job for seed in {job.seed for job in results} for some in jobs([seed], *budget) for job in some}
    chosen = {job: row for job, row in results.items() if job in wanted}

    def rows(start: str, task: str) -> list[Mapping[str, Any]]:
        return [row for job, row in sorted(chosen.items(), key=_seed) if (job.start, job.task) == (start, task)]

    def sample(start: str, metric: Metric) -> Sample:
        return Sample(tuple(row["metrics"][metric.name] for row in rows(start, metric.task)))

    lines = [
        f"{pretrain_steps} steps of pre-training, {finetune_steps} of fine-tuning. Means over seeds (how many); "
        "difference ± its standard error; p by Welch's t-test.",
        "",
        "| ordering | measure | the one | the other | difference | p | verdict |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for ordering, metric in itertools.product(ORDERINGS, METRICS):
        samples = {name: sample(name, metric) for name in (ordering.better, ordering.worse)}
        if not all(one.values for one in samples.values()):
            continue
        apart, error, p, word = verdict(metric.sign, *samples.values())
        cells = [f"{name} {one.mean:.4g} ({len(one.values)})" for name, one in samples.items()]
        cells += [f"{apart:+.3f} ± {error:.3f}", f"{p:.3f}", word]
        lines.append(f"| {ordering.by} | {metric.title} | {' | '.join(cells)} |")
    lines += [
        "",
        "Means of each start: tokens and seconds of a step of pre-training, its own loss on C4; minutes of each run.",
        "",
        "| start | input tokens | target tokens | seconds | loss | pre-training, minutes | SST-2 | SQuAD |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for start in (*OBJECTIVES, RANDOM):
        own = rows(start, PRETRAIN)
        cells = [_mean((row[name] for row in own), digits) for name, digits in COSTS.items()]
        cells.append(_mean((row["metrics"]["loss"] for row in own), 3))
        cells += [_mean((row["minutes"] for row in rows(start, task)), 1) for task in (PRETRAIN, *TASKS)]
        lines.append(f"| {start} | {' | '.join(cells)} |")
    total = sum(row["minutes"] for row in chosen.values())
    return "\n".join([*lines, "", f"{len(chosen)} runs, {total:.0f} minutes one after the other."])


COSTS = {"input_tokens": 0, "target_tokens": 0, "seconds_per_step": 2}  # with digits


def _seed(item: tuple[Job, Any]) -> int:
    return item[0].seed


def _mean(values: Iterable[float], digits: int) -> str:
    numbers = list(values)
    return f"{statistics.fmean(numbers):,.{digits}f}" if numbers else ""


# The command.


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "orderings")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--pretrain_steps", type=int, default=350)
    parser.add_argument("--finetune_steps", type=int, default=240, help="of SST-2; SQuAD has two thirds")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on its part of the cores")
    parser.add_argument("--table", action="store_true", help="only print the table of the results so far")
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    results = Results(out / "results.jsonl", Job)
    budget = (args.pretrain_steps, args.finetune_steps)
    if args.table:
        print(tables(results.read(), budget))
        return 0
    corpora = os.environ.get("T5X_LITE_DATA_DIR")
    if not corpora:
        print("orderings: set T5X_LITE_DATA_DIR to the folder that holds c4/, glue/ and squad/", file=sys.stderr)
        return 2
    try:
        os.environ["T5X_LITE_DATA_DIR"] = str(prepare(out, pathlib.Path(corpora)))
        everything = [job for independent in jobs(args.seeds, *budget) for job in independent]
        commands = [study.flags(experiment(job, out), out) for job in everything]
        lines = [shlex.join(["python", "run.py", *flags]) for flags in commands]
        (out / "commands.txt").write_text("\n".join(lines) + "\n")
        done = results.read()
        for independent in jobs(args.seeds, *budget):
            todo = {job.name: job for job in independent if job not in done}
            experiments = [experiment(job, out) for job in todo.values()]
            for name in study.side_by_side(experiments, out, args.jobs):
                results.add(todo[name], read_run(out / name))
                if todo[name].task != PRETRAIN:
                    shutil.rmtree(out / name / "checkpoints")
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"orderings: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("orderings: interrupted; the same command resumes with what is not done", file=sys.stderr)
        return 128 + signal.SIGINT
    text = tables(results.read(), budget)
    (out / "orderings.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so what it has started ends
    sys.exit(main())
