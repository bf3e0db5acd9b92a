"""The encoder of a T5 with the mean of its outputs as the embedding of a text.

Letters of axes are those of model/t5.py; E is the size of an embedding. Token 0 is padding and masked. Parameter names
are those of T5, so that its checkpoints are starting points. This module does not depend on losses, optimizers or data.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from t5x_lite.model.attention import NEG_INF, AttentionMask
from t5x_lite.model.layers import Dense, Embed
from t5x_lite.model.transformer import Encoder
from t5x_lite.t5_encoder import T5EncoderConfig


class T5Encoder(nn.Module):
    """`T5Encoder(config, train=True)` turns dropout on and needs a "dropout" key if the rate is above 0."""

    config: T5EncoderConfig
    train: bool = False

    def setup(self) -> None:
        c = self.config
        self.token_embedder = Embed(c.vocab_size, c.d_model, c.compute_dtype)
        self.encoder = Encoder(c, self.train)
        if c.embed_dim:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
            self.embed = Dense(c.embed_dim, ("embed", None), init, jnp.dtype("float32"))

    def encode(self, tokens_BS: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Return the encoder's outputs; those of padding are meaningless."""
        segments_BS = (tokens_BS != 0).astype(jnp.int32)
        return self.encoder(self.token_embedder(tokens_BS), AttentionMask(segments_BS, segments_BS))

    def __call__(self, tokens_BS: Int[Array, "B S"]) -> Float[Array, "B E"]:
        """Return embeddings of length 1, float32; 0 for a row of padding."""
        is_token_BS1 = (tokens_BS != 0)[..., None]
        sum_BD = jnp.sum(self.encode(tokens_BS).astype(jnp.float32) * is_token_BS1, axis=1)
        x_BE = sum_BD / jnp.maximum(jnp.sum(is_token_BS1, axis=1), 1)
        if self.config.embed_dim:
            x_BE = self.embed(x_BE)
        # The maximum is inside of the root, whose gradient at 0 is infinite.
        return x_BE * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x_BE), axis=-1, keepdims=True), 1e-24))


def embeddings(
    config: T5EncoderConfig, params: Any, tokens_BS: Int[Array, "B S"], dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "B E"]:
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    embedded_BE = T5Encoder(config, train=dropout_key is not None).apply({"params": params}, tokens_BS, rngs=rngs)
    assert isinstance(embedded_BE, jax.Array)
    return embedded_BE


def similarities(
    config: T5EncoderConfig, params: Any, batch: Mapping[str, Array], dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "B 1 B"]:
    """Return the similarities of each input to the targets of all rows, divided by the temperature.

    Those of row i are to the targets of rows i, i + 1, ...: the right one comes first in every row and in every part of
    a batch. Rows of padding, and other rows with the same target, do not count.
    """
    inputs_BS, targets_BT = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    queries_BE = embeddings(config, params, inputs_BS, keys[0])
    answers_BE = embeddings(config, params, targets_BT, keys[1])
    similarity_BB = queries_BE @ answers_BE.T / config.temperature
    rows_B = jnp.arange(len(inputs_BS))
    is_same_BB = jnp.all(targets_BT[:, None] == targets_BT[None], axis=-1) & (rows_B[:, None] != rows_B)
    is_padding_B = ~jnp.any(targets_BT != 0, axis=-1)
    similarity_BB = jnp.where(is_same_BB | is_padding_B, NEG_INF, similarity_BB)
    turned_BB = (rows_B[:, None] + rows_B) % len(inputs_BS)
    return jnp.take_along_axis(similarity_BB, turned_BB, axis=1)[:, None]
