"""Abstract feature converter (SeqIO's term): turns the examples of a task into the rows of a model's batch.

Must not import datasets, tasks or models.
"""

import abc
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np

from t5x_lite.errors import UserError


class FeatureConverter(abc.ABC):
    """Converts examples into rows.

    Attributes:
      features: features that a task must have.
      lengths: features whose length TASK_FEATURE_LENGTHS must give.
      optional_lengths: features whose length TASK_FEATURE_LENGTHS may give.
      pack: pack several examples into a row, if the model supports it.
    """

    features: ClassVar[tuple[str, ...]]
    lengths: ClassVar[tuple[str, ...]]
    optional_lengths: ClassVar[tuple[str, ...]] = ()

    def __init__(self, pack: bool = True):
        self.pack = pack

    @abc.abstractmethod
    def widths(self, lengths: Mapping[str, int], given: Collection[str]) -> dict[str, int]:
        """Return the maximum number of tokens of each feature; `given` names the features that the examples have.

        Raises:
          UserError: a feature is missing.
        """

    def check_lengths(self, lengths: Mapping[str, int]) -> None:
        """Raise UserError if TASK_FEATURE_LENGTHS lacks a feature, has an unknown one, or has a length below 1."""
        needed, optional = set(self.lengths), set(self.optional_lengths)
        if not needed <= set(lengths) <= needed | optional:
            example = {feature: 512 if feature == "inputs" else 114 for feature in sorted(needed)}
            raise UserError(
                f"TASK_FEATURE_LENGTHS={dict(lengths)} must give a length for {' and '.join(sorted(needed))} and "
                f"nothing else{' but inputs' if optional else ''}, such as {example}"
            )
        if not all(isinstance(n, int) and n > 0 for n in lengths.values()):
            raise UserError(f"TASK_FEATURE_LENGTHS={dict(lengths)}: lengths must be whole numbers of tokens above 0.")

    def dtype(self, feature: str) -> Any:
        return np.int32

    def padded_to(self, widths: Mapping[str, int]) -> Mapping[str, int] | None:
        """Return the widths to pad examples to before `convert`; None pads to the longest example of a block."""
        return None if self.pack else widths

    def block(self, widths: Mapping[str, int]) -> int:
        """Return the number of examples that are converted together."""
        return max(widths.values())

    def convert(self, examples: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Return rows [R, ...] of N examples, arrays [N, width] padded with 0; by default, the examples unchanged."""
        return dict(examples)

    def batch(self, lengths: Mapping[str, int], rows: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return the shape and dtype of each array of a batch."""
        widths = self.widths(lengths, {*self.features, *self.optional_lengths})
        ones = {feature: np.ones((1, width), self.dtype(feature)) for feature, width in widths.items()}
        return {name: ((rows, *x.shape[1:]), x.dtype) for name, x in self.convert(ones, widths).items()}
