"""Evidence beside a plan: figures that others have published, and the measured steps that plans were compared with.

published.json has the figures, which the benchmarks print too. A plan's bounds must never be taken from this module.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_lite.metrics.hardware import Chip
from t5x_lite.model.config import ModelConfig
from t5x_lite.plan import Plan
from t5x_lite.plan.topologies import Topology

PUBLISHED = Path(__file__).with_name("published.json")
NEAR = 0.15  # relative: T5 1.0 base (223 M) stands beside T5 1.1 base (248 M), and 114 targets beside 128
PRETRAINING_LENGTHS = {"inputs": 512, "targets": 114}  # T5's, for figures that give no lengths


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A training step measured on one device, beside its plan. Memory is in GiB, times are in seconds.

    Chips are names in `hardware.CHIPS`. bound: the plan's bound on the step time, None if it was not compared.
    """

    measured_on: str
    planned_for: str
    date: str
    step: str
    planned_memory: float
    measured_memory: float
    bound: float | None = None
    measured_time: float | None = None


# From benchmarks/RESULTS.md. A plan for another chip has never been compared with a run.
COMPARISONS = (
    Comparison("h200", "h100", "2026-11-27", "T5 1.1 base, 128 rows, minimal", 24.1, 24.1, 0.117, 0.193),
    Comparison("h200", "h100", "2026-11-27", "T5 1.1 large, 64 rows, none", 92.3, 87.8),
)


def lines(plan: Plan, topology: Topology, config: ModelConfig, packed: bool) -> list[str]:
    """Return the published figures of the plan's shape and what the plan was compared with, one line each."""
    if not topology.chip.flops:
        return []  # a CPU, for which the plan claims no time
    conditions = plan.lengths | {"packed": "yes" if packed else "no", "dtype": config.dtype}
    figures = published(config, plan.parameters, topology.chip, plan.lengths)
    texts = [figure_line(figure, conditions, topology) for figure in figures]
    return [*(texts or ["published: no figure of this model, chip and lengths"]), compared_line(topology)]


def published(config: ModelConfig, parameters: int, chip: Chip, lengths: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the published figures of models of this shape, on chips of this family, at about these lengths."""
    values = json.loads(PUBLISHED.read_text())
    family = _family(chip)

    def same_shape(figure: Mapping[str, Any]) -> bool:
        shape = values["sizes"].get(figure["size"], {})
        theirs = PRETRAINING_LENGTHS | figure["conditions"]
        return (
            bool(shape)
            and all(getattr(config, name, None) == size for name, size in shape.items() if name != "parameters")
            and _near(parameters, shape["parameters"])
            and family in figure["hardware"].lower().split()
            and all(_near(lengths.get(feature, 0), theirs[feature]) for feature in PRETRAINING_LENGTHS)
        )

    return [figure for figure in values["training"] if same_shape(figure)]


def figure_line(figure: Mapping[str, Any], conditions: Mapping[str, Any], topology: Topology) -> str:
    """Return a published figure with its conditions, its source, and those of the plan's `conditions` that differ."""
    sequences, tokens = figure.get("per_device"), figure.get("tokens_per_device")
    rate = f"{sequences:,} sequences/s" if sequences else f"{tokens:,} tokens/s"
    counted = " by our count" if figure["mfu_by"] == "us" else ""
    theirs = figure["conditions"]
    text = ", ".join(f"{name} {value}" for name, value in theirs.items()) or "conditions not given"
    here = [f"{name} {value}" for name, value in conditions.items() if theirs.get(name, value) != value]
    if topology.chip.name.partition("-")[0] != _family(topology.chip):
        here.append(topology.chip.name.upper())
    if len(topology.devices) != figure["devices"]:
        here.append(f"{len(topology.devices)} device(s)")
    return (
        f"published: {figure['what']}, {figure['devices']} x {figure['hardware']}: {rate} a device, "
        f"MFU {figure['mfu']:.0%}{counted} ({text}; {figure['source']})"
        f"{'; here: ' + ', '.join(here) if here else ''}"
    )


def compared_line(topology: Topology) -> str:
    """Return a line that says how far plans for this chip were right where they were compared with a run."""
    chip = topology.chip
    comparisons = [c for c in COMPARISONS if chip.name in (c.measured_on, c.planned_for)]
    if not comparisons or not topology.real:
        name = f"{chip.platform.upper()} {chip.name}"
        return f"compared: never with a run on a {name}; memory and time are the compiler's word and published rates"
    first = comparisons[0]
    error = max(abs(c.planned_memory / c.measured_memory - 1) for c in comparisons)
    ratios = [c.measured_time / c.bound for c in comparisons if c.measured_time and c.bound]
    several = "" if len(topology.devices) == 1 else "; never on several devices"
    return (
        f"compared: plans for one {first.planned_for.upper()} with one {first.measured_on.upper()} ({first.date}): "
        f"memory within {math.ceil(error * 100)} %, the step took {max(ratios):.2f} times the bound{several}"
    )


def _near(value: int, other: int) -> bool:
    return abs(value - other) <= NEAR * other


def _family(chip: Chip) -> str:
    """Return the chips that count as one: all A100s; H100s and the H200, which has the H100's cores."""
    name = chip.name.partition("-")[0]
    return {"h200": "h100"}.get(name, name)
