"""Classes of texts and text pairs, for tasks and files of any size."""

import abc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.inference.predictor import Mode, Predictor, Scores
from t5x_lite.model.config import ModelConfig
from t5x_lite.training.partitioner import Partitioner


class ClassPredictor(Predictor, abc.ABC):
    """Predicts classes, or a number. Each family with such a head derives its own."""

    arrays: ClassVar[tuple[str, ...]] = ("inputs",)  # what `logits` takes, each [B, S]
    between: ClassVar[str]  # stands between the two texts of a pair in results

    def __init__(self, config: ModelConfig, partitioner: Partitioner):
        super().__init__(config, partitioner)
        self._logits = partitioner.with_params(self.logits, config=config)

    @staticmethod
    @abc.abstractmethod
    def logits(params: Any, rows: Mapping[str, jax.Array], *, config: Any) -> jax.Array:
        """Return the logits of the classes [B, N], float32."""

    @staticmethod
    @abc.abstractmethod
    def make_row(
        vocabulary: Any, first: Sequence[int], second: Sequence[int] | None, length: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the row of one text or two, of at most `length` tokens, and its segments if the model has them."""

    def classify(self, params: Any, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the logits of the classes [B, N]."""
        return jax.device_get(self._logits(params, self._on_mesh(dict(rows))))

    def check(self, mode: Mode, has_task: bool) -> None:
        if mode == "score":
            raise UserError("--mode=score is for models that generate text; --mode=infer scores the predicted class")
        if not has_task:
            raise UserError("--mode=infer with a classifier needs MIXTURE_OR_TASK_NAME, which defines the class names")

    def evaluator(self, name: str, lengths: Mapping[str, int], **options: Any) -> Callable[[Any, int], Scores]:
        from t5x_lite.inference import classification

        evaluation = classification.Evaluation(name, lengths, **options)
        return lambda params, at_step: evaluation.run(partial(self.classify, params), step=at_step)

    def task_source(self, task_name: str, lengths: Mapping[str, int], **options: Any) -> Any:
        from t5x_lite.inference import classification

        return classification.task_source(task_name, lengths, **options)

    def file_source(
        self, path: str, features: Mapping[str, Any], lengths: Mapping[str, int], mode: Mode, **options: Any
    ) -> Any:
        from t5x_lite.inference import classification

        vocabulary = features["inputs"].vocabulary
        make_row = partial(self.make_row, vocabulary)
        return classification.file_source(path, vocabulary, lengths, make_row, self.between, options["num_examples"])

    def write(
        self, mode: Mode, params: Any, source: Any, path: str | Path, features: Mapping[str, Any], **options: Any
    ) -> int:
        from t5x_lite.inference import classification

        classify = partial(self.classify, params)
        return classification.write_predictions(source, classify, path, label=features["label"], **options)

    def lower(self, batch_size: int, lengths: Mapping[str, int]) -> Any:
        rows = jax.ShapeDtypeStruct(
            (batch_size, lengths["inputs"]), np.int32, sharding=self._partitioner.batch_sharding
        )
        return self._logits.lower(self._partitioner.abstract.params, dict.fromkeys(self.arrays, rows))

    def next_steps(self, run: str, initial_checkpoint: str) -> tuple[str, Sequence[str]]:
        description = "or classify texts, one per line, or JSON lines with sentence1 and sentence2"
        return description, (f"{run} --mode=infer --gin.INFER_INPUT=\"'pairs.jsonl'\"",)
