"""The encoder of a T5 with a head on the mean of its outputs: the embedding of a text, or its class.

Letters of axes are those of model/t5.py; E is the size of an embedding, N is classes. Token 0 is padding and masked.
Parameter names are those of T5, so that its checkpoints are starting points. This module does not depend on losses,
optimizers or data.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from t5x_lite.inference.decode import END
from t5x_lite.model.attention import NEG_INF, AttentionMask
from t5x_lite.model.layers import Dense, Embed
from t5x_lite.model.transformer import Decoder, Encoder
from t5x_lite.t5_encoder import T5EncoderConfig

_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_FLOAT32 = jnp.dtype("float32")


class ClassHead(nn.Module):
    """Maps a summary of a text to logits of classes in float32: a dense layer, tanh, and another one."""

    config: T5EncoderConfig
    train: bool

    @nn.compact
    def __call__(self, x_BD: Float[Array, "B D"]) -> Float[Array, "B N"]:
        c = self.config
        dropout = nn.Dropout(c.dropout_rate, deterministic=not self.train)
        hidden = Dense(c.d_model, ("embed", None), _INIT, _FLOAT32, use_bias=True, name="dense")
        out = Dense(c.num_labels, ("embed", None), _INIT, _FLOAT32, use_bias=True, name="out")
        return out(dropout(jnp.tanh(hidden(dropout(x_BD)))))


class T5Encoder(nn.Module):
    """`T5Encoder(config, train=True)` turns dropout on and needs a "dropout" key if the rate is above 0."""

    config: T5EncoderConfig
    train: bool = False

    def setup(self) -> None:
        c = self.config
        self.token_embedder = Embed(c.vocab_size, c.d_model, c.compute_dtype)
        self.encoder = Encoder(c, self.train)
        if c.num_decoder_layers:
            self.decoder = Decoder(c, self.train)
        if c.head == "classify":
            self.classify = ClassHead(c, self.train)
        elif c.embed_dim:
            self.embed = Dense(c.embed_dim, ("embed", None), _INIT, _FLOAT32)

    def encode(self, tokens_BS: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Return the encoder's outputs; those of padding are meaningless."""
        segments_BS = (tokens_BS != 0).astype(jnp.int32)
        return self.encoder(self.token_embedder(tokens_BS), AttentionMask(segments_BS, segments_BS))

    def summary(self, tokens_BS: Int[Array, "B S"]) -> Float[Array, "B D"]:
        """Return what the head reads, float32: see T5EncoderConfig.num_decoder_layers."""
        encoded_BSD = self.encode(tokens_BS)
        if self.config.num_decoder_layers:
            shifted_BS = jnp.pad(tokens_BS, ((0, 0), (1, 0)))[:, :-1]
            across = AttentionMask(None, (tokens_BS != 0).astype(jnp.int32))
            x_BSD, _ = self.decoder(self.token_embedder(shifted_BS), encoded_BSD, AttentionMask(causal=True), across)
            last_B = tokens_BS.shape[1] - 1 - jnp.argmax(tokens_BS[:, ::-1] == END, axis=1)
            return jnp.take_along_axis(x_BSD, last_B[:, None, None], axis=1)[:, 0].astype(jnp.float32)
        is_token_BS1 = (tokens_BS != 0)[..., None]
        sum_BD = jnp.sum(encoded_BSD.astype(jnp.float32) * is_token_BS1, axis=1)
        return sum_BD / jnp.maximum(jnp.sum(is_token_BS1, axis=1), 1)

    def __call__(self, tokens_BS: Int[Array, "B S"]) -> Float[Array, "B _"]:
        """Return logits of classes, or embeddings of length 1 (0 for a row of padding), float32."""
        x_BE = self.summary(tokens_BS)
        if self.config.head == "classify":
            return self.classify(x_BE)
        if self.config.embed_dim:
            x_BE = self.embed(x_BE)
        # The maximum is inside of the root, whose gradient at 0 is infinite.
        return x_BE * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x_BE), axis=-1, keepdims=True), 1e-24))


def forward(
    config: T5EncoderConfig, params: Any, tokens_BS: Int[Array, "B S"], dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "B _"]:
    """Return the embeddings or logits of texts; dropout is on if a key is given."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    output = T5Encoder(config, train=dropout_key is not None).apply({"params": params}, tokens_BS, rngs=rngs)
    assert isinstance(output, jax.Array)
    return output


def similarities(
    config: T5EncoderConfig, params: Any, batch: Mapping[str, Array], dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "B 1 B"]:
    """Return the similarities of each input to the targets of all rows, divided by the temperature.

    Those of row i are to the targets of rows i, i + 1, ...: the right one comes first in every row and in every part of
    a batch. Rows of padding, and other rows with the same target, do not count.
    """
    inputs_BS, targets_BT = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    queries_BE = forward(config, params, inputs_BS, keys[0])
    answers_BE = forward(config, params, targets_BT, keys[1])
    similarity_BB = queries_BE @ answers_BE.T / config.temperature
    rows_B = jnp.arange(len(inputs_BS))
    is_same_BB = jnp.all(targets_BT[:, None] == targets_BT[None], axis=-1) & (rows_B[:, None] != rows_B)
    is_padding_B = ~jnp.any(targets_BT != 0, axis=-1)
    similarity_BB = jnp.where(is_same_BB | is_padding_B, NEG_INF, similarity_BB)
    turned_BB = (rows_B[:, None] + rows_B) % len(inputs_BS)
    return jnp.take_along_axis(similarity_BB, turned_BB, axis=1)[:, None]
