"""Feature converters of T5 and of models with a head for classes, in numpy.

They must not depend on datasets, tasks or models.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from t5x_lite.data import packing
from t5x_lite.errors import UserError
from t5x_lite.model.feature_converter import FeatureConverter


class EncDecFeatureConverter(FeatureConverter):
    """Gives inputs to the encoder and targets to the decoder, as seqio.EncDecFeatureConverter does."""

    features = lengths = ("inputs", "targets")

    def widths(self, lengths: Mapping[str, int], given: Collection[str]) -> dict[str, int]:
        if "inputs" not in given:
            raise UserError("have no inputs: they are for a decoder-only model, such as models/decoder_only.gin")
        return {feature: lengths[feature] for feature in self.features}

    def convert(self, examples: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> dict[str, np.ndarray]:
        inputs, targets = examples["inputs"], examples["targets"]
        return packing.pack(inputs, targets, widths) if self.pack else packing.unpacked(inputs, targets)


class DecoderFeatureConverter(FeatureConverter):
    """Concatenates inputs and targets in one row of a decoder, as seqio.PrefixLMFeatureConverter does.

    Examples without inputs make rows of the targets' length, as with seqio.LMFeatureConverter.
    """

    features = lengths = ("targets",)
    optional_lengths = ("inputs",)

    def widths(self, lengths: Mapping[str, int], given: Collection[str]) -> dict[str, int]:
        return {
            feature: lengths[feature] for feature in ("inputs", "targets") if feature in given and feature in lengths
        }

    def block(self, widths: Mapping[str, int]) -> int:
        return sum(widths.values())

    def convert(self, examples: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> dict[str, np.ndarray]:
        targets = examples["targets"]
        inputs = examples.get("inputs", np.zeros((len(targets), 0), np.int32))
        if self.pack:
            return packing.pack_joined(inputs, targets, sum(widths.values()))
        return packing.joined(inputs, targets)


class RowFeatureConverter(FeatureConverter):
    """Pads examples, one per row."""

    lengths = ("inputs",)
    scalars: ClassVar[tuple[str, ...]]  # features that are single numbers, not tokens

    def widths(self, lengths: Mapping[str, int], given: Collection[str]) -> dict[str, int]:
        return {feature: 1 if feature in self.scalars else lengths["inputs"] for feature in self.features}

    def padded_to(self, widths: Mapping[str, int]) -> Mapping[str, int]:
        return widths


class ClassifierFeatureConverter(RowFeatureConverter):
    """For the tasks of tasks/glue_classes.py: a text or two in a row, and a class or a number."""

    features = ("inputs", "label")
    scalars = ("label",)

    def __init__(self, pack: bool = True, regression: bool = False):
        super().__init__(pack)
        self._regression = regression

    def dtype(self, feature: str) -> Any:
        return np.float32 if feature == "label" and self._regression else np.int32


def pair(
    first: Sequence[int], second: Sequence[int] | None, start: Sequence[int], end: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return `start` first `end`, plus second `end` if given, of at most `length` tokens, and their segments, 0 and 1.

    As in tasks.glue_classes, the longer of the two (or the second, if equal) loses its last token until they fit.
    """
    if second is not None:
        room = length - len(start) - 2
        second = [*second[: max(room - len(first), room // 2)], end]
        first = first[: room + 1 - len(second)]
    first, second = [*start, *first[: length - len(start) - 1], end], second or []
    return np.array([*first, *second], np.int32), np.repeat([0, 1], [len(first), len(second)]).astype(np.int32)
