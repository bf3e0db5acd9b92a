"""Dot-product attention with T5's relative-position bias.

One signature for every implementation: queries, keys, values, an additive bias, and *who may see whom* said by its
meaning (`Visibility`) rather than as a dense mask, so that a fused kernel never has to build one. This module knows
arrays only: no parameters, no layers, no config.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

# Large enough to vanish in a float32 softmax, small enough that a bias added to it does not overflow.
MASKED = -1e10


@flax.struct.dataclass
class Visibility:
    """Which keys each query may attend to.

    A query sees a key when their segments are equal and the key's segment is not 0 (padding), and, if `causal`, when
    the key's position is not after the query's. `None` for the segments means that nothing is hidden by them. The first
    query stands at position `offset` of the keys: 0 in training, the number of tokens so far in cached decoding.
    """

    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    offset: Int[Array, ""] | int = 0
    causal: bool = flax.struct.field(pytree_node=False, default=False)

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "B 1 T S"] | None:
        """The mask written out, `True` where visible; with batch axis 1 if all rows agree; `None`: all visible."""
        mask = None
        if self.key_segments is not None:
            if self.query_segments is None:
                mask = (self.key_segments != 0)[:, None, None, :]
            else:
                q_B1T1 = self.query_segments[:, None, :, None]
                k_B11S = self.key_segments[:, None, None, :]
                mask = (q_B1T1 == k_B11S) & (k_B11S != 0)
        if self.causal:
            query_positions = self.offset + jnp.arange(query_length)
            seen = (jnp.arange(key_length)[None, :] <= query_positions[:, None])[None, None]
            mask = seen if mask is None else mask & seen
        return mask


def dot_product_attention(
    query_BTHK: Float[Array, "B T H K"],
    key_BSHK: Float[Array, "B S H K"],
    value_BSHK: Float[Array, "B S H K"],
    bias_HTS: Float[Array, "H T S"] | None,
    visibility: Visibility,
    *,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(q k + bias) v, without a 1/sqrt(K): T5 folds that into the query's initialiser (T5X layers.py).

    Logits and softmax are float32 whatever the inputs; the weights go back to the values' dtype. Dropout on the weights
    is shared by all queries of a row (T5X broadcasts it along the query axis). Queries that see no key get an average
    over all keys: such rows are padding, and nothing reads them.
    """
    with jax.named_scope("attention"):
        logits_BHTS = jnp.einsum("BTHK,BSHK->BHTS", query_BTHK, key_BSHK, preferred_element_type=jnp.float32)
        if bias_HTS is not None:
            logits_BHTS += bias_HTS.astype(jnp.float32)
        mask = visibility.dense(query_BTHK.shape[1], key_BSHK.shape[1])
        if mask is not None:
            logits_BHTS = jnp.where(mask, logits_BHTS, MASKED)
        weights_BHTS = jax.nn.softmax(logits_BHTS, axis=-1).astype(value_BSHK.dtype)
        if dropout_rate > 0.0 and dropout_key is not None:
            batch, heads, _, keys = weights_BHTS.shape
            kept_BH1S = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, (batch, heads, 1, keys))
            weights_BHTS = weights_BHTS * (kept_BH1S / (1.0 - dropout_rate)).astype(weights_BHTS.dtype)
        return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, value_BSHK)
