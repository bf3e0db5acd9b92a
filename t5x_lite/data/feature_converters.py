"""The two feature converters of T5, in numpy. They must not depend on datasets, tasks or models."""

from collections.abc import Collection, Mapping

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
