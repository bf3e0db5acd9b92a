"""A trained BERT in Python: texts or tokens in; classes, logits, a row's summary or features out; by `t5x_lite.load`.

Must not know files.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from t5x_lite import sharding
from t5x_lite.bert import BertConfig
from t5x_lite.bert.feature_converters import pair
from t5x_lite.bert.network import Bert
from t5x_lite.bert.wordpiece import WordPiece
from t5x_lite.convert.tokenizer import Vocabulary
from t5x_lite.errors import UserError

Ids = Int[Array | np.ndarray, "B S"]
Texts = Sequence[str | tuple[str, str]]


class LoadedBert:
    """A BERT and its parameters, ready to use: what `t5x_lite.load` gives for one.

    `predict` takes texts; all others take tokens [B, S]; segments, 0 or 1 (None: all 0); and an attention mask, 0 for
    what nothing may see (None: for padding, token 0). Results are float32. ValueError where the model lacks the head.
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
        # Of one head at a time, so that the compiler leaves out the others.
        self._head = jax.jit(
            lambda params, head, *args: model.apply({"params": params}, *args)[head].astype(jnp.float32),
            static_argnums=1,
        )
        self._hidden = jax.jit(
            lambda params, *args: jnp.float32(model.apply({"params": params}, *args, method="hidden"))
        )

    def logits(self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None) -> Array:
        """Of the token at each place, [B, S, V]; of the first other head where there is none for that."""
        head = next((head for head in self.config.heads if head != "pooler"), "mlm")
        return self._said(head, tokens, segments, attention_mask)

    def next_sentence(self, tokens: Ids, segments: Ids | None, attention_mask: Ids | None = None) -> Array:
        """Logits that segment 1 follows segment 0 in its document, and that it is from another, [B, 2]."""
        return self._said("nsp", tokens, segments, attention_mask)

    def classify(self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None) -> Array:
        """Logits of the classes, [B, N]."""
        return self._said("classify", tokens, segments, attention_mask)

    def predict(self, texts: Texts, *, batch_size: int = 16) -> list[str] | list[float]:
        """The class of each text, or pair of texts, by its name (its number, where the model knows no names); of a
        model with one label the number that it says."""
        said: list[Any] = []
        for start in range(0, len(texts), batch_size):
            group = [*texts[start : start + batch_size]]
            tokens, segments = self.tokens(group + group[-1:] * (batch_size - len(group)))
            logits_BN = np.asarray(self.classify(tokens, segments))[: len(group)]
            said += logits_BN[:, 0].tolist() if self.config.num_labels == 1 else logits_BN.argmax(-1).tolist()
        if self.config.num_labels == 1:
            return said
        return [self.config.labels[i] if self.config.labels else str(i) for i in said]

    def tokens(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments [B, S] of texts, or pairs of texts, with their special tokens; cut to `max_length`.

        Raises ValueError: the model came without a tokenizer.
        """
        if self.vocabulary is None:
            raise UserError(
                "this BERT came without a tokenizer: put its vocab.txt or spiece.model beside it, or give it tokens"
            )
        v, most, rows = self.vocabulary, self.config.max_length, []
        for text in texts:
            first, *rest = (v.encode(part) for part in ((text,) if isinstance(text, str) else text))
            rows.append(pair(first, rest[0] if rest else None, v.cls, v.sep, most))
        width = min(-(-max(len(tokens) for tokens, _ in rows) // 32) * 32, most)
        tokens, segments = (
            np.array([np.pad(x, (0, width - len(x))) for x in column]) for column in zip(*rows, strict=True)
        )
        return tokens, segments

    def pooled(self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None) -> Array:
        """The pooler's output, a row's summary from its first token, [B, D]."""
        return self._said("pooler", tokens, segments, attention_mask)

    def hidden(self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None) -> Array:
        """The embeddings and what comes out of every layer, [L + 1, B, S, D]."""
        with sharding.use_mesh(self._mesh):
            return self._hidden(self.params, *_int32(tokens, segments, attention_mask))

    def features(
        self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None, *, layers: int = 4
    ) -> Array:
        """The last layers side by side, [B, S, layers * D]; the paper's choice of four did best (5.3)."""
        if not 1 <= layers <= self.config.num_layers:
            raise UserError(f"layers={layers} must lie in 1..{self.config.num_layers}, the model's")
        return jnp.concatenate([*self.hidden(tokens, segments, attention_mask)[-layers:]], axis=-1)

    def _said(self, head: str, *args: Ids | None) -> Array:
        if head not in self.config.heads:
            raise UserError(f"this BERT has no {head!r} head; it has {self.config.heads or 'none'}")
        with sharding.use_mesh(self._mesh):
            return self._head(self.params, head, *_int32(*args))


def _int32(*args: Ids | None) -> list[Array | None]:
    return [None if x is None else jnp.asarray(x, jnp.int32) for x in args]
