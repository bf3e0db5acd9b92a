"""BERT's predictors: classes of texts and text pairs, and an error for a BERT with pre-training heads only."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5x_lite.bert import BertConfig, network
from t5x_lite.errors import UserError
from t5x_lite.inference.predictor import Mode, Predictor, Scores
from t5x_lite.training.partitioner import Partitioner


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


class ClassPredictor(Predictor):
    def __init__(self, config: BertConfig, partitioner: Partitioner):
        super().__init__(config, partitioner)
        self._classify = partitioner.with_params(_classify, config=config)

    def classify(self, params: Any, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the logits of the classes [B, N] for `inputs` and `segments` [B, S]."""
        return jax.device_get(self._classify(params, self._on_mesh(dict(rows))))

    def check(self, mode: Mode, has_task: bool) -> None:
        if mode == "score":
            raise UserError("--mode=score is for models that generate text; --mode=infer scores the predicted class")
        if not has_task:
            raise UserError("--mode=infer with a classifier needs MIXTURE_OR_TASK_NAME, which defines the class names")

    def evaluator(self, name: str, lengths: Mapping[str, int], **options: Any) -> Callable[[Any, int], Scores]:
        from t5x_lite.bert import classification

        evaluation = classification.Evaluation(name, lengths, **options)
        return lambda params, at_step: evaluation.run(partial(self.classify, params), step=at_step)

    def task_source(self, task_name: str, lengths: Mapping[str, int], **options: Any) -> Any:
        from t5x_lite.bert import classification

        return classification.task_source(task_name, lengths, **options)

    def file_source(
        self, path: str, features: Mapping[str, Any], lengths: Mapping[str, int], mode: Mode, **options: Any
    ) -> Any:
        from t5x_lite.bert import classification

        return classification.file_source(path, features["inputs"].vocabulary, lengths, options["num_examples"])

    def write(
        self, mode: Mode, params: Any, source: Any, path: str | Path, features: Mapping[str, Any], **options: Any
    ) -> int:
        from t5x_lite.bert import classification

        classify = partial(self.classify, params)
        return classification.write_predictions(source, classify, path, label=features["label"], **options)

    def lower(self, batch_size: int, lengths: Mapping[str, int]) -> Any:
        rows = jax.ShapeDtypeStruct(
            (batch_size, lengths["inputs"]), np.int32, sharding=self._partitioner.batch_sharding
        )
        return self._classify.lower(self._partitioner.abstract.params, {"inputs": rows, "segments": rows})

    def next_steps(self, run: str, initial_checkpoint: str) -> tuple[str, Sequence[str]]:
        description = "or classify texts, one per line, or JSON lines with sentence1 and sentence2"
        return description, (f"{run} --mode=infer --gin.INFER_INPUT=\"'pairs.jsonl'\"",)


def _classify(params: Any, rows: Mapping[str, jax.Array], *, config: BertConfig) -> jax.Array:
    return network.forward(config, params, rows)["classify"]
