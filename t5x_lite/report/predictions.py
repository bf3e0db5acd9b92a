"""Render a task's predictions as HTML: a confusion table or other summary, the worst predictions, and samples.

All text from a run goes through `escaped`. Takes rows; must not depend on files, JAX or TensorFlow.
"""

import collections
import html
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from t5x_lite.report import analysis
from t5x_lite.report.analysis import Row

WORST, SAMPLES = 8, 4  # examples per task
LONGEST = 400  # characters shown of a text
LEGEND = "Marked: <del>what the prediction lacks</del> and <ins>what the target lacks</ins>."


def section(task: str, step: int, rows: Sequence[Row], anchor: str) -> str:
    """Return the section of a task: a summary of its predictions at `step`, the worst of them, and samples.

    Args:
      rows: one or more prediction rows.
      anchor: id of the heading.
    """
    predicted = "prediction" in rows[0]
    if labels := analysis.classes(rows):
        summary, body = _classes(rows, labels)
    elif predicted and analysis.numeric(rows):
        summary, body = _numbers(rows)
    elif predicted:
        summary, body = _texts(rows)
    else:
        summary, body = (
            "",
            _examples("Least likely targets", rows, _worst(rows, lambda row: row["score"]), _log_likelihood),
        )
    head = f"{len(rows):,} {'prediction' if predicted else 'scored target'}{'s' * (len(rows) > 1)} at step {step:,}"
    return f'<section><h3 id="{anchor}">{name(task)}</h3><p class="note">{head}{summary}</p>{body}</section>'


Verdict = Callable[[Row], tuple[str, str]]  # the label of an example, and its CSS class: right, wrong or empty


def _classes(rows: Sequence[Row], labels: Sequence[str]) -> tuple[str, str]:
    counts = analysis.confusion(rows, labels)
    wrong = [row for row in rows if row["prediction"] != row["targets"]]

    def verdict(row: Row) -> tuple[str, str]:
        return ("right", "right") if row["prediction"] == row["targets"] else ("wrong", "wrong")

    body = _confusion(rows, labels, counts) + _examples("Mistakes", wrong, _spread(wrong, WORST), verdict)
    right = len(rows) - len(wrong)
    return f"; {right:,} right, {right / len(rows):.1%}", body + _samples(rows, verdict)


def _confusion(rows: Sequence[Row], labels: Sequence[str], counts: np.ndarray) -> str:
    columns = [*labels, "other"] if counts[:, -1].any() else list(labels)
    body = []
    for i, label in enumerate(labels):
        total = counts[i].sum()
        cells = [
            f'<td class="{"hit" if i == j else "miss"}" style="--share:{counts[i, j] / total:.3f}">'
            f"{counts[i, j]:,}</td>"
            for j in range(len(columns))
        ]
        share = f'<td class="sum">{total:,}</td><td class="sum">{counts[i, i] / total:.1%}</td>'
        body.append(f'<tr><th scope="row">{name(label)}</th>{"".join(cells)}{share}</tr>')
    heads = "".join(f'<th scope="col">{name(column)}</th>' for column in (*columns, "all", "right"))
    note = ""
    if counts[:, -1].any():
        others = collections.Counter(row["prediction"] for row in rows if row["prediction"] not in labels)
        frequent = ", ".join(
            f"{escaped(_cut(text, 60)[0]) or '(nothing)'} ({count:,})" for text, count in others.most_common(3)
        )
        note = f'<p class="note">{others.total():,} are not a label; the most frequent: <bdi>{frequent}</bdi>.</p>'
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Confusion table"><table class="confusion">'
        '<caption>Rows: target. Columns: prediction.</caption><thead><tr><th scope="col">target</th>'
        f"{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{note}"
    )


def _numbers(rows: Sequence[Row]) -> tuple[str, str]:
    finite = [distance for distance in map(analysis.distance, rows) if np.isfinite(distance)]
    summary = f"; {len(rows) - len(finite):,} that are not a number"
    if finite:
        summary = f"; mean distance from the target {np.mean(finite):.3g}{summary}"

    def verdict(row: Row) -> tuple[str, str]:
        distance = analysis.distance(row)
        if not np.isfinite(distance):
            return "not a number", "wrong"
        return (f"off by {distance:.2g}", "") if distance else ("right", "right")

    worst = _worst(rows, lambda row: -analysis.distance(row))
    return summary, _examples("Worst", rows, worst, verdict) + _samples(rows, verdict)


def _texts(rows: Sequence[Row]) -> tuple[str, str]:
    f1 = [analysis.f1(row) for row in rows]
    parts = [("good", "with the target's words", sum(x == 1 for x in f1))]
    parts.append(("some", "with some of them", sum(0 < x < 1 for x in f1)))
    parts.append(("none", "with none", sum(x == 0 for x in f1)))
    bar = "".join(f'<div class="{kind}" style="flex:{count} 0 0"></div>' for kind, _, count in parts if count)
    summary = "; " + ", ".join(f"{count:,} {description}" for _, description, count in parts)

    def verdict(row: Row) -> tuple[str, str]:
        value = analysis.f1(row)
        return f"F1 {100 * value:.0f}", "right" if value == 1 else "wrong" if value == 0 else ""

    note = '<p class="note">F1 of words against the target shown; metrics with several answers may score higher.</p>'
    below = [row for row, value in zip(rows, f1, strict=True) if value < 1]
    worst = _examples("Lowest F1", below, _worst(below, analysis.f1), verdict)
    return summary, f'<div class="parts" aria-hidden="true">{bar}</div>{note}{worst}{_samples(rows, verdict)}'


def _log_likelihood(row: Row) -> tuple[str, str]:
    return f"log-likelihood {row['score']:.1f}", ""


# ------------------------------------------------------------------------------------------------------------- examples


def _worst(rows: Sequence[Row], goodness: Callable[[Row], float]) -> Sequence[Row]:
    """Return the worst rows first; ties are ordered by likelihood if known, else sampled at even distances."""

    def order(row: Row) -> tuple[float, float]:
        return goodness(row), row.get("score", 0.0)

    ordered = sorted(rows, key=order)
    if len(ordered) <= WORST:
        return ordered
    last = order(ordered[WORST - 1])
    worse = [row for row in ordered[:WORST] if order(row) < last]
    return worse + list(_spread([row for row in ordered if order(row) == last], WORST - len(worse)))


def _spread(rows: Sequence[Row], count: int) -> Sequence[Row]:
    """Return `count` rows at even distances, or all if there are fewer."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows


def _samples(rows: Sequence[Row], verdict: Verdict) -> str:
    return _examples("Samples", rows, _spread(rows, SAMPLES), verdict)


def _examples(title: str, rows: Sequence[Row], shown: Sequence[Row], verdict: Verdict) -> str:
    if not shown:
        return ""
    items = "".join(_example(row, *verdict(row)) for row in shown)
    return f'<h4>{title} <small>{len(shown)} of {len(rows):,}</small></h4><ol class="examples">{items}</ol>'


def _example(row: Row, label: str, kind: str) -> str:
    if "prediction" in row:
        (target, target_left), (prediction, prediction_left) = _cut(row["targets"]), _cut(row["prediction"])
        lacking, extra = analysis.differences(target, prediction)
        if kind == "right":  # the same number may be written differently
            lacking, extra = [(target, False)], [(prediction, False)]
        parts = [
            ("target", _marked(lacking, "del"), target_left),
            ("prediction", _marked(extra, "ins"), prediction_left),
        ]
    else:
        text, left = _cut(row["targets"])
        parts = [("target", escaped(text), left)]
    parts.insert(0, ("input", _passages(row["inputs"], row["targets"]), 0))
    body = "".join(
        f'<dt>{part}</dt><dd class="{part}" dir="auto">{text or "<small>(nothing)</small>"}{_rest(left)}</dd>'
        for part, text, left in parts
    )
    return f'<li><p class="verdict {kind}">{label}</p><dl>{body}</dl></li>'


def _marked(pieces: analysis.Pieces, tag: str) -> str:
    """Wrap each run of marked pieces in one element, without its trailing space."""
    elements = []
    for marked, run in itertools.groupby(pieces, key=lambda piece: piece[1]):
        text = "".join(token for token, _ in run)
        bare = text.rstrip()
        elements.append(f"<{tag}>{escaped(bare)}</{tag}>{escaped(text[len(bare) :])}" if marked else escaped(text))
    return "".join(elements)


def _cut(text: str, longest: int = LONGEST) -> tuple[str, int]:
    """Return the beginning of a text, and the number of characters left out."""
    return (text, 0) if len(text) <= longest else (text[:longest], len(text) - longest)


def _passages(text: str, target: str) -> str:
    """Return the beginning of a long input and the passage around the target, or the end if it is not in the input."""
    if len(text) <= LONGEST:
        return escaped(text)
    half = LONGEST // 2
    first = text.rfind(" ", 0, half) + 1 or half
    position = text.find(target, first) if target else -1
    begin, end = (position - half // 2, position + half // 2) if position >= 0 else (len(text) - half, len(text))
    begin = max(first, text.find(" ", begin, begin + half // 4) + 1 or begin)
    end = len(text) if end >= len(text) else max(text.rfind(" ", begin, end), end - half // 4)
    gap = f"{_rest(begin - first)} " if begin > first else ""
    return f"{escaped(text[:first])}{gap}{escaped(text[begin:end])}{_rest(len(text) - end)}"


def _rest(left: int) -> str:
    return f" <small>… {left:,} characters …</small>" if left else ""


_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}


def name(text: str) -> str:
    """Escape the name of a task or metric, with line-break opportunities at underscores."""
    return escaped(text).replace("_", "_<wbr>")


def escaped(text: str) -> str:
    """Escape text for HTML, and show control characters as symbols."""
    return html.escape(text.translate(_CONTROLS))
