"""T5Gemma and T5Gemma 2: what distinguishes them from T5, in the frame of model/t5.py.

Rotary positions, grouped queries, sliding and global layers, norms before and after each block, scaled embeddings,
limited logits; and in T5Gemma 2 one attention of the decoder over its own tokens and the encoder's. Letters of axes and
the layout of parameters are those of model/t5.py; G is heads of keys and values, E is d_model of the encoder. Token 0
is padding, and stands for the start token in the decoder's inputs.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite.model import t5
from t5x_lite.model.attention import AttentionMask, dot_product_attention
from t5x_lite.model.block_attention import capped
from t5x_lite.model.layers import Adapter, Dense, Embed, GatedMlp, LowRank, RMSNorm, named_axes
from t5x_lite.model.transformer import Cache, append_to_cache, layer_slice, stack
from t5x_lite.sharding import constrain
from t5x_lite.t5gemma import Sizes, T5GemmaConfig

_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def rotation(config: T5GemmaConfig, head_dim: int, positions_BT: Int[Array, "_ T"]) -> tuple[Array, Array]:
    """Return cosine and sine of the positions' angles, float32 [2, B, T, 1, K / 2]: of sliding and global layers."""
    frequencies = [
        theta ** (-np.arange(0, head_dim, 2) / head_dim) / factor
        for theta, factor in ((config.rope_theta, 1.0), (config.global_rope_theta, config.global_rope_factor))
    ]
    frequencies_NK = jnp.asarray(np.array(frequencies), jnp.float32)
    angles = positions_BT[None, :, :, None, None].astype(jnp.float32) * frequencies_NK[:, None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotated(
    x_BTHK: Float[Array, "B T H K"], cos: Float[Array, "_ T 1 C"], sin: Float[Array, "_ T 1 C"]
) -> Float[Array, "B T H K"]:
    """Return x, turned by the angles of its positions: element i with element i + K / 2."""
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHK.dtype)


def positions(attention_mask: AttentionMask, length: int) -> Int[Array, "_ T"]:
    """Return the position of each query in its segment."""
    segments_BT = attention_mask.query_segments
    if segments_BT is None:
        return attention_mask.query_positions(length)[None]
    index_T = jnp.arange(length)
    is_first_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    return index_T - jax.lax.cummax(jnp.where(is_first_BT, index_T, 0), axis=1)


class Attention(nn.Module):
    """Attention with grouped queries; keys and values come from `keys_values` or from a cache."""

    config: T5GemmaConfig
    sizes: Sizes

    def setup(self) -> None:
        c, sizes = self.config, self.sizes
        outputs = {"query": sizes.num_heads, "key": sizes.num_kv_heads, "value": sizes.num_kv_heads}
        features = {name: heads * sizes.head_dim for name, heads in outputs.items()} | {"out": sizes.d_model}
        for name, size in features.items():
            axes = ("joined_kv", "embed") if name == "out" else ("embed", "joined_kv")
            setattr(self, name, Dense(size, axes, _INIT, c.compute_dtype))
            if name in c.lora:
                setattr(self, f"{name}_lora", LowRank(c.lora_rank, size, axes, c.compute_dtype))
        if c.generation == 2:
            self.query_norm = RMSNorm(c.compute_dtype, plus_one=True, axis=None)
            self.key_norm = RMSNorm(c.compute_dtype, plus_one=True, axis=None)

    def _product(self, name: str, x: Float[Array, "B T _"]) -> Float[Array, "B T _"]:
        y = getattr(self, name)(x)
        return y + getattr(self, f"{name}_lora")(x) if name in self.config.lora else y

    def _heads(self, name: str, x: Float[Array, "B T _"]) -> Float[Array, "B T _ K"]:
        y = self._product(name, x).reshape(*x.shape[:2], -1, self.sizes.head_dim)
        return getattr(self, f"{name}_norm")(y) if self.config.generation == 2 and name != "value" else y

    def keys_values(self, x_BSE: Float[Array, "B S E"]) -> tuple[Float[Array, "B S G K"], Float[Array, "B S G K"]]:
        return self._heads("key", x_BSE), self._heads("value", x_BSE)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        key_BSGK: Float[Array, "B S G K"],
        value_BSGK: Float[Array, "B S G K"],
        attention_mask: AttentionMask,
        turn: tuple[Array, Array] | None,
    ) -> Float[Array, "B T D"]:
        """Attend to the keys. turn: cosine and sine of the queries' positions; None: they have none."""
        c, sizes = self.config, self.sizes
        query_BTHK = self._heads("query", x_BTD)
        query_BTHK = query_BTHK if turn is None else rotated(query_BTHK, *turn)
        query_BTHK *= (c.query_scale or sizes.head_dim) ** -0.5
        y_BTHK = dot_product_attention(
            constrain(query_BTHK, "batch", "length", "heads", "kv"),
            key_BSGK,
            value_BSGK,
            None,
            attention_mask,
            softcap=c.attention_softcap or None,
            implementation=c.attention,
        )
        return self._product("out", y_BTHK.reshape(*y_BTHK.shape[:2], -1))


class Layer(nn.Module):
    """What layers of encoder and decoder share. A block is x + norm(block(norm(x)))."""

    config: T5GemmaConfig
    sizes: Sizes
    train: bool

    def setup(self) -> None:
        c = self.config
        self.pre_self_attention_layer_norm = _norm(c)
        self.self_attention = Attention(c, self.sizes)
        self.post_self_attention_layer_norm = _norm(c)
        self.pre_mlp_layer_norm = _norm(c)
        lora = {"lora_rank": c.lora_rank, "lora_targets": c.lora}
        self.mlp = GatedMlp(self.sizes.d_ff, ("gelu", "linear"), c.dropout_rate, c.compute_dtype, self.train, **lora)
        self.post_mlp_layer_norm = _norm(c)
        if c.adapter_size:
            self.adapter = Adapter(c.adapter_size, c.compute_dtype)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,), deterministic=not self.train)

    def add_mlp(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        h_BTD = self.post_mlp_layer_norm(self.mlp(self.pre_mlp_layer_norm(x_BTD)))
        if self.config.adapter_size:
            h_BTD = self.adapter(h_BTD)
        return constrain(x_BTD + self.dropout(h_BTD), "batch", "length", "embed")


def _norm(config: T5GemmaConfig) -> RMSNorm:
    return RMSNorm(config.compute_dtype, plus_one=True)


@flax.struct.dataclass
class LayerTypes:
    """Per layer: its number, 1 if it is global, and its window; None if no window hides a key."""

    number: Int[Array, "*L"]
    is_global: Int[Array, "*L"]
    window: Int[Array, "*L 2"] | None


def layer_types(config: T5GemmaConfig, count: int, causal: bool, keys: Any) -> LayerTypes:
    """Return the types of a stack's layers, for rows of so many keys.

    The window of a decoder includes the token itself. That of an encoder extends in T5Gemma so far to both sides, in
    T5Gemma 2 half as far.
    """
    width = config.sliding_window
    if causal:
        window = width - 1, 0
    else:
        window = (width, width) if config.generation == 1 else ((width + 1) // 2 - 1, width // 2)
    is_global = np.array([kind == "global" for kind in config.layer_types(count)], np.int32)
    everywhere = np.iinfo(np.int32).max
    windows = jnp.asarray(np.where(is_global[:, None], everywhere, window), jnp.int32)
    is_long = not isinstance(keys, int) or keys - 1 > (window[0] if causal else min(window))  # symbolic in an export
    hides = is_long and not is_global.all()
    return LayerTypes(jnp.arange(count), jnp.asarray(is_global), windows if hides else None)


class EncoderLayer(Layer):
    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        layer: LayerTypes,
        turns: tuple[Array, Array],
        attention_mask: AttentionMask,
    ) -> tuple[Float[Array, "B S D"], None]:
        turn = _of_layer(turns, layer)
        h_BSD = self.pre_self_attention_layer_norm(x_BSD)
        key, value = self.self_attention.keys_values(h_BSD)
        attention_mask = dataclasses.replace(attention_mask, window=layer.window)
        h_BSD = self.self_attention(h_BSD, rotated(key, *turn), value, attention_mask, turn)
        x_BSD += self.dropout(self.post_self_attention_layer_norm(h_BSD))
        return self.add_mlp(x_BSD), None


def _of_layer(turns: tuple[Array, Array], layer: LayerTypes) -> tuple[Array, Array]:
    cos, sin = (x[layer.is_global] for x in turns)
    return cos, sin


class DecoderLayer(Layer):
    """Causal attention and cross-attention, or (generation 2) one attention to the tokens of both, and the MLP."""

    def setup(self) -> None:
        super().setup()
        if self.config.generation == 1:
            self.pre_cross_attention_layer_norm = _norm(self.config)
            self.encoder_decoder_attention = Attention(self.config, self.sizes)
            self.post_cross_attention_layer_norm = _norm(self.config)

    def __call__(
        self,
        state: tuple[Float[Array, "B T D"], Cache | None],
        layer: LayerTypes,
        encoded_BSE: Float[Array, "B S E"] | None,
        turns: tuple[Array, Array],
        self_attention_mask: AttentionMask,
        cross_attention_mask: AttentionMask,
        parents_B: Int[Array, " B"] | None,
    ) -> tuple[tuple[Float[Array, "B T D"], Cache | None], None]:
        x_BTD, cache = state
        turn = _of_layer(turns, layer)
        h_BTD = self.pre_self_attention_layer_norm(x_BTD)
        key, value = self.self_attention.keys_values(h_BTD)
        key = rotated(key, *turn)
        if encoded_BSE is not None:
            cross_key, cross_value = self._cross_attention.keys_values(encoded_BSE)
        else:
            assert cache is not None and cache.cross_key is not None and cache.cross_value is not None
            cross_key, cross_value = (
                layer_slice(cache.cross_key, layer.number),
                layer_slice(cache.cross_value, layer.number),
            )
        if cache is not None:
            assert self_attention_mask.offset is not None
            where = layer.number, self_attention_mask.offset, parents_B
            self_key, key = append_to_cache(cache.self_key, key, *where)
            self_value, value = append_to_cache(cache.self_value, value, *where)
            cache = dataclasses.replace(cache, self_key=self_key, self_value=self_value)
        attention_mask = dataclasses.replace(self_attention_mask, window=layer.window)
        if self.config.generation == 2:
            key, value = _joined(key, cross_key), _joined(value, cross_value)
        h_BTD = self.self_attention(h_BTD, key, value, attention_mask, turn)
        x_BTD += self.dropout(self.post_self_attention_layer_norm(h_BTD))
        if self.config.generation == 1:
            h_BTD = self.pre_cross_attention_layer_norm(x_BTD)
            # Consecutive rows decoded from the same inputs become queries of one row, since there is no causal mask.
            h_BTD = h_BTD.reshape(cross_key.shape[0], -1, h_BTD.shape[-1])
            h_BTD = self.encoder_decoder_attention(h_BTD, cross_key, cross_value, cross_attention_mask, None)
            x_BTD += self.dropout(self.post_cross_attention_layer_norm(h_BTD.reshape(x_BTD.shape)))
        return (self.add_mlp(x_BTD), cache), None

    @property
    def _cross_attention(self) -> Attention:
        return self.encoder_decoder_attention if self.config.generation == 1 else self.self_attention

    def cross_keys_values(self, carry: None, encoded_BSE: Float[Array, "B S E"]) -> tuple[None, tuple[Array, Array]]:
        key, value = self._cross_attention.keys_values(encoded_BSE)
        return carry, (jnp.moveaxis(key, 1, -1), jnp.moveaxis(value, 1, -1))


def _joined(x_BT: Array, of_inputs_BS: Array) -> Array:
    """Join what belongs to the tokens of the decoder and, the same for consecutive rows, to those of the encoder."""
    copies = x_BT.shape[0] // of_inputs_BS.shape[0]
    return jnp.concatenate([x_BT, jnp.repeat(of_inputs_BS, copies, axis=0)], axis=1)


def merged_mask(
    self_attention_mask: AttentionMask, cross_attention_mask: AttentionMask, rows: int, keys: int
) -> AttentionMask:
    """Return the mask of attention to `keys` tokens of the decoder, causal, and then to all of the encoder's."""
    of_inputs_BS, of_targets_BT = cross_attention_mask.key_segments, self_attention_mask.key_segments
    assert of_inputs_BS is not None
    if of_targets_BT is None:
        of_targets_BT = jnp.ones((rows, keys), jnp.int32)
    is_input_BS = _joined(jnp.zeros((rows, keys), jnp.int32), jnp.ones_like(of_inputs_BS))
    segments = _joined(of_targets_BT, of_inputs_BS)
    return dataclasses.replace(self_attention_mask, key_segments=segments, key_prefix=is_input_BS)


class Encoder(nn.Module):
    """The encoder stack: maps embedded inputs to encodings."""

    config: T5GemmaConfig
    train: bool

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"], attention_mask: AttentionMask) -> Float[Array, "B S D"]:
        c, sizes, length = self.config, self.config.encoder, x_BSD.shape[1]
        dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,), deterministic=not self.train)
        # Only distances matter, so the tokens of packed examples need no positions of their own.
        turns = rotation(c, sizes.head_dim, jnp.arange(length)[None])
        types = layer_types(c, sizes.num_layers, causal=False, keys=length)
        layers = stack(EncoderLayer, c, sizes.num_layers, __call__=(0, nn.broadcast, nn.broadcast))
        x_BSD = dropout(constrain(x_BSD, "batch", "length", "embed"))
        x_BSD, _ = layers(c, sizes, self.train, name="layers")(x_BSD, types, turns, attention_mask)
        return dropout(RMSNorm(c.compute_dtype, plus_one=True, name="encoder_norm")(x_BSD))


class Decoder(nn.Module):
    """The decoder stack: maps embedded tokens to hidden states."""

    config: T5GemmaConfig
    train: bool

    def setup(self) -> None:
        c = self.config
        in_axes = {"__call__": (0, *(nn.broadcast,) * 5), "cross_keys_values": (nn.broadcast,)}
        self.layers = stack(DecoderLayer, c, c.num_decoder_layers, **in_axes)(c, c.decoder, self.train)
        self.decoder_norm = _norm(c)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,), deterministic=not self.train)
        if not c.tie_embeddings:
            float32 = jnp.dtype("float32")
            self.logits_dense = Dense(c.vocab_size, ("embed", "vocab"), _INIT, c.compute_dtype, output_dtype=float32)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        encoded_BSE: Float[Array, "B S E"] | None,
        self_attention_mask: AttentionMask,
        cross_attention_mask: AttentionMask,
        cache: Cache | None = None,
        parents_B: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c, (rows, length, _) = self.config, x_BTD.shape
        keys = length if cache is None else cache.self_key.shape[-1]
        turns = rotation(c, c.head_dim, positions(self_attention_mask, length))
        types = layer_types(c, c.num_decoder_layers, causal=True, keys=keys)
        if c.generation == 2:
            self_attention_mask = merged_mask(self_attention_mask, cross_attention_mask, rows, keys)
        x_BTD = self.dropout(constrain(x_BTD, "batch", "length", "embed"))
        masks = self_attention_mask, cross_attention_mask
        (x_BTD, cache), _ = self.layers((x_BTD, cache), types, encoded_BSE, turns, *masks, parents_B)
        return self.dropout(self.decoder_norm(x_BTD)), cache

    def start_cache(self, encoded_BSE: Float[Array, "B S E"], rows: int, max_length: int) -> Cache:
        c = self.config
        cross = self.layers.cross_keys_values(None, encoded_BSE)[1]
        empty_LBGKT = jnp.zeros((c.num_decoder_layers, rows, c.num_kv_heads, c.head_dim, max_length), c.compute_dtype)
        return Cache(empty_LBGKT, empty_LBGKT, *cross)


class T5Gemma(t5.T5):
    """T5Gemma and T5Gemma 2; see T5 for the arguments and methods."""

    config: T5GemmaConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        c = self.config

        def table(d_model: int) -> Embed:
            return Embed(c.vocab_size, d_model, c.compute_dtype, nn.initializers.normal(d_model**-0.5))

        self.token_embedder = table(c.d_model)
        if c.generation == 1:
            self.encoder_embedder = table(c.encoder.d_model)
        else:
            self.eoi_embedding = self.param("eoi_embedding", named_axes(nn.initializers.zeros, "embed"), (c.d_model,))
        self.encoder = Encoder(c, self.train)
        self.decoder = Decoder(c, self.train)

    def embed_inputs(self, encoder_input_tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        return self._embed(
            self.encoder_embedder if self.config.generation == 1 else self.token_embedder, encoder_input_tokens
        )

    def embed_targets(
        self, decoder_input_tokens: Int[Array, "B T"], attention_mask: AttentionMask
    ) -> Float[Array, "B T D"]:
        is_first_BT = positions(attention_mask, decoder_input_tokens.shape[1]) == 0
        is_start_BT = is_first_BT & (decoder_input_tokens == 0)
        return self._embed(self.token_embedder, jnp.where(is_start_BT, self.config.start_token, decoder_input_tokens))

    def _embed(self, table: Embed, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x_BTD = table(tokens_BT)
        x_BTD *= jnp.sqrt(x_BTD.shape[-1]).astype(x_BTD.dtype)
        if self.config.generation == 2:
            is_eoi_BT1 = (tokens_BT == self.config.eoi_token)[..., None]
            x_BTD = jnp.where(is_eoi_BT1, self.eoi_embedding.astype(x_BTD.dtype), x_BTD)
        return x_BTD

    def output(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        c = self.config
        with jax.named_scope("logits"):
            logits_BTV = self.token_embedder.attend(x_BTD) if c.tie_embeddings else self.decoder.logits_dense(x_BTD)
            logits_BTV = capped(logits_BTV, c.logits_softcap) if c.logits_softcap else logits_BTV
            return constrain(logits_BTV, "batch", "length", "vocab")
