"""A trained encoder in Python (`t5x_lite.load`): embeddings or classes of texts. Must not handle files."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite import sharding
from t5x_lite.convert import tokenizer
from t5x_lite.data import packing
from t5x_lite.data.feature_converters import pair
from t5x_lite.errors import UserError
from t5x_lite.inference import decode
from t5x_lite.model import classes
from t5x_lite.t5_encoder import T5EncoderConfig
from t5x_lite.t5_encoder.network import T5Encoder

log = logging.getLogger(__name__)

Texts = Iterable[Any]  # texts, pairs of texts (for classes), or rows of tokens with an end token


class LoadedEncoder:
    """The encoder of a T5 and its parameters, as returned by `t5x_lite.load`. Token arrays are int32; 0 is padding.

    With a head for classes, `predict` and `classify` make predictions; with one for embeddings, `embed`. They take
    texts, or rows of tokens with an end token; for classes also pairs of texts. Texts that are longer than `max_length`
    tokens, the end token included, are cut, which is logged. They raise UserError for a single text instead of a list,
    texts where there is no tokenizer, a token that is not in the vocabulary, or the other kind of head.
    """

    def __init__(
        self,
        config: T5EncoderConfig,
        params: Any,
        vocabulary: tokenizer.AnyVocabulary | None = None,
        mesh: sharding.AnyMesh | None = None,
    ):
        self.config, self.params, self.vocabulary = config, params, vocabulary
        self._mesh = mesh or sharding.make_mesh(1, devices=jax.local_devices()[:1])
        self._output = jax.jit(lambda params, tokens: T5Encoder(config).apply({"params": params}, tokens))
        self._encode = jax.jit(
            lambda params, tokens: jnp.float32(T5Encoder(config).apply({"params": params}, tokens, method="encode"))
        )

    def encode(self, encoder_input_tokens: Int[Array | np.ndarray, "B S"]) -> Float[Array, "B S D"]:
        """Return the encoder's outputs, float32. Outputs at padding positions are meaningless."""
        with sharding.use_mesh(self._mesh):
            return self._encode(self.params, jnp.asarray(encoder_input_tokens, jnp.int32))

    def embed(self, texts: Texts, *, batch_size: int = 32, max_length: int = 512) -> Float[np.ndarray, "B E"]:
        """Return embeddings of length 1 (0 of a row of padding), float32: their products are cosines."""
        if self.config.head != "embed":
            raise UserError("this model has a head for classes, not for embeddings: it has predict and classify")
        size = self.config.embed_dim or self.config.d_model
        return self._outputs(texts, size, batch_size, max_length)

    def classify(self, texts: Texts, *, batch_size: int = 32, max_length: int = 512) -> Float[np.ndarray, "B N"]:
        """Return logits of the classes, or the number of a model with one label, float32."""
        if self.config.head != "classify":
            raise UserError("this model has a head for embeddings, not for classes: it has embed")
        return self._outputs(texts, self.config.num_labels, batch_size, max_length)

    def predict(self, texts: Texts, **options: Any) -> list[str] | list[float]:
        """Return the class name of each text (the class id if the model has no names), or the number of a model with
        one label. The options are those of `classify`."""
        return classes.predicted(self.config, self.classify(texts, **options))

    def _outputs(self, texts: Texts, size: int, batch_size: int, max_length: int) -> np.ndarray:
        if isinstance(texts, str):
            raise UserError("expected a list of texts, got one text: put it in a list")
        if isinstance(texts, tuple) and len(texts) == 2 and all(isinstance(text, str) for text in texts):
            raise UserError("expected a list of texts, got a tuple of two: put the pair, or both texts, in a list")
        rows = [self._row(text) for text in texts]
        if cut := sum(sum(map(len, row)) > max_length for row in rows):
            log.warning("%d of %d texts have more than max_length = %d tokens, and are cut", cut, len(rows), max_length)

        def output(tokens_BS: np.ndarray) -> np.ndarray:
            with sharding.use_mesh(self._mesh):
                return np.asarray(self._output(self.params, jnp.asarray(tokens_BS)))

        return outputs(output, [_joined(row, max_length) for row in rows], size, batch_size, max_length)

    def _row(self, text: Any) -> list[list[int]]:
        """Return the tokens of a text, or of each text of a pair, with end tokens."""
        is_pair = isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if isinstance(text, str) or (is_pair and self.config.head == "classify"):
            if self.vocabulary is None:
                raise UserError(
                    "this encoder has no tokenizer: put its spiece.model next to it, set model.vocabulary = "
                    "t5x_lite.Vocabulary(FILE), or pass tokens"
                )
            return [[*self.vocabulary.encode(part), decode.END] for part in ([text] if isinstance(text, str) else text)]
        tokens = np.asarray(text)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"expected texts or rows of token ids, got a row {str(text)[:60]!r}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise UserError(f"token ids must be in 0..{self.config.vocab_size - 1}, got {tokens.min()}..{tokens.max()}")
        return [np.trim_zeros(tokens, "b").tolist()]


def _joined(row: list[list[int]], max_length: int) -> Sequence[int] | np.ndarray:
    """Return the tokens of a text or a pair, cut to `max_length`, which leaves the last tokens of both."""
    first, *second = row
    if second:
        return pair(first[:-1], second[0][:-1], [], decode.END, max_length)[0]
    return first if len(first) <= max_length else [*first[: max_length - 1], first[-1]]


def outputs(
    output: Callable[[np.ndarray], np.ndarray],
    rows: Sequence[Sequence[int] | np.ndarray],
    size: int,
    batch_size: int,
    max_length: int,
) -> Float[np.ndarray, "N _"]:
    """Return the outputs [N, size] of rows of at most `max_length` tokens, computed in batches of similar lengths.

    Args:
      output: makes outputs [B, size] of tokens [B, S].
    """
    outputs_NE = np.zeros((len(rows), size), np.float32)
    for group in packing.by_length([len(row) for row in rows], batch_size):
        width = packing.width(max(len(rows[i]) for i in group), max_length)
        tokens_BS = np.zeros((batch_size, width), np.int32)
        for row_S, i in zip(tokens_BS, group, strict=False):
            row_S[: len(rows[i])] = rows[i]
        outputs_NE[group] = output(tokens_BS)[: len(group)]
    return outputs_NE
