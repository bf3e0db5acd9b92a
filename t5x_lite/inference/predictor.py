"""Compiled functions of a model on numpy rows, and what evaluation and inference do with them.

Each model family derives its own `Predictor`. The same rows on every host give the same results on every host.
Methods that read a task import TensorFlow and SeqIO when they are called. It must not know runs or gin.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from t5x_lite import sharding
from t5x_lite.errors import UserError
from t5x_lite.model.interface import ModelConfig
from t5x_lite.training import step
from t5x_lite.training.loop import Scores as Scores
from t5x_lite.training.partitioner import Partitioner

logger = logging.getLogger(__name__)

Mode = Literal["infer", "score"]


class Predictor:
    """The loss of any model. A model that makes predictions overrides the rest."""

    def __init__(self, config: ModelConfig, partitioner: Partitioner):
        self._partitioner = partitioner
        self._sums = partitioner.with_params(step.eval_step, config=config)

    def loss(self, params: Any, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Mean cross entropy and accuracy of the targets.

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
        """Raises UserError if the model cannot do what a mode asks.

        Args:
          has_task: whether a SeqIO task is named; without one the examples come from a file.
        """
        raise UserError(f"--mode={mode} is for models that make predictions; this one only has a loss")

    def settings(self, mode: Mode) -> dict[str, Any]:
        """What the results depend on in addition to the model and the examples."""
        return {}

    def evaluator(self, name: str, lengths: Mapping[str, int], **options: Any) -> Callable[[Any, int], Scores]:
        """A function of parameters and step that computes the metrics of each task of `name`.

        Args:
          options: those of evaluator.Evaluation.
        """
        logger.info("The loss alone is evaluated: this model makes no predictions.")
        return lambda params, at_step: {}

    def task_source(self, task_name: str, lengths: Mapping[str, int], **options: Any) -> Any:
        """The examples of a task as a batch_prediction.Source; options are those of batch_prediction.task_source."""
        raise NotImplementedError

    def file_source(
        self, path: str, features: Mapping[str, Any], lengths: Mapping[str, int], mode: Mode, num_examples: int | None
    ) -> Any:
        """The lines of a file as a batch_prediction.Source."""
        raise NotImplementedError

    def write(
        self, mode: Mode, params: Any, source: Any, path: str | Path, features: Mapping[str, Any], **options: Any
    ) -> int:
        """Writes a JSON line for each example of `source`; returns their number.

        Args:
          features: output_features of the task, whose vocabularies are used.
          options: lengths, batch_size and about, as batch_prediction.write_predictions takes them.
        """
        raise NotImplementedError

    def lower(self, batch_size: int, lengths: Mapping[str, int]) -> Any:
        """The program that predicts for a batch, lowered but not compiled.

        Raises:
          UserError: the model makes no predictions.
        """
        raise UserError("--decode: this model makes no predictions")

    def next_steps(self, run: str, initial_checkpoint: str, vocabulary: str | None) -> tuple[str, Sequence[str]]:
        """What a user may do with the trained model: in words, and as commands.

        Args:
          run: the start of a command with the run's options.
          initial_checkpoint: the flag that starts another run from this one.
          vocabulary: what VOCABULARY must be in such a run, if anything.
        """
        return "or start from it in another run", (f"{run} {initial_checkpoint} --gin.MODEL_DIR=\"'runs/next'\"",)

    def _on_mesh(self, rows: Any) -> Any:
        def put(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(x.shape, self._partitioner.batch_sharding, lambda index: x[index])

        return jax.tree.map(put, rows)
