"""Report on a finished run: scores with baselines, sample predictions, output files and next steps.

A summary is printed, and the full report is MODEL_DIR/report.html (`python -m t5x_lite.report MODEL_DIR` rewrites it).
Reads scores and the files in MODEL_DIR; must not depend on the model, SeqIO or TensorFlow.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from t5x_lite.errors import UserError
from t5x_lite.metrics import metric_logger
from t5x_lite.report import analysis, page
from t5x_lite.report.page import About

Scores = Mapping[str, Mapping[str, float]]  # by task and metric

PREDICTIONS_SHOWN = 3  # per task
WIDTH = 100  # characters of a printed text
PAGE = "report.html"
ABOUT_FILE = "report.json"  # the `About` of the page, for rewriting it


def table(scores: Scores, baselines: page.Baselines) -> str:
    """Return a table of task, metric, score and baseline."""
    rows = [("task", "metric", "score", "baseline")]
    notes = []
    for task, metrics in scores.items():
        baseline = baselines.get(task, {})
        for metric, value in metrics.items():
            rows.append((task, metric, f"{value:.4g}", f"{baseline[metric]:.4g}" if metric in baseline else ""))
        if "what" in baseline:
            notes.append(f"  baseline of {task}: {baseline['what']}")
    if not baselines:
        rows = [row[:3] for row in rows]
    return "\n".join([_aligned(rows), *notes])


def confusions(folder: Path, step: int) -> str:
    """Return the confusion tables (rows: target, columns: prediction) of the classification tasks."""
    tables = []
    for file in sorted((folder / "predictions").glob(f"*-{step}.jsonl")):
        rows = read_predictions(file)
        if labels := analysis.classes(rows):
            counts = analysis.confusion(rows, labels).astype(str)
            head = (f"{file.name.removesuffix(f'-{step}.jsonl')}: target, by prediction", *labels, "other")
            tables.append(_aligned([head, *((label, *row) for label, row in zip(labels, counts, strict=True))]))
    return "\n\n".join(tables)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def write_page(folder: Path, about: About | None = None) -> Path:
    """Write report.html from metrics.jsonl and each task's newest predictions for a step in it.

    Args:
      folder: a local MODEL_DIR.
      about: saved to report.json; None reads it from there.

    Raises:
      MissingFileError, UserError: there are no metrics, or a file is damaged.
    """
    train, tasks = analysis.curves(metric_logger.read_metrics(folder))
    if about is not None:
        (folder / ABOUT_FILE).write_text(json.dumps(dataclasses.asdict(about), indent=1) + "\n", encoding="utf-8")
    elif (folder / ABOUT_FILE).exists():
        about = About(**_parsed((folder / ABOUT_FILE).read_text(encoding="utf-8"), f"{folder / ABOUT_FILE}"))
    predicted = {}
    for task, named in tasks.items():
        steps = sorted({step for curve in named.values() for step in curve}, reverse=True)
        files = ((step, folder / "predictions" / f"{task}-{step}.jsonl") for step in steps)
        step, file = next(((step, file) for step, file in files if file.exists()), (0, None))
        if file is not None and (rows := read_predictions(file)):
            predicted[task] = step, rows
    about = about or About()
    text = page.page(about.run or folder.resolve().name, train, tasks, predicted, about)
    partial = folder / f"{PAGE}.partial"
    partial.write_bytes(text.encode("utf-8", "xmlcharrefreplace"))  # predictions may contain half of a surrogate pair
    return partial.replace(folder / PAGE)


def read_predictions(path: Path) -> list[analysis.Row]:
    """Return the rows that have targets. Raises UserError, with file and line, for invalid JSON."""
    with path.open(encoding="utf-8") as lines:
        rows = [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    return [row for row in rows if "targets" in row]


def _parsed(text: str, location: str) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise UserError(f"{location} is not JSON: {text[:60]!r}; remove it") from None


def after_training(
    folder: Path, scores: Scores, step: int, about: About, next_steps: tuple[str, Sequence[str]], at: str
) -> None:
    """Draw loss.png, write report.html and print the report of a training run that ended at `step`.

    Args:
      at: MODEL_DIR as the user knows it, which may be a bucket where `folder` is a copy.
      next_steps: a description and commands of what to do with the model, apart from more training.
    """
    losses = {f"{task}: baseline": named["loss"] for task, named in about.baselines.items() if "loss" in named}
    picture = metric_logger.plot_losses(folder, {label: float(loss) for label, loss in losses.items()}, about.run)
    if scores:
        print(f"\nAfter {step} steps, on validation data:\n{table(scores, about.baselines)}")
    for task in scores:
        file = folder / "predictions" / f"{task}-{step}.jsonl"
        if file.exists():
            print(f"\n{task}")
            print("\n".join(_shown(file)))
    page = write_page(folder, about)
    description, commands = next_steps
    indented = "\n".join(f"  {command}" for command in commands)
    print(f"""
{at}/{page.name}  scores, curves and predictions, for a browser
{at}/{picture.name}  training and validation loss
{at}/{metric_logger.METRICS_FILE}  every number of the run; `tensorboard --logdir {at}` shows them
{at}/predictions/*.jsonl  all predictions on validation data
{at}/checkpoints/  the model
{at}/config.gin  this run's options, for --gin_file

What next: train on; {description}:
  python run.py --gin_file={at}/config.gin --gin.TRAIN_STEPS={2 * step}
{indented}
""")


def _shown(file: Path) -> list[str]:
    """Return the first inputs, targets and predictions of a file as lines."""
    lines = []
    for row in read_predictions(file)[:PREDICTIONS_SHOWN]:
        lines.append(f"  {_short(row['inputs'])}")
        lines.append(f"    target:     {_short(row['targets'])}\n    prediction: {_short(row.get('prediction', ''))}")
    return lines


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
