"""A task's predictions as HTML: a confusion table or what else sums them up, the worst of them, and some of all.

All text that comes from a run goes through `escaped`. Takes rows; must not know files, JAX or TensorFlow.
"""

import collections
import html
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from t5x_lite.report import analysis
from t5x_lite.report.analysis import Row

WORST, SAMPLES = 8, 4  # examples of each task
LONGEST = 400  # characters of a text
LEGEND = "Marked: <del>what the prediction lacks</del> and <ins>what the target lacks</ins>."


def section(task: str, step: int, rows: Sequence[Row], place: str) -> str:
    """What the predictions of a task at a step amount to, the worst of them, and some of all.

    Args:
      rows: one or more.
      place: the id of the heading.
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
    return f'<section><h3 id="{place}">{name(task)}</h3><p class="note">{head}{summary}</p>{body}</section>'


Verdict = Callable[[Row], tuple[str, str]]  # what is said of an example, and its class: right, wrong or none


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
        said = ", ".join(
            f"{escaped(_cut(text, 60)[0]) or '(nothing)'} ({count:,})" for text, count in others.most_common(3)
        )
        note = f'<p class="note">{others.total():,} are no label; the most frequent: <bdi>{said}</bdi>.</p>'
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Confusion table"><table class="confusion">'
        '<caption>Rows: target. Columns: prediction.</caption><thead><tr><th scope="col">target</th>'
        f"{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{note}"
    )


def _numbers(rows: Sequence[Row]) -> tuple[str, str]:
    finite = [distance for distance in map(analysis.distance, rows) if np.isfinite(distance)]
    summary = f"; {len(rows) - len(finite):,} that are no number"
    if finite:
        summary = f"; mean distance from the target {np.mean(finite):.3g}{summary}"

    def verdict(row: Row) -> tuple[str, str]:
        distance = analysis.distance(row)
        if not np.isfinite(distance):
            return "no number", "wrong"
        return (f"off by {distance:.2g}", "") if distance else ("right", "right")

    worst = _worst(rows, lambda row: -analysis.distance(row))
    return summary, _examples("Worst", rows, worst, verdict) + _samples(rows, verdict)


def _texts(rows: Sequence[Row]) -> tuple[str, str]:
    f1 = [analysis.f1(row) for row in rows]
    parts = [("good", "with the target's words", sum(x == 1 for x in f1))]
    parts.append(("some", "with some of them", sum(0 < x < 1 for x in f1)))
    parts.append(("none", "with none", sum(x == 0 for x in f1)))
    bar = "".join(f'<div class="{kind}" style="flex:{count} 0 0"></div>' for kind, _, count in parts if count)
    summary = "; " + ", ".join(f"{count:,} {what}" for _, what, count in parts)

    def verdict(row: Row) -> tuple[str, str]:
        value = analysis.f1(row)
        return f"F1 {100 * value:.0f}", "right" if value == 1 else "wrong" if value == 0 else ""

    note = '<p class="note">F1 of words against the target shown; a metric that knows more answers may be milder.</p>'
    below = [row for row, value in zip(rows, f1, strict=True) if value < 1]
    worst = _examples("Lowest F1", below, _worst(below, analysis.f1), verdict)
    return summary, f'<div class="parts" aria-hidden="true">{bar}</div>{note}{worst}{_samples(rows, verdict)}'


def _log_likelihood(row: Row) -> tuple[str, str]:
    return f"log-likelihood {row['score']:.1f}", ""


# ------------------------------------------------------------------------------------------------------------- examples


def _worst(rows: Sequence[Row], goodness: Callable[[Row], float]) -> Sequence[Row]:
    """The least good first; of equals the least likely where that is known, else some at even distances."""

    def order(row: Row) -> tuple[float, float]:
        return goodness(row), row.get("score", 0.0)

    found = sorted(rows, key=order)
    if len(found) <= WORST:
        return found
    last = order(found[WORST - 1])
    worse = [row for row in found[:WORST] if order(row) < last]
    return worse + list(_spread([row for row in found if order(row) == last], WORST - len(worse)))


def _spread(rows: Sequence[Row], count: int) -> Sequence[Row]:
    """So many of them at even distances."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows


def _samples(rows: Sequence[Row], verdict: Verdict) -> str:
    return _examples("Samples", rows, _spread(rows, SAMPLES), verdict)


def _examples(title: str, among: Sequence[Row], shown: Sequence[Row], verdict: Verdict) -> str:
    if not shown:
        return ""
    items = "".join(_example(row, *verdict(row)) for row in shown)
    return f'<h4>{title} <small>{len(shown)} of {len(among):,}</small></h4><ol class="examples">{items}</ol>'


def _example(row: Row, said: str, kind: str) -> str:
    if "prediction" in row:
        (target, target_left), (came, came_left) = _cut(row["targets"]), _cut(row["prediction"])
        lacking, extra = analysis.differences(target, came)
        if kind == "right":  # in other digits, perhaps
            lacking, extra = [(target, False)], [(came, False)]
        parts = [("target", _marked(lacking, "del"), target_left), ("prediction", _marked(extra, "ins"), came_left)]
    else:
        text, left = _cut(row["targets"])
        parts = [("target", escaped(text), left)]
    parts.insert(0, ("input", _passages(row["inputs"], row["targets"]), 0))
    body = "".join(
        f'<dt>{part}</dt><dd class="{part}" dir="auto">{text or "<small>(nothing)</small>"}{_rest(left)}</dd>'
        for part, text, left in parts
    )
    return f'<li><p class="verdict {kind}">{said}</p><dl>{body}</dl></li>'


def _marked(pieces: analysis.Pieces, tag: str) -> str:
    """Runs of marked pieces within one element, the space behind the last left outside."""
    done = []
    for marked, run in itertools.groupby(pieces, key=lambda piece: piece[1]):
        text = "".join(token for token, _ in run)
        bare = text.rstrip()
        done.append(f"<{tag}>{escaped(bare)}</{tag}>{escaped(text[len(bare) :])}" if marked else escaped(text))
    return "".join(done)


def _cut(text: str, longest: int = LONGEST) -> tuple[str, int]:
    """The beginning of a text, and how many characters are left out."""
    return (text, 0) if len(text) <= longest else (text[:longest], len(text) - longest)


def _passages(text: str, target: str) -> str:
    """Of a long input the beginning, where questions stand, and where the target does; without one, the end."""
    if len(text) <= LONGEST:
        return escaped(text)
    half = LONGEST // 2
    first = text.rfind(" ", 0, half) + 1 or half
    at = text.find(target, first) if target else -1
    begin, end = (at - half // 2, at + half // 2) if at >= 0 else (len(text) - half, len(text))
    begin = max(first, text.find(" ", begin, begin + half // 4) + 1 or begin)
    end = len(text) if end >= len(text) else max(text.rfind(" ", begin, end), end - half // 4)
    gap = f"{_rest(begin - first)} " if begin > first else ""
    return f"{escaped(text[:first])}{gap}{escaped(text[begin:end])}{_rest(len(text) - end)}"


def _rest(left: int) -> str:
    return f" <small>… {left:,} characters …</small>" if left else ""


_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}


def name(text: str) -> str:
    """Of a task or metric: may be broken at its underscores."""
    return escaped(text).replace("_", "_<wbr>")


def escaped(text: str) -> str:
    """For HTML: escaped, control characters shown as pictures of themselves."""
    return html.escape(text.translate(_CONTROLS))
