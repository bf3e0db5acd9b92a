"""What a person reads when a run has ended: scores beside baselines, some predictions, where everything is, what next.

It takes scores and the files that a run has left in MODEL_DIR; it must not know the model, SeqIO or TensorFlow.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from t5x_lite import logs

Scores = Mapping[str, Mapping[str, float]]  # by task and metric
Baselines = Mapping[str, Mapping[str, float | str]]  # likewise; "what" says in words what a task's baseline is

PREDICTIONS_SHOWN = 3  # of each task
WIDTH = 100  # characters of a text


def table(scores: Scores, baselines: Baselines) -> str:
    """Lines of task, metric, score and, where there is one, baseline."""
    rows = [("task", "metric", "score", "baseline")]
    notes = []
    for task, metrics in scores.items():
        known = baselines.get(task, {})
        for metric, value in metrics.items():
            rows.append((task, metric, f"{value:.4g}", f"{known[metric]:.4g}" if metric in known else ""))
        if "what" in known:
            notes.append(f"  baseline of {task}: {known['what']}")
    if not baselines:
        rows = [row[:3] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + notes)


def after_training(folder: Path, scores: Scores, step: int, baselines: Baselines, vocabulary: str | None) -> None:
    """Draws loss.png and prints the report of a training run that ended at `step`.

    Args:
      vocabulary: the value of VOCABULARY that the model goes with, where it is not the default.
    """
    losses = {f"{task}: baseline": metrics["loss"] for task, metrics in baselines.items() if "loss" in metrics}
    picture = logs.plot_losses(folder, {label: float(loss) for label, loss in losses.items()})
    if scores:
        print(f"\nAfter {step} steps, on validation data:\n{table(scores, baselines)}")
    for task in scores:
        file = folder / "predictions" / f"{task}-{step}.jsonl"
        if file.exists():
            print(f"\n{task}")
            print("\n".join(_shown(file)))
    config = folder / "config.gin"
    mine = f""" --gin.VOCABULARY="'{vocabulary}'\"""" if vocabulary else ""
    print(f"""
{picture}  training and validation loss
{folder / logs.METRICS_FILE}  every number of the run; `tensorboard --logdir {folder}` shows them
{folder / "predictions"}/*.jsonl  all predictions on validation data
{folder / "checkpoints"}/  the model
{config}  this run's options, to be given to --gin_file again

What next: train on; ask it something, a question a line; or start from it on files of your own:
  python run.py --gin_file={config} --gin.TRAIN_STEPS={2 * step}
  python run.py --gin_file={config} --mode=infer --gin.INFER_INPUT="'questions.txt'"
  python run.py --gin_file={config} --gin.TRAIN_FILES="'my/*.jsonl'" --gin.MODEL_DIR="'runs/mine'" \\
    --gin.INITIAL_CHECKPOINT_PATH="'{folder}'"{mine}
""")


def _shown(file: Path) -> list[str]:
    """The first predictions of a file, an input with what was due and what came."""
    lines = []
    with file.open(encoding="utf-8") as rows:
        for row, _ in zip(rows, range(PREDICTIONS_SHOWN), strict=False):
            example = json.loads(row)
            lines.append(f"  {_short(example['inputs'])}")
            lines.append(
                f"    target:     {_short(example['targets'])}\n    prediction: {_short(example['prediction'])}"
            )
    return lines


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
