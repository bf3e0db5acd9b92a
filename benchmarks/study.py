"""`make study`: pre-trains a small T5 on the text at hand, adapts it in every way, and puts the scores side by side.

    python benchmarks/study.py [--out=runs/study] [--only=REGEX] [--seeds=0,1] [--jobs=2]

Every run is `run.py` on gin files of gin_configs/study/ and gin_configs/adapt/, in a folder of its own below --out and
with a log beside it. A run that is there is not done again, and one that was stopped goes on where it was: give the
command again. After each run, --out holds study.md and study.csv (scores of the last and of the best step of each task,
below those of majority, bag of words and a linear head on the encoder's features) and curves.png (each task over the
steps, by proportions of the mixture). --jobs are fine-tuning runs side by side, each on its part of the cores: not for
accelerators.

Needs $T5X_LITE_DATA_DIR. Cost with two cores and --jobs=2: about two and a half hours, 82 minutes of them for
pre-training.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from t5x_lite.metrics import metric_logger  # noqa: E402

Scores = Mapping[str, float]  # of tasks, in percent


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run of run.py: its name is its folder, `options` are gin bindings."""

    name: str
    files: tuple[str, ...]
    options: Mapping[str, object]


def pretraining(out: pathlib.Path) -> Iterator[Experiment]:
    """The runs that all others start from, in their order."""
    corpus = {f"{use}_FILES": str(out / "corpus" / f"{split}.jsonl") for use, split in SPLITS.items()}
    recipe = (MODEL, "study/pretrain.gin")
    yield Experiment("short_rows", (*recipe, "study/short_rows.gin"), corpus)
    start = {"INITIAL_CHECKPOINT_PATH": str(out / "short_rows")}
    yield Experiment("pretrain", recipe, corpus | start)


def finetuning(out: pathlib.Path, seed: int) -> Iterator[Experiment]:
    """All runs of the study with one seed, after those of `pretraining`; none needs another of them."""
    pretrained = str(out / "pretrain")

    def finetuned(name: str, adapt: str = "full", **options: object) -> Experiment:
        files = (MODEL, "study/finetune.gin", f"adapt/{adapt}.gin")
        start = {"INITIAL_CHECKPOINT_PATH": pretrained, "RANDOM_SEED": seed}
        return Experiment(f"{name}-{seed}", files, start | options)

    yield finetuned("full")
    yield finetuned("random_initialisation", INITIAL_CHECKPOINT_PATH=None)
    yield finetuned("equal", MIXTURE_OR_TASK_NAME="study_equal")
    yield finetuned("temperature_2", MIXTURE_OR_TASK_NAME="study_temperature_2")
    yield finetuned("adapters", "adapters")
    yield finetuned("lora", "lora")
    yield finetuned("frozen_encoder", "frozen_encoder")
    yield finetuned("gradual_unfreezing", "gradual_unfreezing")
    yield finetuned("bias_norm", "bias_norm")
    squad = {
        "MIXTURE_OR_TASK_NAME": "squad_v010_allanswers",
        "TASK_FEATURE_LENGTHS": {"inputs": 384, "targets": 32},
        "MAX_DECODE_LENGTH": 24,
        "EVAL_PERIOD": 450,
    }
    yield finetuned("squad", **squad)
    yield finetuned("squad_random_initialisation", INITIAL_CHECKPOINT_PATH=None, **squad)


MODEL = "study/model.gin"
SPLITS = {"TRAIN": "train", "EVAL": "validation"}
DONE = "done"  # of a run that is: how many seconds it took since it was last started
VOCABULARY = "corpus/vocabulary.model"
PIECES = 8092


def flags(experiment: Experiment, out: pathlib.Path) -> list[str]:
    folders = {"MODEL_DIR": str(out / experiment.name), "VOCABULARY": str(out / VOCABULARY)}
    files = [f"--gin_file={file}" for file in experiment.files]
    return [*files, *(f"--gin.{name}={value!r}" for name, value in {**experiment.options, **folders}.items())]


def prepare(out: pathlib.Path, pieces: int = PIECES) -> None:
    """Makes what pre-training needs and is not there yet: text, and a vocabulary of it with so many pieces."""
    text = out / "corpus" / "train.jsonl"
    make(text, "benchmarks/study_corpus.py", text.parent)
    learn = ("-m", "tasks.vocabulary", "train", f"--size={pieces}", "--files", text)
    file = out / vocabulary_file(pieces)
    make(file, *learn, f"--output={file}")


def vocabulary_file(pieces: int) -> str:
    return VOCABULARY if pieces == PIECES else f"corpus/vocabulary-{pieces}.model"


def make(file: pathlib.Path, *command: object) -> None:
    """Runs a Python command that writes `file`, unless it is there."""
    if not file.exists():
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def run(experiment: Experiment, out: pathlib.Path) -> str:
    """Runs it to its end, or does nothing if that has been done, and returns its name.

    Raises RuntimeError where it fails, with the end of its log.
    """
    done, log = out / experiment.name / DONE, out / f"{experiment.name}.log"
    if not done.exists():
        print(f"{experiment.name}: see {log}", flush=True)
        started = time.perf_counter()
        with log.open("a") as file:
            failed = _call([sys.executable, "run.py", *flags(experiment, out)], file)
        if failed:
            raise RuntimeError(f"{experiment.name} ended with {failed}; {log} ends\n{log.read_text()[-2000:]}")
        done.write_text(f"{time.perf_counter() - started:.1f}\n")
    return experiment.name


_running: set[subprocess.Popen] = set()


def _call(command: list[str], log: IO[str]) -> int:
    """Runs a command to its end, or to that of this process, its output in `log`; returns its exit status."""
    with subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process:
        _running.add(process)
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise
        finally:
            _running.discard(process)


def side_by_side(experiments: list[Experiment], out: pathlib.Path, jobs: int) -> Iterator[str]:
    """Runs them, `jobs` at a time, each on its own cores where the system can tie it to them; names as they end."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for job in range(jobs):
        shares.put(cores[job::jobs])

    def take_share() -> None:
        if share := shares.get():
            os.sched_setaffinity(0, share)  # of this thread, and so of what it starts

    with concurrent.futures.ThreadPoolExecutor(jobs, initializer=take_share) as pool:
        running = [pool.submit(run, experiment, out) for experiment in experiments]
        try:
            for one in concurrent.futures.as_completed(running):
                yield one.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                process.terminate()


def read(folder: pathlib.Path) -> dict[str, dict[int, float]]:
    """{task: {step: score}}: the mean of a task's own metrics, as T5 has it for tasks that have two."""
    found: dict[str, dict[int, float]] = {}
    for row in metric_logger.read_metrics(folder) if (folder / metric_logger.METRICS_FILE).exists() else ():
        names = row.keys() - {"step", "split", "task", "loss", "token_accuracy"}
        if row["split"] == "validation" and names:
            found.setdefault(row["task"], {})[row["step"]] = sum(row[name] for name in names) / len(names)
    return found


def trained(folder: pathlib.Path) -> int | str:
    """How many parameters a run trains, from its metrics, which say so where it is not all."""
    counts = (row["trainable_params"] for row in metric_logger.read_metrics(folder) if "trainable_params" in row)
    return next(map(int, counts), "all")


def write_tables(out: pathlib.Path, baselines: Mapping[str, Scores]) -> None:
    """study.csv and study.md: a line a run, a column a task; the score at the last step, and in brackets the best.

    The average is of the GLUE tasks that the baselines have, at each step that has a score of them all.
    """
    kinds = [_kind(experiment.name) for experiment in finetuning(out, 0)]
    folders = [file.parent for file in out.glob(f"*/{DONE}") if _kind(file.parent.name) in kinds]
    folders.sort(key=lambda folder: (kinds.index(_kind(folder.name)), folder.name))
    rows = {name: {task: {0: score} for task, score in row.items()} for name, row in baselines.items()}
    rows |= {folder.name: scores for folder in folders if (scores := read(folder))}
    glue = list(dict.fromkeys(task for row in baselines.values() for task in row))
    for scores in rows.values():
        steps = set.intersection(*(set(scores.get(task, ())) for task in glue))
        if steps:
            scores["average"] = {step: sum(scores[task][step] for task in glue) / len(glue) for step in steps}
    tasks = list(dict.fromkeys(task for scores in rows.values() for task in scores))
    found = {name: {task: (at[max(at)], max(at.values())) for task, at in row.items()} for name, row in rows.items()}
    counts = {name: "" if name in baselines else trained(out / name) for name in rows}
    with (out / "study.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["run", "trained", *(f"{task}/{which}" for task in tasks for which in ("last", "best"))])
        for name, cells in found.items():
            table.writerow([name, counts[name], *(x for task in tasks for x in cells.get(task, ("", "")))])
    short = [re.sub(r"^glue_|_v\d+.*$", "", task) for task in tasks]
    lines = [f"| run | trained | {' | '.join(short)} |", f"| --- | {'---: | ' * (len(tasks) + 1)}".rstrip()]
    for name, cells in found.items():
        shown = (f"{cells[task][0]:.1f} ({cells[task][1]:.1f})" if task in cells else "" for task in tasks)
        count = counts[name]
        lines.append(f"| {name} | {f'{count:,}' if isinstance(count, int) else count} | {' | '.join(shown)} |")
    (out / "study.md").write_text("\n".join(lines) + "\n")


def _kind(name: str) -> str:
    """What a run's folder is called without its seed."""
    return re.sub(r"-\d+$", "", name)


def draw(out: pathlib.Path, baselines: Mapping[str, Scores]) -> None:
    """curves.png: a panel a task, a line for each seed of each proportion of the mixture, and the baselines' scores."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds = {"full": "proportional", "temperature_2": "temperature 2", "equal": "equal"}
    kinds |= {"random_initialisation": "proportional, not pre-trained"}
    lines = [
        (label, f"C{colour}.-", read(file.parent))
        for colour, (kind, label) in enumerate(kinds.items())
        for file in sorted(out.glob(f"{kind}-*/{metric_logger.METRICS_FILE}"))
    ]
    tasks = list(dict.fromkeys(task for row in baselines.values() for task in row))
    figure, axes = pyplot.subplots(2, -(-len(tasks) // 2), figsize=(11, 6), sharex=True, layout="constrained")
    for task, ax in zip(tasks, axes.flat, strict=False):
        for name, style in (("majority", ":"), ("bag_of_words", "--")):
            ax.axhline(baselines[name][task], color="grey", linestyle=style, label=name.replace("_", " "))
        for label, style, scores in lines:
            steps = sorted(scores.get(task, ()))
            ax.plot(steps, [scores[task][step] for step in steps], style, label=label)
        ax.set_title(task)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))  # the seeds of a kind have one label
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=6, frameon=False)
    figure.supxlabel("steps")
    figure.supylabel("score on all dev rows")
    figure.savefig(out / "curves.png", dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "study")
    parser.add_argument("--only", default="", help="do the runs whose names this regular expression is found in")
    parser.add_argument("--seeds", default="0", help="of fine-tuning, with commas")
    parser.add_argument("--jobs", type=int, default=1, help="fine-tuning runs at a time")
    asked = parser.parse_args()
    if not os.environ.get("T5X_LITE_DATA_DIR"):
        print("study: set T5X_LITE_DATA_DIR to the folder that holds c4/, glue/ and squad/", file=sys.stderr)
        return 2
    try:
        study(asked.out.resolve(), asked.only, [int(seed) for seed in asked.seeds.split(",")], asked.jobs)
    except RuntimeError as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    return 0


def study(out: pathlib.Path, only: str, seeds: list[int], jobs: int) -> None:
    """Does what is not done yet of the runs whose names `only` is found in, and prints the table of all that is."""
    prepare(out)
    make(out / "baselines.json", "benchmarks/study_baselines.py", out / "baselines.json")
    baselines: dict[str, Scores] = json.loads((out / "baselines.json").read_text())
    for one in pretraining(out):
        if re.search(only, one.name):
            run(one, out)
    if (out / "pretrain" / DONE).exists():
        heads = out / "features.json"
        make(heads, "benchmarks/study_features.py", out / "pretrain", out / VOCABULARY, heads)
        baselines |= json.loads(heads.read_text())
    chosen = [one for seed in seeds for one in finetuning(out, seed) if re.search(only, one.name)]
    for name in side_by_side(chosen, out, jobs):
        print(f"{name}: done", flush=True)
        write_tables(out, baselines)
        draw(out, baselines)
    write_tables(out, baselines)
    print((out / "study.md").read_text())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so what it has started ends
    sys.exit(main())
