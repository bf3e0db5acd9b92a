"""The T5 encoder's implementation of `interface.Model`: texts learn to find their pairs, or their class."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from t5x_lite.convert.bucket import AnyPath
from t5x_lite.data.feature_converters import ClassifierFeatureConverter, EncDecFeatureConverter
from t5x_lite.inference.decode import Decoding
from t5x_lite.inference.predictor import Predictor
from t5x_lite.model import classes, interface
from t5x_lite.model.feature_converter import FeatureConverter
from t5x_lite.t5_encoder import T5EncoderConfig, network
from t5x_lite.t5_encoder.predictors import ClassPredictor, EmbeddingPredictor
from t5x_lite.t5_model import stacks_flops
from t5x_lite.training.partitioner import Partitioner


@dataclasses.dataclass(frozen=True)
class T5EncoderModel:
    config: T5EncoderConfig

    @property
    def head_params(self) -> str:
        heads = "embed|classify" if self.config.num_decoder_layers else "embed|classify|decoder"
        return rf"^({heads})/|^decoder/logits_dense/"  # a whole T5 is a starting point

    def init(self, key: Key[Array, ""]) -> Any:
        return network.T5Encoder(self.config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def logits(
        self, params: Any, batch: interface.Batch, dropout_key: Key[Array, ""] | None = None
    ) -> Mapping[str, Float[Array, "..."]]:
        if self.config.head == "classify":
            return {"classify": network.forward(self.config, params, batch["inputs"], dropout_key)}
        return {"": network.similarities(self.config, params, batch, dropout_key)}

    def targets(self, batch: interface.Batch) -> Mapping[str, tuple[Num[Array, "B 1"], Float[Array, "B 1"]]]:
        if self.config.head == "classify":
            return {"classify": classes.targets(batch["inputs"], batch["label"])}
        is_pair_B1 = jnp.any(batch["decoder_target_tokens"] != 0, axis=-1, keepdims=True)
        return {"": (jnp.zeros_like(is_pair_B1, jnp.int32), is_pair_B1.astype(jnp.float32))}

    def feature_converter(self, pack: bool) -> FeatureConverter:
        if self.config.head == "classify":
            return ClassifierFeatureConverter(pack=False, regression=self.config.num_labels == 1)
        return EncDecFeatureConverter(pack=False)

    def flops(self, batch_size: int, lengths: Mapping[str, int]) -> float:
        c = self.config
        if c.head == "classify":
            S = lengths["inputs"]
            return 3.0 * batch_size * (stacks_flops(c, S, S) + 2 * c.d_model * (c.d_model + c.num_labels))
        per_row = 2 * batch_size * (c.embed_dim or c.d_model)
        for length in (lengths["inputs"], lengths["targets"]):
            per_row += stacks_flops(c, length, 0) + 2 * c.d_model * c.embed_dim
        return 3.0 * batch_size * per_row

    def predictor(self, partitioner: Partitioner, decoding: Decoding, max_decode_length: int, seed: int) -> Predictor:
        kind = ClassPredictor if self.config.head == "classify" else EmbeddingPredictor
        return kind(self.config, partitioner)

    def pretrained(self, params: Any, path: AnyPath, mesh: Any) -> Any:
        from t5x_lite import convert
        from t5x_lite.t5_encoder.pretrained import LoadedEncoder

        return LoadedEncoder(self.config, params, convert.vocabulary(path), mesh)
