"""Compiled functions of a model on numpy rows, for evaluation and inference.

Each model family derives its own `Predictor`. The same rows on every host give the same results on every host.
Methods that read a task import TensorFlow and SeqIO when they are called. It must not depend on runs or gin.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from t5x_lite import sharding
from t5x_lite.errors import UserError
from t5x_lite.model.config import ModelConfig
from t5x_lite.training import step
from t5x_lite.training.loop import Scores as Scores
from t5x_lite.training.partitioner import Partitioner

logger = logging.getLogger(__name__)

Mode = Literal["infer", "score"]


class Predictor:
    """Computes the loss of any model. A model that makes predictions overrides the other methods."""

    def __init__(self, config: ModelConfig, partitioner: Partitioner):
        self._partitioner = partitioner
        self._sums = partitioner.with_params(step.eval_step, config=config)

    def loss(self, params: Any, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Return mean cross entropy and accuracy of the targets.

        Args:
          batches: this host's rows, as the model's feature converter makes them.
        """
        sums = [
            jax.device_get(self._sums(params, sharding.shard_batch(batch, self._partitioner.batch_sharding)))
            for batch in batches
        ]
        if not sums:
            return {}
        means = step.means(jax.tree.map(lambda *parts: float(np.sum(parts, dtype=np.float64)), *sums))
        if "accuracy" in means:
            means["token_accuracy"] = means.pop("accuracy")
        return {name: float(x) for name, x in means.items() if not name.endswith(("z_loss", "cross_ent_loss"))}

    def check(self, mode: Mode, has_task: bool) -> None:
        """Raise UserError if the model does not support a mode.

        Args:
          has_task: whether a SeqIO task is given; otherwise the examples come from a file.
        """
        raise UserError(f"--mode={mode} is for models that make predictions; this one only has a loss")

    def settings(self, mode: Mode) -> dict[str, Any]:
        """Return the settings that the results depend on, in addition to the model and the examples."""
        return {}

    def evaluator(self, name: str, lengths: Mapping[str, int], **options: Any) -> Callable[[Any, int], Scores]:
        """Return a function (params, step) that computes the metrics of each task of `name`.

        Args:
          options: keyword arguments of evaluator.Evaluation.
        """
        logger.info("Only the loss is evaluated: this model makes no predictions.")
        return lambda params, at_step: {}

    def task_source(self, task_name: str, lengths: Mapping[str, int], **options: Any) -> Any:
        """Return the examples of a task as a batch_prediction.Source, with the options of its task_source."""
        raise NotImplementedError

    def file_source(
        self, path: str, features: Mapping[str, Any], lengths: Mapping[str, int], mode: Mode, **options: Any
    ) -> Any:
        """Return the rows of a file as a batch_prediction.Source; `options` are num_examples and templates."""
        raise NotImplementedError

    def write(
        self, mode: Mode, params: Any, source: Any, path: str | Path, features: Mapping[str, Any], **options: Any
    ) -> int:
        """Write a JSON line for each example of `source`; return their number.

        Args:
          features: output_features of the task, whose vocabularies are used.
          options: lengths, batch_size and about, as batch_prediction.write_predictions takes them.
        """
        raise NotImplementedError

    def lower(self, batch_size: int, lengths: Mapping[str, int]) -> Any:
        """Lower, without compiling it, the program that predicts for a batch.

        Raises:
          UserError: the model makes no predictions.
        """
        raise UserError("--decode: this model makes no predictions")

    def next_steps(self, run: str, initial_checkpoint: str) -> tuple[str, Sequence[str]]:
        """Suggest next steps with the trained model: a sentence, and commands.

        Args:
          run: the beginning of a command, with the run's options.
          initial_checkpoint: the flag that starts another run from this one.
        """
        return "or start from it in another run", (f"{run} {initial_checkpoint} --gin.MODEL_DIR=\"'runs/next'\"",)

    def _on_mesh(self, rows: Any) -> Any:
        def put(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(x.shape, self._partitioner.batch_sharding, lambda index: x[index])

        return jax.tree.map(put, rows)
