"""Draw curves as HTML: an SVG as wide as the page, with tick labels and line names as positioned text.

The SVG is stretched horizontally, so lines use `non-scaling-stroke`, and text is positioned over it by CSS. Dots are
zero-length lines with round caps. Must not depend on files, runs or predictions.
"""

import html
import math
from collections.abc import Sequence

from t5x_lite.report.analysis import Curve, Curves, best, binned

WIDTH = 1000  # of the SVG in user units; its height is in pixels
BINS = 100  # more points of the training loss are drawn as mean and range of bins
COLOURS = 8  # classes c1 ... c8 of the style sheet; c0 is the training loss
SETTLED = 0.04  # the plot is scaled to losses after this fraction of the run; the initial drop is cut off
DOTS = 60  # longer lines have no dots
LABEL = 16  # minimum distance of labels in pixels

Point = tuple[float | int, float]  # step, value
Points = Sequence[Point]


def number(value: float, largest: float) -> str:
    """Format `value` with the decimals of values up to `largest`: 2 for percentages, 3 for losses and shares."""
    return f"{value:,.{2 if largest >= 10 else 3}f}"


def losses(train: Curve, tasks: Curves) -> str:
    """Plot the training loss and each task's validation loss; empty if no loss has two points."""
    validation = {task: named["loss"] for task, named in tasks.items() if len(named.get("loss", ())) > 1}
    lines: list[tuple[str, Points]] = [(task, list(curve.items())) for task, curve in validation.items()]
    classes = [f"c{1 + i % COLOURS}" for i in range(len(lines))]
    band: Points = []
    if len(train) > 1:
        bins = binned(train, BINS)
        lines.insert(0, ("training", [(step, mean) for step, mean, _, _ in bins]))
        classes.insert(0, "c0")
        band = [(step, low) for step, _, low, _ in bins] + [(step, high) for step, _, _, high in reversed(bins)]
    if not lines:
        return ""
    steps = [step for _, points in lines for step, _ in points]
    early = min(steps) + SETTLED * (max(steps) - min(steps))
    top = max(value for _, points in lines for step, value in points if step >= early)
    cut = any(value > top for _, points in lines for _, value in points)
    caption = "Loss, nats per target token" + "<small>the first steps, above this, are cut off</small>" * cut
    return _plot(caption, lines, classes, band, max(300, LABEL * (len(lines) + 1)), 5, top=top)


def panel(task: str, metric: str, curve: Curve) -> str:
    """Draw a small plot of one metric of a task with its best value marked; empty for a single point."""
    if len(curve) < 2:
        return ""
    step, value = best(metric, curve)
    title = f"{html.escape(task)} <b>{html.escape(metric)}</b>"
    note = f"best {number(value, max(curve.values()))} at step {step:,}"
    return _plot(f"{title}<small>{note}</small>", [("", list(curve.items()))], ["c1"], (), 110, 3, (step, value))


def _plot(
    caption: str,
    lines: Sequence[tuple[str, Points]],
    classes: Sequence[str],
    band: Points,
    height: int,
    ticks: int,
    marked: Point | None = None,
    top: float = math.inf,
) -> str:
    """Plot named lines of (step, value) up to the value `top`, labelled with their last value; `caption` is HTML."""
    every = [point for _, points in lines for point in points] + list(band)
    steps, values = zip(*every, strict=True)
    left, right = (0.0 if min(steps) < max(steps) / 4 else float(min(steps))), float(max(steps))
    top = min(top, max(values))
    spread = (top - min(values)) or abs(top) or 1.0
    low, high = min(values) - 0.06 * spread, top + 0.06 * spread

    def x(step: float | int) -> float:
        return WIDTH * (step - left) / ((right - left) or 1)

    def y(value: float) -> float:
        return height * (high - value) / (high - low)

    def path(points: Points) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)

    drawn, text = [], []
    for value, label in _ticks(low, high, max(3, height // 60)):
        drawn.append(f'<path class="grid" d="M0 {y(value):.1f}H{WIDTH}"/>')
        text.append(f'<span class="y" style="top:{y(value):.1f}px">{label}</span>')
    for step, label in _ticks(left, right, ticks, least=1.0):
        text.append(f'<span class="x" style="left:{x(step) / WIDTH:.2%}">{label}</span>')
    if band:
        drawn.append(f'<polygon class="band {classes[0]}" points="{path(band)}"/>')
    for (name, points), style in zip(lines, classes, strict=True):
        drawn.append(f'<polyline class="{style}" points="{path(points)}"/>')
        if len(points) <= DOTS and style != "c0":
            for step, value in points:
                kind = "dot best" if (step, value) == marked else "dot"
                start = f"M{x(step):.1f} {y(value):.1f}h0"
                tooltip = f"{html.escape(name)} step {step:,}: {number(value, top)}"
                drawn.append(f'<path class="{kind} {style}" d="{start}"><title>{tooltip.strip()}</title></path>')
    ends = [points[-1][1] for _, points in lines]
    label_tops = _apart([y(value) for value in ends], height)
    for (name, _), style, value, label_top in zip(lines, classes, ends, label_tops, strict=True):
        label = f"<b>{number(value, top)}</b> {html.escape(name)}".strip()
        text.append(f'<span class="end {style}" style="top:{label_top:.1f}px">{label}</span>')
    spoken = "; ".join(
        f"{name or 'value'} from {points[0][1]:.4g} at step {points[0][0]:,.0f} to {points[-1][1]:.4g} at step "
        f"{points[-1][0]:,.0f}"
        for name, points in lines
    )
    gutter = max(len(name) for name, _ in lines) + 7
    return (
        f'<figure><figcaption>{caption}</figcaption><div class="plot" style="height:{height}px;--gutter:{gutter}ch">'
        f'<svg role="img" aria-label="{html.escape(spoken)}" viewBox="0 0 {WIDTH} {height}" preserveAspectRatio="none">'
        f"{''.join(drawn)}</svg>{''.join(text)}</div></figure>"
    )


def _ticks(low: float, high: float, most: int, least: float = 0.0) -> list[tuple[float, str]]:
    """Return at most `most` + 1 round numbers in the range, at least `least` apart, with labels."""
    if high <= low:
        return [(low, _short(low))]
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = (max(least, unit * times) for times in (1, 2, 5, 10))
    step = next(step for step in steps if math.floor(high / step) - math.ceil(low / step) <= most)
    decimals = max(0, -math.floor(math.log10(step * 1.0001)))
    values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(value, f"{value:.{decimals}f}" if decimals else _short(value)) for value in values]


def _short(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:g}{letter}"
    return f"{value:,.0f}"


def _apart(positions: Sequence[float], height: int) -> list[float]:
    """Move label positions as little as needed to avoid overlaps; results are in the given order, in [0, height]."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = list(positions)
    for before, i in zip([None, *order], order, strict=False):
        moved[i] = max(moved[i], 0.0 if before is None else moved[before] + LABEL)
    limit = float(height)
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - LABEL
    return moved
