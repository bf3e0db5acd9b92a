"""A trained BERT in Python: tokens in; logits, a row's summary or features out. `t5x_lite.load` gives one.

Must not know files or tokenizers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from t5x_lite import sharding
from t5x_lite.bert import Bert, BertConfig

Ids = Int[Array | np.ndarray, "B S"]


class LoadedBert:
    """A BERT and its parameters, ready to use: what `t5x_lite.load` gives for one.

    All methods take tokens [B, S]; segments, 0 or 1 (None: all 0); and an attention mask, 0 for what nothing may see
    (None: for padding, token 0). Results are float32. ValueError where the model lacks the head.
    """

    def __init__(self, config: BertConfig, params: Any, mesh: sharding.AnyMesh | None = None):
        self.config, self.params = config, params
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

    def pooled(self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None) -> Array:
        """The pooler's output, a row's summary from its first token, [B, D]."""
        return self._said("pooler", tokens, segments, attention_mask)

    def hidden(self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None) -> Array:
        """The embeddings and what comes out of every layer, [L + 1, B, S, D]."""
        with sharding.layout(self._mesh):
            return self._hidden(self.params, *_int32(tokens, segments, attention_mask))

    def features(
        self, tokens: Ids, segments: Ids | None = None, attention_mask: Ids | None = None, *, layers: int = 4
    ) -> Array:
        """The last layers side by side, [B, S, layers * D]; the paper's choice of four did best (5.3)."""
        if not 1 <= layers <= self.config.num_layers:
            raise ValueError(f"layers={layers} must lie in 1..{self.config.num_layers}, the model's")
        return jnp.concatenate([*self.hidden(tokens, segments, attention_mask)[-layers:]], axis=-1)

    def _said(self, head: str, *args: Ids | None) -> Array:
        if head not in self.config.heads:
            raise ValueError(f"this BERT has no {head!r} head; it has {self.config.heads or 'none'}")
        with sharding.layout(self._mesh):
            return self._head(self.params, head, *_int32(*args))


def _int32(*args: Ids | None) -> list[Array | None]:
    return [None if x is None else jnp.asarray(x, jnp.int32) for x in args]
