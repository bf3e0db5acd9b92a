"""Plans as rows of a Markdown table, from the values in plan.json: plans read from files print as new ones do."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from t5x_lite.metrics.hardware import GIB
from t5x_lite.plan import Plan

COLUMNS = (
    "parameters",
    "topology",
    "batch",
    "mesh",
    "remat",
    "micro-batches",
    "memory a device",
    "step at least",
    "sequences/s a device at most",
    "MFU at most",
    "bound by",
)
COLUMNS_OF_ONE_RUN = COLUMNS[2:]  # all plans have the same model and topology


def values(plan: Plan) -> dict[str, Any]:
    """Return the plan as plan.json has it."""
    return dataclasses.asdict(plan) | {"fits": plan.fits}


def markdown(plans: Iterable[Mapping[str, Any]], columns: tuple[str, ...] = COLUMNS) -> str:
    """Return a table of the values of plans, a row each, with its columns aligned."""
    lines = [columns, *([row(plan)[column] for column in columns] for plan in plans)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(f'{cell:{width}}' for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def row(plan: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of a plan by their columns; a cell is empty if its value is unknown."""
    capacity = f" of {plan['capacity'] / GIB:.1f}" if plan["capacity"] else ""
    excess = ": does not fit" if plan["fits"] is False else ""
    times = {bound: time for bound, time in plan["times"].items() if time is not None}
    seconds = plan["step_seconds"]
    rate = plan["batch_size"] / seconds / plan["devices"] if seconds else None
    cells = (
        f"{plan['parameters'] / 1e6:,.0f} M",
        plan["topology"],
        str(plan["batch_size"]),
        ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device",
        plan["remat"],
        str(plan["num_microbatches"]),
        f"{plan['memory']['needed'] / GIB:.2f}{capacity} GiB{excess}",
        f"{seconds * 1e3:,.1f} ms" if seconds else "",
        f"{rate:,.1f}" if rate else "",
        f"{plan['mfu']:.0%}" if plan["mfu"] else "",
        max(times, key=lambda bound: times[bound]) if times else "",
    )
    return dict(zip(COLUMNS, cells, strict=True))
