"""A trained BERT in Python (`t5x_lite.load`): classes, logits, pooled output or features of texts or tokens.

Must not handle files.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from t5x_lite import sharding
from t5x_lite.bert import BertConfig
from t5x_lite.bert.network import Bert
from t5x_lite.bert.wordpiece import WordPiece
from t5x_lite.convert.tokenizer import Vocabulary
from t5x_lite.data.feature_converters import pair
from t5x_lite.errors import UserError
from t5x_lite.model import classes

Ids = Int[Array | np.ndarray, "B S"]
Texts = Sequence[str | tuple[str, str]]


class LoadedBert:
    """A BERT with its parameters, as returned by `t5x_lite.load`.

    `predict` and `tokens` take texts. The other methods take tokens [B, S]; segments, 0 or 1 (None: all 0); and an
    attention mask, 0 where masked (None: at padding, token 0). Results are float32. A method whose head the model lacks
    raises UserError.
    """

    def __init__(
        self,
        config: BertConfig,
        params: Any,
        vocabulary: WordPiece | Vocabulary | None = None,
        mesh: sharding.AnyMesh | None = None,
    ):
        self.config, self.params, self.vocabulary = config, params, vocabulary
        self._mesh = mesh or sharding.make_mesh(1, devices=jax.local_devices()[:1])
        model = Bert(config)
        # The function returns one head, so that the compiler removes the others.
        self._head = jax.jit(
            lambda params, head, *args: model.apply({"params": params}, *args)[head].astype(jnp.float32),
            static_argnums=1,
        )
        self._hidden = jax.jit(
            lambda params, *args: jnp.float32(model.apply({"params": params}, *args, method="hidden"))
        )

    def logits(self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None) -> Array:
        """Return masked-LM logits [B, S, V], or the logits of the first other head if the model has no "mlm"."""
        head = next((head for head in self.config.heads if head != "pooler"), "mlm")
        return self._output(head, tokens, segments, attention_mask)

    def next_sentence(self, tokens: Ids, segments: Ids | None, attention_mask: Ids | None = None) -> Array:
        """Return logits [B, 2]: segment 1 follows segment 0 in its document, or is from another one."""
        return self._output("nsp", tokens, segments, attention_mask)

    def classify(self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None) -> Array:
        """Return the logits of the classes, [B, N]."""
        return self._output("classify", tokens, segments, attention_mask)

    def predict(self, texts: Texts, *, batch_size: int = 16) -> list[str] | list[float]:
        """Return the class name of each text or text pair (the class id if the model has no names), or, for a model
        with one label, the predicted number."""
        predictions: list[Any] = []
        for start in range(0, len(texts), batch_size):
            group = [*texts[start : start + batch_size]]
            tokens, segments = self.tokens(group + group[-1:] * (batch_size - len(group)))
            predictions += classes.predicted(self.config, np.asarray(self.classify(tokens, segments))[: len(group)])
        return predictions

    def tokens(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and segments [B, S] of texts or text pairs, with special tokens, truncated to `max_length`.

        Raises UserError if the model has no tokenizer.
        """
        if self.vocabulary is None:
            raise UserError("this BERT has no tokenizer: put its vocab.txt or spiece.model next to it, or pass tokens")
        v, most, rows = self.vocabulary, self.config.max_length, []
        for text in texts:
            first, *rest = (v.encode(part) for part in ((text,) if isinstance(text, str) else text))
            rows.append(pair(first, rest[0] if rest else None, [v.cls], v.sep, most))
        width = min(-(-max(len(tokens) for tokens, _ in rows) // 32) * 32, most)
        tokens, segments = (
            np.array([np.pad(x, (0, width - len(x))) for x in column]) for column in zip(*rows, strict=True)
        )
        return tokens, segments

    def pooled(self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None) -> Array:
        """Return the pooler's output, a summary of the row from its first token, [B, D]."""
        return self._output("pooler", tokens, segments, attention_mask)

    def hidden(self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None) -> Array:
        """Return the embeddings and the output of every layer, [L + 1, B, S, D]."""
        with sharding.use_mesh(self._mesh):
            return self._hidden(self.params, *_int32(tokens, segments, attention_mask))

    def features(
        self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None, *, layers: int = 4
    ) -> Array:
        """Return the last layers concatenated, [B, S, layers * D]; four did best in the BERT paper (5.3)."""
        if not 1 <= layers <= self.config.num_layers:
            raise UserError(f"layers={layers} must be in 1..{self.config.num_layers}, the number of layers")
        return jnp.concatenate([*self.hidden(tokens, segments, attention_mask)[-layers:]], axis=-1)

    def _output(self, head: str, *args: Ids | None) -> Array:
        if head not in self.config.heads:
            raise UserError(f"this BERT has no {head!r} head; it has {self.config.heads or 'none'}")
        with sharding.use_mesh(self._mesh):
            return self._head(self.params, head, *_int32(*args))


def _int32(*args: Ids | None) -> list[Array | None]:
    return [None if x is None else jnp.asarray(x, jnp.int32) for x in args]
