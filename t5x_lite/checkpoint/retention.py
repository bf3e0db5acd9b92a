"""Checkpoint retention: an Orbax policy that keeps the newest checkpoints and the best by each of some metrics."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class KeepLastAndBest:
    """Orbax preservation policy that keeps the `last` newest checkpoints and also the `best` by each of `metrics`.

    A checkpoint whose value of a metric is missing or NaN never counts as best. Ties keep the earlier checkpoint.

    Attributes:
      later_scores: the scores of steps that were saved before their evaluation.
    """

    last: int | None
    metrics: tuple[str, ...]
    best: int
    mode: Literal["max", "min"]
    later_scores: dict[int, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        newest = len(checkpoints) - self.last if self.last is not None else 0
        keep = set(range(max(newest, 0), len(checkpoints)))
        for metric in self.metrics:
            values = [
                (self.value(self.later_scores.get(c.step, c.metrics), metric), i) for i, c in enumerate(checkpoints)
            ]
            ranked = sorted((v, i) for v, i in values if not math.isnan(v))
            keep.update(i for _, i in ranked[: self.best])
        return [i in keep for i in range(len(checkpoints))]

    def value(self, scores: Mapping[str, float] | None, metric: str) -> float:
        """Return a metric with its sign chosen so that lower is better, or NaN if it is missing."""
        value = float((scores or {}).get(metric, math.nan))
        return -value if self.mode == "max" else value
