"""How the examples of a task become the rows of a batch: what the data pipeline asks of a model, in SeqIO's term.

Must not know: datasets, tasks, models.
"""

import abc
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np

from t5x_lite.errors import UserError


class FeatureConverter(abc.ABC):
    """Converts examples into rows.

    Attributes:
      features: what a task must have.
      lengths: features to which TASK_FEATURE_LENGTHS gives a length.
      optional_lengths: features to which it may also give one.
      pack: put several examples into a row, where the model can keep them apart.
    """

    features: ClassVar[tuple[str, ...]]
    lengths: ClassVar[tuple[str, ...]]
    optional_lengths: ClassVar[tuple[str, ...]] = ()

    def __init__(self, pack: bool = True):
        self.pack = pack

    @abc.abstractmethod
    def widths(self, lengths: Mapping[str, int], given: Collection[str]) -> dict[str, int]:
        """How many tokens of each feature are used, of the features in `given` that the examples have.

        Raises:
          UserError: a feature is missing.
        """

    def check_lengths(self, lengths: Mapping[str, int]) -> None:
        """Raises UserError if TASK_FEATURE_LENGTHS lacks a feature, has another, or gives no length above 0."""
        needed, optional = set(self.lengths), set(self.optional_lengths)
        if not needed <= set(lengths) <= needed | optional:
            example = {feature: 512 if feature == "inputs" else 114 for feature in sorted(needed)}
            raise UserError(
                f"TASK_FEATURE_LENGTHS={dict(lengths)} must give a length for {' and '.join(sorted(needed))} and "
                f"nothing else{' but inputs' if optional else ''}, such as {example}"
            )
        if not all(isinstance(n, int) and n > 0 for n in lengths.values()):
            raise UserError(f"TASK_FEATURE_LENGTHS={dict(lengths)}: lengths are whole numbers of tokens above 0.")

    def dtype(self, feature: str) -> Any:
        return np.int32

    def padded_to(self, widths: Mapping[str, int]) -> Mapping[str, int] | None:
        """The widths to which examples are padded before `convert`; None: to the longest of a block."""
        return None if self.pack else widths

    def block(self, widths: Mapping[str, int]) -> int:
        """The number of examples that are converted together."""
        return max(widths.values())

    def convert(self, examples: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Rows [R, ...] of N examples, arrays [N, width] padded with 0. Here: the examples as they are."""
        return dict(examples)

    def batch(self, lengths: Mapping[str, int], rows: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of each array of a batch."""
        widths = self.widths(lengths, {*self.features, *self.optional_lengths})
        ones = {feature: np.ones((1, width), self.dtype(feature)) for feature, width in widths.items()}
        return {name: ((rows, *x.shape[1:]), x.dtype) for name, x in self.convert(ones, widths).items()}
