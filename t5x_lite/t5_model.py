"""T5's implementation of `interface.Model`, for encoder-decoder and decoder-only models.

It depends on the network, decoding and loading; it must not depend on tasks, runs or gin.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from t5x_lite.convert.bucket import AnyPath
from t5x_lite.data.feature_converters import DecoderFeatureConverter, EncDecFeatureConverter
from t5x_lite.inference.decode import Decoding
from t5x_lite.inference.predictor import Predictor
from t5x_lite.inference.text_predictor import TextPredictor
from t5x_lite.model import interface, t5
from t5x_lite.model.config import T5Config
from t5x_lite.model.feature_converter import FeatureConverter
from t5x_lite.training.partitioner import Partitioner


def _attention_flops(config: T5Config) -> tuple[int, int]:
    """Return the FLOPs of query, key, value or out, per token; and of logits and weighted sum, per query and key."""
    joined = config.num_heads * config.head_dim
    return 2 * config.d_model * joined, 4 * joined


def layer_flops(config: T5Config, length: int) -> int:
    """Return the FLOPs of the forward pass of self-attention and MLP, for a row of this length."""
    projection, attended = _attention_flops(config)
    mlp = 2 * config.d_model * config.d_ff * (len(config.mlp_activations) + 1)
    return length * (4 * projection + mlp + length * attended)


def stacks_flops(config: T5Config, inputs_length: int, targets_length: int) -> int:
    """Return the FLOPs of the forward pass of encoder and decoder, without logits, for one row."""
    S, T = inputs_length, targets_length
    decoder_layer = layer_flops(config, T)
    if not config.decoder_only:
        projection, attended = _attention_flops(config)
        decoder_layer += T * (2 * projection + S * attended) + S * 2 * projection
    return config.num_encoder_layers * layer_flops(config, S) + config.num_decoder_layers * decoder_layer


@dataclasses.dataclass(frozen=True)
class T5Model:
    head_params = interface.NO_PARAMS
    config: T5Config

    def init(self, key: Key[Array, ""]) -> Any:
        token = jnp.zeros((1, 1), jnp.int32)
        inputs = None if self.config.decoder_only else token
        return self.config.network().init(key, inputs, token)["params"]

    def logits(
        self, params: Any, batch: interface.Batch, dropout_key: Key[Array, ""] | None = None
    ) -> Mapping[str, Float[Array, "B T V"]]:
        return {"": t5.forward(self.config, params, batch, dropout_key)}

    def targets(self, batch: interface.Batch) -> Mapping[str, tuple[Array, Array]]:
        return {"": (batch["decoder_target_tokens"], batch["decoder_loss_weights"])}

    def feature_converter(self, pack: bool) -> FeatureConverter:
        return DecoderFeatureConverter(pack) if self.config.decoder_only else EncDecFeatureConverter(pack)

    def flops(self, batch_size: int, lengths: Mapping[str, int]) -> float:
        c, S, T = self.config, lengths.get("inputs", 0), lengths["targets"]
        if c.decoder_only:
            S, T = 0, S + T  # inputs and targets share a row
        return 3.0 * batch_size * (stacks_flops(c, S, T) + T * 2 * c.d_model * c.vocab_size)

    def predictor(self, partitioner: Partitioner, decoding: Decoding, max_decode_length: int, seed: int) -> Predictor:
        return TextPredictor(self.config, partitioner, decoding, max_decode_length, seed)

    def pretrained(self, params: Any, path: AnyPath, mesh: Any) -> Any:
        from t5x_lite import convert
        from t5x_lite.inference.pretrained import LoadedModel

        return LoadedModel(self.config, params, convert.vocabulary(path), mesh)
