"""BERT's feature converters: turn the examples of its tasks into rows. Must not depend on text or datasets."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_lite.model.feature_converter import FeatureConverter


class _BertFeatureConverter(FeatureConverter):
    """Pads the features of tasks/bert.py or tasks/glue_bert.py, one example per row."""

    lengths = ("inputs",)
    scalars = ("random", "label")  # single numbers, not tokens

    def widths(self, lengths: Mapping[str, int], given: Collection[str]) -> dict[str, int]:
        return {feature: 1 if feature in self.scalars else lengths["inputs"] for feature in self.features}

    def padded_to(self, widths: Mapping[str, int]) -> Mapping[str, int]:
        return widths


class PretrainingFeatureConverter(_BertFeatureConverter):
    features = ("inputs", "targets", "segments", "random")


class ClassifierFeatureConverter(_BertFeatureConverter):
    features = ("inputs", "segments", "label")

    def __init__(self, pack: bool = True, regression: bool = False):
        super().__init__(pack)
        self._regression = regression

    def dtype(self, feature: str) -> Any:
        return np.float32 if feature == "label" and self._regression else np.int32


def pair(
    first: Sequence[int], second: Sequence[int] | None, cls: int, sep: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return [CLS] first [SEP], plus second [SEP] if given, of at most `length` tokens, and their segments, 0 and 1.

    As in tasks.glue_bert, the longer of the two (or the second, if equal) loses its last token until they fit.
    """
    if second is not None:
        room = length - 3
        second = [*second[: max(room - len(first), room // 2)], sep]
        first = first[: room + 1 - len(second)]
    first, second = [cls, *first[: length - 2], sep], second or []
    return np.array([*first, *second], np.int32), np.repeat([0, 1], [len(first), len(second)]).astype(np.int32)
