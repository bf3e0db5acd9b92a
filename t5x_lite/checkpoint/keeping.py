"""Which checkpoints stay: the newest, and the best by one metric. Knows Orbax's form of a policy, and numbers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class KeepLastAndBest:
    """Orbax preservation policy: the last `last` checkpoints and, beside them, the `best` by one metric.

    A checkpoint saved without the metric, or with a NaN, is never among the best. Of equals the earlier one stays.
    """

    last: int | None
    metric: str | None
    best: int
    mode: Literal["max", "min"]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        newest = len(checkpoints) - self.last if self.last is not None else 0
        keep = set(range(max(newest, 0), len(checkpoints)))
        if self.metric is not None:
            values = [(self.value(c.metrics), i) for i, c in enumerate(checkpoints)]
            ranked = sorted((v, i) for v, i in values if not math.isnan(v))
            keep.update(i for _, i in ranked[: self.best])
        return [i in keep for i in range(len(checkpoints))]

    def value(self, metrics: Mapping[str, float] | None) -> float:
        """The metric with its sign turned so that lower is better; NaN where there is none."""
        value = float((metrics or {}).get(self.metric or "", math.nan))
        return -value if self.mode == "max" else value
