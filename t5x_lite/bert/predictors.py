"""BERT's predictors: classes of texts and text pairs, and an error for a BERT with pre-training heads only."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from t5x_lite.bert import BertConfig, network
from t5x_lite.data.feature_converters import pair
from t5x_lite.errors import UserError
from t5x_lite.inference import class_predictor
from t5x_lite.inference.predictor import Mode, Predictor


class PretrainingPredictor(Predictor):
    def check(self, mode: Mode, has_task: bool) -> None:
        raise UserError(
            f"--mode={mode}: a BERT without a classification head makes no predictions. Fine-tune it first "
            "(--gin_file=runs/finetune_bert.gin), or get its logits with t5x_lite.load(MODEL_DIR) in Python"
        )

    def lower(self, batch_size: int, lengths: Mapping[str, int]) -> Any:
        raise UserError("--decode: an encoder-only model cannot decode")

    def next_steps(self, run: str, initial_checkpoint: str) -> tuple[str, Sequence[str]]:
        other = "--gin_file=runs/finetune_bert.gin --gin.MODEL_DIR=\"'runs/mrpc'\""
        return "or fine-tune it, for example on a GLUE task", (f"{run} {other} \\\n    {initial_checkpoint}",)


class ClassPredictor(class_predictor.ClassPredictor):
    arrays = ("inputs", "segments")
    between = "[SEP]"

    @staticmethod
    def logits(params: Any, rows: Mapping[str, jax.Array], *, config: BertConfig) -> jax.Array:
        return network.forward(config, params, rows)["classify"]

    @staticmethod
    def make_row(
        vocabulary: Any, first: Sequence[int], second: Sequence[int] | None, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        from tasks import bert

        ids = bert.special(vocabulary)
        return pair(first, second, [ids.cls], ids.sep, length)
