"""A trained encoder in Python (`t5x_lite.load`): embeddings of texts. Must not handle files."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite import sharding
from t5x_lite.convert import tokenizer
from t5x_lite.data import packing
from t5x_lite.errors import UserError
from t5x_lite.inference import decode
from t5x_lite.t5_encoder import T5EncoderConfig
from t5x_lite.t5_encoder.network import T5Encoder


class LoadedEncoder:
    """The encoder of a T5 and its parameters, as returned by `t5x_lite.load`. Token arrays are int32; 0 is padding."""

    def __init__(
        self,
        config: T5EncoderConfig,
        params: Any,
        vocabulary: tokenizer.AnyVocabulary | None = None,
        mesh: sharding.AnyMesh | None = None,
    ):
        self.config, self.params, self.vocabulary = config, params, vocabulary
        self._mesh = mesh or sharding.make_mesh(1, devices=jax.local_devices()[:1])
        self._embed = jax.jit(lambda params, tokens: T5Encoder(config).apply({"params": params}, tokens))
        self._encode = jax.jit(
            lambda params, tokens: jnp.float32(T5Encoder(config).apply({"params": params}, tokens, method="encode"))
        )

    def encode(self, encoder_input_tokens: Int[Array | np.ndarray, "B S"]) -> Float[Array, "B S D"]:
        """Return the encoder's outputs, float32. Outputs at padding positions are meaningless."""
        with sharding.use_mesh(self._mesh):
            return self._encode(self.params, jnp.asarray(encoder_input_tokens, jnp.int32))

    def embed(self, texts: Iterable[Any], *, batch_size: int = 32, max_length: int = 512) -> Float[np.ndarray, "B E"]:
        """Return embeddings of length 1 (0 of a row of padding), float32: their products are cosines.

        Args:
          texts: texts, or rows of tokens with an end token.
          max_length: longer texts are cut to so many tokens, the end token included.

        Raises:
          UserError: a single text instead of a list, texts and no tokenizer, or a token that is not in the vocabulary.
        """
        rows = [self._tokens(text, max_length) for text in self._listed(texts)]

        def embed(tokens_BS: np.ndarray) -> np.ndarray:
            with sharding.use_mesh(self._mesh):
                return np.asarray(self._embed(self.params, jnp.asarray(tokens_BS)))

        return embedded(embed, rows, self.config, batch_size=batch_size, max_length=max_length)

    def _listed(self, texts: Any) -> list[Any]:
        if isinstance(texts, str):
            raise UserError("expected a list of texts, got one text: put it in a list")
        texts = list(texts)
        if self.vocabulary is None and any(isinstance(text, str) for text in texts):
            raise UserError(
                "this encoder has no tokenizer: put its spiece.model next to it, set model.vocabulary = "
                "t5x_lite.Vocabulary(FILE), or pass tokens"
            )
        return texts

    def _tokens(self, text: Any, max_length: int) -> list[int]:
        if isinstance(text, str):
            assert self.vocabulary is not None
            return [*self.vocabulary.encode(text)[: max_length - 1], decode.END]
        tokens = np.asarray(text)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"expected texts or rows of token ids, got a row {str(text)[:60]!r}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise UserError(f"token ids must be in 0..{self.config.vocab_size - 1}, got {tokens.min()}..{tokens.max()}")
        return np.trim_zeros(tokens, "b")[:max_length].tolist()


def embedded(
    embed: Callable[[np.ndarray], np.ndarray],
    rows: Sequence[Sequence[int] | np.ndarray],
    config: T5EncoderConfig,
    *,
    batch_size: int,
    max_length: int,
) -> Float[np.ndarray, "N E"]:
    """Return the embeddings of rows of tokens of any length, at most `max_length`, in batches of similar lengths.

    Args:
      embed: makes embeddings of tokens [B, S].
    """
    embedded_NE = np.zeros((len(rows), config.embed_dim or config.d_model), np.float32)
    for group in packing.by_length([len(row) for row in rows], batch_size):
        width = packing.width(max(len(rows[i]) for i in group), max_length)
        tokens_BS = np.zeros((batch_size, width), np.int32)
        for row_S, i in zip(tokens_BS, group, strict=False):
            row_S[: len(rows[i])] = rows[i]
        embedded_NE[group] = embed(tokens_BS)[: len(group)]
    return embedded_NE
