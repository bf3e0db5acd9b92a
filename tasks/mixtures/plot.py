"""Plot one mixture under every strategy side by side. Must not import: SeqIO, data files."""

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks import mixtures

_COLOURS = {"equal": "#64748b", "temperature": "#0f766e", "proportional": "#1d4ed8"}
_CHOSEN = "#c2410c"
Panel = tuple[str, str, dict[str, float]]  # title, colour, share by task


def panels(examples: Mapping[str, int]) -> list[Panel]:
    """Return equal, temperature 8, 4, 2 and proportional with growing K: from the flattest to the steepest.

    The first limit K that no task exceeds stands for all larger ones, which would give the same panel.
    """
    columns: list[Panel] = [("equal", _COLOURS["equal"], mixtures.rates(examples, "equal"))]
    for t in (8, 4, 2):
        shares = mixtures.rates(examples, "temperature", mixtures.TEMPERATURE_LIMIT, t)
        columns.append((f"temperature\nT = {t}", _COLOURS["temperature"], shares))
    for k in range(16, 22):
        shares = mixtures.rates(examples, "proportional", 2**k)
        if max(examples.values()) <= 2**k:
            columns.append((f"proportional\nK $\\geq$ $2^{{{k}}}$", _COLOURS["proportional"], shares))
            break
        columns.append((f"proportional\nK = $2^{{{k}}}$", _COLOURS["proportional"], shares))
    return columns


def draw(
    title: str, examples: Mapping[str, int], chosen: Mapping[str, float], steps: int, batch: int, path: str
) -> None:
    """Write a figure (format by the extension of `path`) with a row per task and a column per strategy.

    Args:
      title: title of the figure.
      examples: task -> training examples, without tasks that have none.
      chosen: shares of the requested mixture, which are highlighted.
      steps, batch: number of sampled examples, for the passes over the data under each share.
      path: a local file. Raises OSError or ValueError if it cannot be written.
    """
    columns = panels(examples)
    _mark(columns, chosen)
    tasks = sorted(examples, key=lambda task: -examples[task])
    longest = max(len(task) for task in tasks)
    figure = Figure(
        figsize=(1.0 + 0.085 * longest + 1.22 * len(columns), 1.6 + 0.48 * len(tasks)), layout="constrained"
    )
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    widest = max(max(shares.values()) for _, _, shares in columns)
    for axis, (name, colour, shares) in zip(axes, columns, strict=True):
        _draw_column(axis, name, colour, [shares[task] for task in tasks], widest)
        for y, task in enumerate(tasks):
            _label(axis, y, shares[task], shares[task] * steps * batch / examples[task], widest)
    axes[0].set_yticks(range(len(tasks)), [f"{task}\n{examples[task]:,}" for task in tasks], fontsize=8.5)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"{title} (red), compared with the other strategies\n"
        f"share of the sampled examples; in grey, passes over the task's data in {steps:,} steps of {batch:,} examples",
        fontsize=10.5,
    )
    figure.savefig(path, dpi=150, facecolor="white")


def _mark(columns: list[Panel], chosen: Mapping[str, float]) -> None:
    """Highlight the strategy of the mixture, or insert a column for a mixture of no known strategy."""
    for i, (name, _, shares) in enumerate(columns):
        if all(math.isclose(shares[task], share, rel_tol=1e-6) for task, share in chosen.items()):
            columns[i] = (name, _CHOSEN, shares)
            return
    columns.insert(0, ("this\nmixture", _CHOSEN, dict(chosen)))


def _draw_column(axis: Axes, name: str, colour: str, shares: list[float], widest: float) -> None:
    axis.barh(range(len(shares)), shares, height=0.72, color=colour, alpha=0.85)
    axis.set_title(name, fontsize=9, color=colour, loc="left")
    axis.set_xlim(0, widest * 1.75)  # room for the numbers after the longest bar
    axis.set_xticks([])
    axis.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    axis.spines["left"].set_color("#94a3b8")


def _label(axis: Axes, y: int, share: float, passes: float, widest: float) -> None:
    x = share + widest * 0.04
    axis.text(x, y - 0.02, f"{share:.1%}" if share >= 0.001 else "<0.1%", fontsize=8, va="bottom")
    axis.text(x, y + 0.02, f"{_short(passes)}\N{MULTIPLICATION SIGN}", fontsize=7, va="top", color="#64748b")


def _short(passes: float) -> str:
    return f"{passes:,.0f}" if passes >= 10 else f"{passes:.1f}" if passes >= 1 else f"{passes:.1g}"
