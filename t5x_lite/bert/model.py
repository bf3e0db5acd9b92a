"""BERT's implementation of `interface.Model`, for pre-training and, with the "classify" head, for classification."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from t5x_lite.bert import BertConfig, network
from t5x_lite.bert.feature_converters import ClassifierFeatureConverter, PretrainingFeatureConverter
from t5x_lite.bert.predictors import ClassPredictor, PretrainingPredictor
from t5x_lite.convert.bucket import AnyPath
from t5x_lite.errors import UserError
from t5x_lite.inference.decode import Decoding
from t5x_lite.inference.predictor import Predictor
from t5x_lite.model import interface
from t5x_lite.model.feature_converter import FeatureConverter
from t5x_lite.training.partitioner import Partitioner


@dataclasses.dataclass(frozen=True)
class BertModel:
    head_params = r"^(pooler|mlm|nsp|classify)/"
    config: BertConfig

    def init(self, key: Key[Array, ""]) -> Any:
        return network.Bert(self.config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def logits(
        self, params: Any, batch: interface.Batch, dropout_key: Key[Array, ""] | None = None
    ) -> Mapping[str, Float[Array, "..."]]:
        outputs = network.forward(self.config, params, batch, dropout_key)
        return {head: logits for head, logits in outputs.items() if head != "pooler"}

    def targets(self, batch: interface.Batch) -> Mapping[str, tuple[Num[Array, "B _"], Float[Array, "B _"]]]:
        targets = network.targets(batch)
        if not targets.keys() & set(self.config.heads):
            raise UserError(
                f"BertConfig.heads={self.config.heads}: none of these learns from the task, whose features "
                f"({', '.join(batch)}) are for {' and '.join(targets)}"
            )
        return {head: pair for head, pair in targets.items() if head in self.config.heads}

    def feature_converter(self, pack: bool) -> FeatureConverter:
        if "classify" in self.config.heads:
            return ClassifierFeatureConverter(pack, regression=self.config.num_labels == 1)
        return PretrainingFeatureConverter(pack)

    def flops(self, batch_size: int, lengths: Mapping[str, int]) -> float:
        c, S = self.config, lengths["inputs"]
        layer = S * (8 * c.d_model**2 + 4 * c.d_model * c.d_ff + 4 * S * c.d_model)
        per_row = c.num_layers * layer
        if "mlm" in c.heads:
            per_row += S * 2 * c.d_model * (c.d_model + c.vocab_size)
        if "pooler" in c.heads:
            outputs = c.d_model + 2 * ("nsp" in c.heads) + c.num_labels * ("classify" in c.heads)
            per_row += 2 * c.d_model * outputs
        return 3.0 * batch_size * per_row

    def predictor(self, partitioner: Partitioner, decoding: Decoding, max_decode_length: int, seed: int) -> Predictor:
        kind = ClassPredictor if "classify" in self.config.heads else PretrainingPredictor
        return kind(self.config, partitioner)

    def pretrained(self, params: Any, path: AnyPath, mesh: Any) -> Any:
        from t5x_lite import convert
        from t5x_lite.bert.pretrained import LoadedBert
        from t5x_lite.bert.wordpiece import WordPiece
        from t5x_lite.convert.tokenizer import Vocabulary

        file = convert.tokenizer_file(path)
        kind = WordPiece if file is not None and file.suffix == ".txt" else Vocabulary
        return LoadedBert(self.config, params, None if file is None else kind(file), mesh)
