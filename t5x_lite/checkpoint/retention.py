"""Which checkpoints stay: the newest, and the best by each of some metrics. Knows Orbax's policies, and numbers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class KeepLastAndBest:
    """Orbax preservation policy: the last `last` checkpoints and, beside them, the `best` by each of `metrics`.

    A checkpoint saved without a metric, or with a NaN, is never among its best. Of equals the earlier one stays.
    """

    last: int | None
    metrics: tuple[str, ...]
    best: int
    mode: Literal["max", "min"]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        newest = len(checkpoints) - self.last if self.last is not None else 0
        keep = set(range(max(newest, 0), len(checkpoints)))
        for metric in self.metrics:
            values = [(self.value(c.metrics, metric), i) for i, c in enumerate(checkpoints)]
            ranked = sorted((v, i) for v, i in values if not math.isnan(v))
            keep.update(i for _, i in ranked[: self.best])
        return [i in keep for i in range(len(checkpoints))]

    def value(self, scores: Mapping[str, float] | None, metric: str) -> float:
        """A metric with its sign turned so that lower is better; NaN where there is none."""
        value = float((scores or {}).get(metric, math.nan))
        return -value if self.mode == "max" else value
