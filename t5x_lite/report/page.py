"""Render a run as a self-contained HTML page: scores, curves, mixture rates, and wrong predictions.

The page has no scripts and loads nothing; its Content-Security-Policy forbids both, whatever a prediction contains.
Takes numbers and rows; must not depend on files, JAX or TensorFlow.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from t5x_lite.report import analysis, curves, predictions
from t5x_lite.report.analysis import Curve, Curves, Row
from t5x_lite.report.curves import number
from t5x_lite.report.predictions import escaped, name
from t5x_lite.report.style import CSS

Baselines = Mapping[str, Mapping[str, float | str]]  # by task and metric; "what" describes them

COMMON = ("loss", "token_accuracy")  # every task has these in addition to its own metrics


@dataclasses.dataclass(frozen=True)
class About:
    """Facts about a run that are not in its records."""

    mixture: str = ""
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)  # share of training, by task
    baselines: Baselines = dataclasses.field(default_factory=dict)
    run: str = ""  # its name, if that differs from the folder's, as for files mirrored to a bucket
    notes: Sequence[str] = ()  # what is to be known of the data
    # "examples", "epochs", "tokens" of an example and "token share" by task; None where it is not known
    details: Mapping[str, Mapping[str, float | None]] = dataclasses.field(default_factory=dict)


def page(
    run: str, train: Curve, tasks: Curves, predicted: Mapping[str, tuple[int, Sequence[Row]]], about: About
) -> str:
    """Return the HTML document.

    Args:
      run: name of the run.
      train, tasks: results of `analysis.curves`.
      predicted: by task, the step and the rows of the predictions to show.
    """
    anchors = {task: f"task-{i}" for i, task in enumerate(predicted)}
    sections = [predictions.section(task, step, rows, anchors[task]) for task, (step, rows) in predicted.items()]
    legend = f'<p class="note">{predictions.LEGEND}</p>' if sections else ""
    parts = {
        "Scores": _scores(tasks, anchors, about.baselines),
        "Curves": _curves(train, tasks),
        f"Mixture {escaped(about.mixture)}": _rates(about.rates, about.details),
        "Notes on the data": "".join(f"<p>{escaped(note)}</p>" for note in about.notes),
        "Predictions": legend + "".join(sections),
    }
    steps = [*train, *(step for named in tasks.values() for curve in named.values() for step in curve)]
    summary = [f"step {max(steps):,}"] if steps else []
    if train:
        summary.append(f"training loss {list(train.values())[-1]:.3f}")
    summary.append(f"{len(tasks)} task{'s' * (len(tasks) != 1)} evaluated")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(run)}</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>{escaped(run)}</h1><p class="note">{" · ".join(summary)}</p></header>
<main>
{"".join(f"<section><h2>{title}</h2>{body}</section>" for title, body in parts.items() if body)}
</main>
</body>
</html>
"""


def _scores(tasks: Curves, anchors: Mapping[str, str], baselines: Baselines) -> str:
    if not tasks:
        return ""
    last = max(step for named in tasks.values() for curve in named.values() for step in curve)
    groups, notes = [], []
    with_baselines = any(metric in named for task, named in tasks.items() for metric in baselines.get(task, ()))
    for task, named in tasks.items():
        baseline = baselines.get(task, {})
        if "what" in baseline:
            notes.append(f"<br>Baseline of {escaped(task)}: {escaped(str(baseline['what']))}.")
        linked = f'<a href="#{anchors[task]}">{name(task)}</a>' if task in anchors else name(task)
        metrics = sorted(named, key=lambda metric: metric in COMMON)  # a task's own metrics come first
        rows = []
        for i, metric in enumerate(metrics):
            curve = named[metric]
            newest, (step, value) = max(curve), analysis.best(metric, curve)
            largest = max(curve.values())
            earlier = f"<small>step {newest:,}</small> " if newest < last else ""
            cells = [
                f'<th scope="rowgroup" rowspan="{len(metrics)}">{linked}</th>' if i == 0 else "",
                f'<th scope="row">{name(metric)}</th>',
                f'<td class="n">{earlier}{_aligned(curve[newest], largest)}</td>',
                f'<td class="n best">{_aligned(value, largest)}</td><td class="n step">{step:,}</td>',
            ]
            if with_baselines:
                score = baseline.get(metric)
                cells.append(f'<td class="n">{"" if score is None else _aligned(float(score), largest)}</td>')
            kind = ' class="aside"' if metric in COMMON else ""
            rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
        groups.append(f"<tbody>{''.join(rows)}</tbody>")
    count = max(len(curve) for named in tasks.values() for curve in named.values())
    heads = ["newest", "best", "at step"] + ["baseline"] * with_baselines
    columns = "".join(f'<th scope="col" class="n">{head}</th>' for head in heads)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Scores"><table class="scores">'
        f"<caption>On validation data. Newest: step {last:,}. Best: of {count} evaluation{'s' * (count != 1)}, each "
        "metric at its own best step, as the T5 paper reports.</caption>"
        f'<thead><tr><th scope="col">task</th><th scope="col">metric</th>{columns}</tr></thead>'
        f'{"".join(groups)}</table></div><p class="note">For losses lower is better, for all other metrics higher.'
        f"{''.join(notes)}</p>"
    )


def _aligned(value: float, largest: float) -> str:
    """Format with a figure space in place of a missing third decimal, so that decimal points are aligned."""
    return number(value, largest) + "\N{FIGURE SPACE}" * (largest >= 10)


def _curves(train: Curve, tasks: Curves) -> str:
    panels = []
    for task, named in tasks.items():
        own = [metric for metric in named if metric not in COMMON] or [m for m in named if m != "loss"]
        panels += [curves.panel(task, metric, named[metric]) for metric in own]
    loss = curves.losses(train, tasks)
    inner = "".join(panels)
    if loss and len(train) > curves.BINS:
        loss += '<p class="note">Training loss: mean and range of neighbouring records.</p>'
    return loss + (f'<div class="panels">{inner}</div>' if inner else "")


def _rates(rates: Mapping[str, float], details: Mapping[str, Mapping[str, float | None]]) -> str:
    if len(rates) < 2:
        return ""
    most = max(rates.values())
    formats = {"examples": "{:,.0f}", "epochs": "{:,.2f}", "tokens": "{:,.1f}", "token share": "{:.1%}"}
    known = [column for column in formats if any(values.get(column) is not None for values in details.values())]

    def cell(task: str, column: str) -> str:
        value = details.get(task, {}).get(column)
        return f'<td class="n">{"" if value is None else formats[column].format(value)}</td>'

    rows = "".join(
        f'<tr><th scope="row">{name(task)}</th><td class="n">{rate:.1%}</td>{"".join(cell(task, c) for c in known)}'
        f'<td class="bar"><div style="width:{rate / most:.2%}"></div></td></tr>'
        for task, rate in sorted(rates.items(), key=lambda item: -item[1])
    )
    heads = "".join(f'<th scope="col" class="n">{column}</th>' for column in known)
    return (
        '<table class="rates"><caption>Share of the training examples drawn</caption><thead><tr>'
        f'<th scope="col">task</th><th scope="col" class="n">share</th>{heads}<td></td></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
