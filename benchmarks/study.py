"""`make study`: pre-trains a small T5 on the text at hand, adapts it in every way, and puts the scores side by side.

    python benchmarks/study.py [--out=runs/study] [--only=REGEX] [--seeds=0,1]

Every run is `run.py` on gin files of gin_configs/study/ and gin_configs/adapt/, in a folder of its own below --out. A
run that is there is not done again, and one that was stopped goes on where it was: give the command again. Afterwards,
and after each run, --out holds study.md and study.csv (scores of the last and of the best step of each task, with
majority and bag-of-words baselines) and curves.png (each task over the steps, by proportions of the mixture).

Needs $T5X_LITE_DATA_DIR. Cost with two cores: about three hours, half of them for pre-training.
"""

import argparse
import csv
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Scores = Mapping[str, float]  # of tasks, in percent


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run of run.py: its name is its folder, `options` are gin bindings."""

    name: str
    files: tuple[str, ...]
    options: Mapping[str, object]


def experiments(out: pathlib.Path, seed: int) -> Iterator[Experiment]:
    """All runs of the study with one seed, each after those that it starts from."""
    pretrained = str(out / "pretrain")
    corpus = {f"{use}_FILES": str(out / "corpus" / f"{split}.jsonl") for use, split in SPLITS.items()}
    if not seed:
        yield Experiment("pretrain", ("study/pretrain.gin",), corpus)

    def finetuned(name: str, adapt: str = "full", **options: object) -> Experiment:
        files = ("study/finetune.gin", f"adapt/{adapt}.gin")
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
    squad = {"MIXTURE_OR_TASK_NAME": "squad_v010_allanswers", "MAX_DECODE_LENGTH": 24, "EVAL_PERIOD": 150}
    yield finetuned("squad", **squad)
    yield finetuned("squad_random_initialisation", INITIAL_CHECKPOINT_PATH=None, **squad)


SPLITS = {"TRAIN": "train", "EVAL": "validation"}


def flags(experiment: Experiment, out: pathlib.Path) -> list[str]:
    options = {**experiment.options, "MODEL_DIR": str(out / experiment.name)}
    files = [f"--gin_file={file}" for file in ("study/model.gin", *experiment.files)]
    return [*files, *(f"--gin.{name}={value!r}" for name, value in options.items())]


def run(experiment: Experiment, out: pathlib.Path) -> None:
    """Runs it to its end, or does nothing if that has been done; raises CalledProcessError where it fails."""
    if (out / experiment.name / "done").exists():
        return
    print(f"\n== {experiment.name}", flush=True)
    subprocess.run([sys.executable, "run.py", *flags(experiment, out)], cwd=ROOT, check=True)
    (out / experiment.name / "done").touch()


def read(folder: pathlib.Path) -> dict[str, dict[int, float]]:
    """{task: {step: score}}: the mean of a task's own metrics, as T5 has it for tasks that have two."""
    found: dict[str, dict[int, float]] = {}
    if (folder / "metrics.jsonl").exists():
        for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
            names = row.keys() - {"step", "split", "task", "loss", "token_accuracy"}
            if row["split"] == "validation" and names:
                found.setdefault(row["task"], {})[row["step"]] = sum(row[name] for name in names) / len(names)
    return found


def trained(folder: pathlib.Path) -> int | None:
    """How many parameters a run trains, from its metrics."""
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        if (count := json.loads(line).get("trainable_params")) is not None:
            return int(count)
    return None


def write_tables(out: pathlib.Path, baselines: Mapping[str, Scores]) -> None:
    """study.csv and study.md: a line a run, a column a task; the score at the last step, and in brackets the best."""
    runs = {folder.name: read(folder) for folder in sorted(out.iterdir(), key=lambda path: path.stat().st_ctime)}
    runs = {name: scores for name, scores in runs.items() if scores and (out / name / "done").exists()}
    tasks = list(dict.fromkeys(task for scores in (*baselines.values(), *runs.values()) for task in scores))
    rows: list[tuple[str, int | None, dict[str, tuple[float, float]]]] = []
    for name, row in baselines.items():
        rows.append((name, None, {task: (score, score) for task, score in row.items()}))
    for name, scores in runs.items():
        cells = {task: (steps[max(steps)], max(steps.values())) for task, steps in scores.items()}
        rows.append((name, trained(out / name), cells))
    with (out / "study.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["run", "trained", *(f"{task}/{which}" for task in tasks for which in ("last", "best"))])
        for name, count, cells in rows:
            table.writerow([name, count, *(x for task in tasks for x in cells.get(task, ("", "")))])
    short = [re.sub(r"^glue_|_v\d+.*$", "", task) for task in tasks]
    lines = [f"| run | trained | {' | '.join(short)} |", f"| --- | {'---: | ' * (len(tasks) + 1)}".rstrip()]
    for name, count, cells in rows:
        shown = (f"{cells[task][0]:.1f} ({cells[task][1]:.1f})" if task in cells else "" for task in tasks)
        lines.append(f"| {name} | {'' if count is None else f'{count:,}'} | {' | '.join(shown)} |")
    (out / "study.md").write_text("\n".join(lines) + "\n")


def draw(out: pathlib.Path, seed: int) -> None:
    """curves.png: a panel a task, a line for each proportion of the mixture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    mixed = {name: read(out / f"{name}-{seed}") for name in ("full", "temperature_2", "equal", "random_initialisation")}
    tasks = [task for task in dict.fromkeys(task for scores in mixed.values() for task in scores) if "glue" in task]
    if not tasks:
        return
    figure, axes = pyplot.subplots(2, -(-len(tasks) // 2), figsize=(11, 6), sharex=True, layout="constrained")
    for task, ax in zip(tasks, axes.flat, strict=False):
        for name, scores in mixed.items():
            if task in scores:
                steps = sorted(scores[task])
                label = "proportional" if name == "full" else name.replace("_", " ")
                ax.plot(steps, [scores[task][step] for step in steps], marker="o", markersize=3, label=label)
        ax.set_title(task)
        ax.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(frameon=False)
    figure.supxlabel("steps")
    figure.savefig(out / "curves.png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "study")
    parser.add_argument("--only", default="", help="do the runs whose names this regular expression is found in")
    parser.add_argument("--seeds", default="0", help="of fine-tuning, with commas")
    asked = parser.parse_args()
    if not os.environ.get("T5X_LITE_DATA_DIR"):
        print("study: set T5X_LITE_DATA_DIR to the folder that holds c4/, glue/ and squad/", file=sys.stderr)
        return 2
    out = asked.out.resolve()
    if not (out / "corpus" / "validation.jsonl").exists():
        subprocess.run([sys.executable, "benchmarks/study_corpus.py", out / "corpus"], cwd=ROOT, check=True)
    if not (out / "baselines.json").exists():
        subprocess.run([sys.executable, "benchmarks/study_baselines.py", out / "baselines.json"], cwd=ROOT, check=True)
    baselines = json.loads((out / "baselines.json").read_text())
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    for experiment in (experiment for seed in seeds for experiment in experiments(out, seed)):
        if re.search(asked.only, experiment.name):
            run(experiment, out)
            write_tables(out, baselines)
            draw(out, seeds[0])
    print((out / "study.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
