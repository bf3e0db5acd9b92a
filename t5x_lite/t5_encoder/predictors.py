"""Embeddings and classes of texts for tasks and files of any size, and how well embeddings find the right answers."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from t5x_lite.data.feature_converters import pair
from t5x_lite.errors import UserError
from t5x_lite.inference import class_predictor
from t5x_lite.inference.decode import END
from t5x_lite.inference.predictor import Mode, Predictor, Scores
from t5x_lite.t5_encoder import T5EncoderConfig, network
from t5x_lite.t5_encoder.pretrained import outputs
from t5x_lite.t5_encoder.retrieval import retrieved
from t5x_lite.training.partitioner import Partitioner

logger = logging.getLogger(__name__)


class EmbeddingPredictor(Predictor):
    def __init__(self, config: T5EncoderConfig, partitioner: Partitioner):
        super().__init__(config, partitioner)
        self._config = config
        self._embed = partitioner.with_params(_embed, config=config)

    def embed(self, params: Any, tokens_BS: np.ndarray) -> np.ndarray:
        """Return embeddings [B, E] of rows of tokens."""
        return jax.device_get(self._embed(params, self._on_mesh(tokens_BS)))

    def check(self, mode: Mode, has_task: bool) -> None:
        if mode == "score":
            raise UserError("--mode=score is for models that generate text; --mode=infer writes embeddings")

    def evaluator(self, name: str, lengths: Mapping[str, int], **options: Any) -> Callable[[Any, int], Scores]:
        """Return a function (params, step) -> metrics of retrieval: the inputs find their targets among all targets."""
        from t5x_lite.data import pipeline
        from t5x_lite.inference import batch_prediction
        from t5x_lite.inference.jsonl import write_whole

        batch_size, folder = options.pop("batch_size"), options.pop("predictions", None)
        tasks = pipeline.tasks_with_split(name, options.get("split", "validation"))
        pipeline.check_lengths(name, lengths)
        examples = {task: list(batch_prediction.task_source(task, lengths, **options).read(0)) for task in tasks}

        def evaluate(params: Any, at_step: int) -> Scores:
            scores = {}
            for task, rows in examples.items():
                targets = {row.targets or "": row.target_tokens for row in rows}
                answers, place = list(targets), {text: i for i, text in enumerate(targets)}
                queries_NE = self._embedded(params, [row.input_tokens for row in rows], lengths["inputs"], batch_size)
                answers_ME = self._embedded(params, [targets[x] for x in answers], lengths["targets"], batch_size)
                right_N = np.array([place[row.targets or ""] for row in rows])
                metrics, best, similarity = retrieved(queries_NE, answers_ME, right_N)
                scores[task] = metrics
                if folder is not None:
                    results = (
                        {"inputs": row.inputs, "targets": row.targets, "prediction": answers[i], "score": float(score)}
                        for row, i, score in zip(rows, best, similarity, strict=True)
                    )
                    write_whole(epath.Path(folder) / f"{task}-{at_step}.jsonl", results)
            return scores

        return evaluate

    def _embedded(self, params: Any, rows: Sequence[Any], length: int, batch_size: int) -> np.ndarray:
        size = self._config.embed_dim or self._config.d_model
        return outputs(partial(self.embed, params), rows, size, batch_size, length)

    def task_source(self, task_name: str, lengths: Mapping[str, int], **options: Any) -> Any:
        from t5x_lite.inference import batch_prediction

        return batch_prediction.task_source(task_name, lengths, **options)

    def file_source(
        self, path: str, features: Mapping[str, Any], lengths: Mapping[str, int], mode: Mode, **options: Any
    ) -> Any:
        from t5x_lite.inference import batch_prediction

        return batch_prediction.file_source(path, features, lengths, **options)

    def write(
        self, mode: Mode, params: Any, source: Any, path: str | Path, features: Mapping[str, Any], **options: Any
    ) -> int:
        """Write `inputs`, `targets` (if any) and `embedding`, a list of E numbers."""
        from t5x_lite.inference import batch_prediction

        lengths, batch_size = options["lengths"], options["batch_size"]

        def answer(group: list[Any]) -> Iterator[dict[str, Any]]:
            width = batch_prediction.width(group, lengths, "inputs")
            tokens_BS = batch_prediction.padded([example.input_tokens for example in group], width, batch_size)
            for example, embedding_E in zip(group, self.embed(params, tokens_BS), strict=False):
                targets = {} if example.targets is None else {"targets": example.targets}
                yield {"inputs": example.inputs, **targets, "embedding": embedding_E.tolist()}

        about = {"mode": "infer", **options["about"], **source.about}
        return batch_prediction.write(source, lambda group: list(answer(group)), path, batch_size, about)

    def lower(self, batch_size: int, lengths: Mapping[str, int]) -> Any:
        shape = (batch_size, lengths["inputs"])
        tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=self._partitioner.batch_sharding)
        return self._embed.lower(self._partitioner.abstract.params, tokens)

    def next_steps(self, run: str, initial_checkpoint: str) -> tuple[str, Sequence[str]]:
        return "or embed texts, one on each line", (f"{run} --mode=infer --gin.INFER_INPUT=\"'texts.txt'\"",)


def _embed(params: Any, tokens_BS: jax.Array, *, config: T5EncoderConfig) -> jax.Array:
    return network.forward(config, params, tokens_BS)


class ClassPredictor(class_predictor.ClassPredictor):
    between = "</s>"

    @staticmethod
    def logits(params: Any, rows: Mapping[str, jax.Array], *, config: T5EncoderConfig) -> jax.Array:
        return network.forward(config, params, rows["inputs"])

    @staticmethod
    def make_row(
        vocabulary: Any, first: Sequence[int], second: Sequence[int] | None, length: int
    ) -> tuple[np.ndarray, None]:
        return pair(first, second, [], END, length)[0], None
