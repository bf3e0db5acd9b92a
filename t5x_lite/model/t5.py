"""T5 (Raffel et al. 2020): the encoder-decoder, versions 1.0 and 1.1, and decoder-only models (causal or prefix LM).

Sizes are in config.py, layers in transformer.py and layers.py. Axes are named by one letter, in variable names
(`x_BTD`) and einsum strings:

    B batch             D d_model            F d_ff (hidden layer of the MLP)
    S encoder length    H attention heads    V vocabulary
    T decoder length    K head_dim           L layers of a stack

The parameters of a stack's layers are stacked on a leading axis L, under the name `layers`, both for scan and for
unrolled layers, so checkpoints, optimizer and sharding have one layout. Parameter names are T5X's. Token 0 is padding
and the decoder's start token. This module does not depend on losses, optimizers, meshes or data.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from t5x_lite.errors import UserError
from t5x_lite.model.attention import AttentionMask
from t5x_lite.model.config import EncoderDecoderConfig, T5Config
from t5x_lite.model.layers import Embed
from t5x_lite.model.transformer import Cache, Decoder, Encoder
from t5x_lite.sharding import constrain


class T5(nn.Module):
    """T5 1.0 and 1.1. `T5(config, train=True)` turns dropout on and needs a "dropout" key if the rate is above 0.

    A network of another family derives from it, with its own embeddings, stacks and output.

    In a decoder-only model the encoder's arguments are None, and a row holds inputs followed by targets.
    `decoder_causal_attention` (SeqIO's name) is 1 at the positions of a prefix LM that attend to one another: the start
    token and the inputs.

    Token arrays are int32, 0 is padding. Segment ids (0 = padding) separate examples that are packed into one row.
    There are no position arguments: T5 uses relative positions only, which within a segment are index differences.
    """

    config: T5Config
    train: bool = False

    def setup(self) -> None:
        c = self.config
        self.token_embedder = Embed(c.vocab_size, c.d_model, c.compute_dtype)
        if not c.decoder_only:
            self.encoder = Encoder(c, self.train)
        self.decoder = Decoder(c, self.train)

    def __call__(
        self,
        encoder_input_tokens: Int[Array, "B S"] | None,
        decoder_input_tokens: Int[Array, "B T"],
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        decoder_causal_attention: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Return teacher-forced logits, float32."""
        encoded_BSD = None if self.config.decoder_only else self.encode(encoder_input_tokens, encoder_segment_ids)
        return self.decode(
            encoded_BSD,
            encoder_input_tokens,
            decoder_input_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            decoder_causal_attention,
        )

    def encode(
        self, encoder_input_tokens: Int[Array, "B S"] | None, encoder_segment_ids: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        if encoder_input_tokens is None:
            raise UserError("an encoder-decoder needs encoder_input_tokens")
        segments = _segments(encoder_input_tokens, encoder_segment_ids)
        return self.encoder(self.embed_inputs(encoder_input_tokens), AttentionMask(segments, segments))

    def embed_inputs(self, encoder_input_tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        return self.token_embedder(encoder_input_tokens)

    def embed_targets(
        self, decoder_input_tokens: Int[Array, "B T"], attention_mask: AttentionMask
    ) -> Float[Array, "B T D"]:
        return self.token_embedder(decoder_input_tokens)

    def decode(
        self,
        encoded_BSD: Float[Array, "B S D"] | None,
        encoder_input_tokens: Int[Array, "B S"] | None,
        decoder_input_tokens: Int[Array, "B T"],
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        decoder_causal_attention: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Return logits for all target positions at once, float32.

        Unpacked targets need only the causal mask: padding comes last, so no real token attends to it.
        """
        attention_mask = AttentionMask(
            decoder_segment_ids, decoder_segment_ids, self._prefix(decoder_causal_attention), causal=True
        )
        x_BTD, _ = self.decoder(
            self.embed_targets(decoder_input_tokens, attention_mask),
            encoded_BSD,
            attention_mask,
            AttentionMask(decoder_segment_ids, _segments(encoder_input_tokens, encoder_segment_ids)),
        )
        return self.output(x_BTD)

    def _prefix(self, decoder_causal_attention: Array | None) -> Array | None:
        return decoder_causal_attention if self.config.prefix_lm else None

    def start_cache(self, encoded_BSD: Float[Array, "B S D"] | None, rows: int, max_length: int) -> Cache:
        """Return an empty cache of B = `rows` rows with room for `max_length` tokens."""
        return self.decoder.start_cache(encoded_BSD, rows, max_length)

    def decode_step(
        self,
        decoder_input_tokens: Int[Array, "B T"],
        index: Int[Array, ""] | int,
        cache: Cache,
        encoder_input_tokens: Int[Array, "_ S"] | None,
        decoder_segment_ids: Int[Array, "B M"] | None = None,
        decoder_causal_attention: Int[Array, "B M"] | None = None,
        parents: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Return the logits of the next tokens (usually one) at positions index, index + 1, ..., and the new cache.

        Args:
          parents: row b continues row parents[b] of the cache; None: each row continues itself.
          decoder_segment_ids, decoder_causal_attention: for all M positions of the cache. Segment 0 is masked, so rows
            of different lengths can end at the same position.
        """
        attention_mask = AttentionMask(
            None, decoder_segment_ids, self._prefix(decoder_causal_attention), offset=index, causal=True
        )
        x_BTD, new_cache = self.decoder(
            self.embed_targets(decoder_input_tokens, attention_mask),
            None,
            attention_mask,
            AttentionMask(None, _segments(encoder_input_tokens, None)),
            cache,
            parents,
        )
        assert new_cache is not None
        return self.output(x_BTD), new_cache

    def output(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        with jax.named_scope("logits"):
            if self.config.tie_embeddings:
                logits_BTV = self.token_embedder.attend(x_BTD / jnp.sqrt(self.config.d_model).astype(x_BTD.dtype))
            else:
                logits_BTV = self.decoder.logits_dense(x_BTD)
            return constrain(logits_BTV, "batch", "length", "vocab")


def _segments(tokens: Int[Array, "B S"] | None, segment_ids: Int[Array, "B S"] | None) -> Int[Array, "B S"] | None:
    """Return the segment ids; an unpacked row is one segment followed by padding."""
    return (tokens != 0).astype(jnp.int32) if segment_ids is None and tokens is not None else segment_ids


def forward(
    config: EncoderDecoderConfig, params: Any, batch: Mapping[str, Array], dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "B T V"]:
    """Return teacher-forced logits of a batch with SeqIO's fields, packed or not; dropout is on if a key is given."""
    logits_BTV = config.network(train=dropout_key is not None).apply(
        {"params": params},
        batch.get("encoder_input_tokens"),
        batch["decoder_input_tokens"],
        batch.get("encoder_segment_ids"),
        batch.get("decoder_segment_ids"),
        batch.get("decoder_causal_attention"),
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    assert isinstance(logits_BTV, jax.Array)
    return logits_BTV
