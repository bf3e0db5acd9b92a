"""Predictions of text-to-text models: generation and log-likelihoods, for tasks and files of any size."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.data import packing
from t5x_lite.inference import decode
from t5x_lite.inference.predictor import Mode, Predictor, Scores
from t5x_lite.model.config import EncoderDecoderConfig
from t5x_lite.training.partitioner import Partitioner

logger = logging.getLogger(__name__)


class TextPredictor(Predictor):
    def __init__(
        self,
        config: EncoderDecoderConfig,
        partitioner: Partitioner,
        decoding: decode.Decoding,
        max_decode_length: int,
        seed: int,
    ):
        super().__init__(config, partitioner)
        logger.info("Decoding: %s, at most %d tokens", decoding, max_decode_length)
        self._decoder_only, self._decoding = config.decoder_only, decoding
        self._max_length, self._seed = max_decode_length, seed
        self._generate = partitioner.with_params(
            _generate, config=config, max_length=max_decode_length, seed=seed, decoding=decoding
        )
        self._score = partitioner.with_params(decode.score, config=config)

    def predict(self, params: Any, inputs_BS: np.ndarray) -> np.ndarray:
        """Return the best token ids of each row, [B, T]."""
        return self.generate(params, inputs_BS)[0][:, 0]

    def generate(self, params: Any, inputs_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return N = NUM_DECODES results for each row: token ids [B, N, T], log-likelihoods [B, N] (-inf: none)."""
        return jax.device_get(self._generate(params, self._on_mesh(inputs_BS)))

    def score(self, params: Any, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return log-likelihoods [B] of the targets; `rows` are in encoder-decoder format for every model."""
        if self._decoder_only:
            rows = packing.joined(rows["encoder_input_tokens"], rows["decoder_target_tokens"])
        return jax.device_get(self._score(params, self._on_mesh(dict(rows))))

    def check(self, mode: Mode, has_task: bool) -> None:
        pass

    def settings(self, mode: Mode) -> dict[str, Any]:
        if mode == "score":
            return {}
        decoding = dataclasses.asdict(self._decoding)
        decoding["num_return"] = decoding.pop("num_decodes")  # the key in `.made_from.json` files of earlier versions
        seed = self._seed if self._decoding.method == "sample" else None
        return {"decoding": decoding, "max_decode_length": self._max_length, "seed": seed}

    def evaluator(self, name: str, lengths: Mapping[str, int], **options: Any) -> Callable[[Any, int], Scores]:
        from t5x_lite.inference import evaluator

        evaluation = evaluator.Evaluation(name, lengths, **options)

        def evaluate(params: Any, at_step: int) -> Scores:
            return evaluation.run(partial(self.predict, params), partial(self.score, params), step=at_step)

        return evaluate

    def task_source(self, task_name: str, lengths: Mapping[str, int], **options: Any) -> Any:
        from t5x_lite.inference import batch_prediction

        return batch_prediction.task_source(task_name, lengths, **options)

    def file_source(
        self, path: str, features: Mapping[str, Any], lengths: Mapping[str, int], mode: Mode, **options: Any
    ) -> Any:
        from t5x_lite.inference import batch_prediction

        return batch_prediction.file_source(path, features, lengths, with_targets=mode == "score", **options)

    def write(
        self, mode: Mode, params: Any, source: Any, path: str | Path, features: Mapping[str, Any], **options: Any
    ) -> int:
        from t5x_lite.inference import batch_prediction

        if mode == "score":
            return batch_prediction.write_scores(source, partial(self.score, params), path, **options)
        vocabulary = features["targets"].vocabulary
        return batch_prediction.write_predictions(
            source, partial(self.generate, params), path, vocabulary=vocabulary, **options
        )

    def lower(self, batch_size: int, lengths: Mapping[str, int]) -> Any:
        shape = (batch_size, lengths.get("inputs", 1))
        inputs = jax.ShapeDtypeStruct(shape, np.int32, sharding=self._partitioner.batch_sharding)
        return self._generate.lower(self._partitioner.abstract.params, inputs)

    def next_steps(self, run: str, initial_checkpoint: str) -> tuple[str, Sequence[str]]:
        mine = f"{run} --gin.TRAIN_FILES=\"'my/*.jsonl'\" --gin.MODEL_DIR=\"'runs/mine'\" \\\n    {initial_checkpoint}"
        commands = (f"{run} --mode=infer --gin.INFER_INPUT=\"'questions.txt'\"", mine)
        return "ask it questions, one on each line, or fine-tune it on your own files", commands


def _generate(
    params: Any,
    inputs_BS: jax.Array,
    *,
    config: EncoderDecoderConfig,
    seed: int,
    decoding: decode.Decoding,
    **settings: Any,
) -> tuple[jax.Array, jax.Array]:
    """Run `decode.generate` with keys derived from the seed and each row's tokens: equal inputs give equal samples.

    All rows that ended have END as their last token.
    """
    positions_S = jnp.arange(1, inputs_BS.shape[1] + 1, dtype=jnp.uint32)
    sums_B = jnp.sum(inputs_BS.astype(jnp.uint32) * positions_S, axis=1)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), sums_B)
    options = {"config": config, "decoding": decoding, **settings}
    tokens_BNT, scores_BN = decode.generate(params, inputs_BS, key=keys_B, **options)
    scores_BN = decode.log_likelihoods(tokens_BNT, scores_BN, decoding, config.end_tokens)
    return jnp.where(decode.ended(tokens_BNT, config.end_tokens), decode.END, tokens_BNT), scores_BN
