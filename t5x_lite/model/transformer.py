"""T5's encoder and decoder stacks, and the decoder's cache.

The parameters of a stack's layers are stacked on a leading axis L, under the name `layers`, both for scan and for
unrolled layers. Axes and names are those of t5.py. This module handles embedded tokens, not token ids or logits.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.model import remat
from t5x_lite.model.attention import AttentionMask, dot_product_attention
from t5x_lite.model.config import T5Config
from t5x_lite.model.layers import Adapter, Dense, GatedMlp, LowRank, RelativePositionBias, RMSNorm
from t5x_lite.sharding import constrain


@flax.struct.dataclass
class Cache:
    """Keys and values of cached decoding, an explicit argument and result of `decode_step`.

    self_*: keys and values of the tokens decoded so far, followed by zeros. cross_*: keys and values of the encoded
    inputs, computed once, or None without an encoder; consecutive rows (the beams or samples of an input) share one.
    The length axis is last, because a product with a single query would otherwise transpose it at each step.
    """

    self_key: Float[Array, "L B H K T"]
    self_value: Float[Array, "L B H K T"]
    cross_key: Float[Array, "L _ H K S"] | None = None
    cross_value: Float[Array, "L _ H K S"] | None = None


def append_to_cache(
    x_LBHKT: Float[Array, "L B H K T"],
    new_BTHK: Float[Array, "B _ H K"],
    layer: Int[Array, ""],
    index: Int[Array, ""] | int,
    parents_B: Int[Array, " B"] | None,
) -> tuple[Float[Array, "L B H K T"], Float[Array, "B T H K"]]:
    """Write new tokens of a layer at `index`, in place if XLA can; return the cache and the layer's slice of it."""
    new_BHKT = jnp.moveaxis(new_BTHK, 1, -1)
    if parents_B is None:
        x_LBHKT = jax.lax.dynamic_update_slice(x_LBHKT, new_BHKT[None], (layer, 0, 0, 0, index))
        return x_LBHKT, layer_slice(x_LBHKT, layer)
    x_BHKT = jax.lax.dynamic_update_slice(x_LBHKT[layer][parents_B], new_BHKT, (0, 0, 0, index))
    return jax.lax.dynamic_update_slice(x_LBHKT, x_BHKT[None], (layer, 0, 0, 0, 0)), jnp.moveaxis(x_BHKT, -1, 1)


def layer_slice(x_LBHKT: Float[Array, "L B H K T"], layer: Int[Array, ""]) -> Float[Array, "B T H K"]:
    return jnp.moveaxis(x_LBHKT[layer], -1, 1)


class Attention(nn.Module):
    """Multi-head attention. Keys and values come from `keys_values` (of x or the encoder's output) or from a cache."""

    config: T5Config
    train: bool

    def setup(self) -> None:
        c = self.config
        joined = c.num_heads * c.head_dim
        normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

        def query_init(*args: Any) -> Array:
            return normal(*args) / jnp.sqrt(c.head_dim)  # replaces the 1/sqrt(K) of the logits

        inward, outward = ("embed", "joined_kv"), ("joined_kv", "embed")
        self.query = Dense(joined, inward, query_init, c.compute_dtype)
        self.key = Dense(joined, inward, normal, c.compute_dtype)
        self.value = Dense(joined, inward, normal, c.compute_dtype)
        self.out = Dense(c.d_model, outward, normal, c.compute_dtype)
        if "query" in c.lora:
            self.query_lora = LowRank(c.lora_rank, joined, inward, c.compute_dtype)
        if "key" in c.lora:
            self.key_lora = LowRank(c.lora_rank, joined, inward, c.compute_dtype)
        if "value" in c.lora:
            self.value_lora = LowRank(c.lora_rank, joined, inward, c.compute_dtype)
        if "out" in c.lora:
            self.out_lora = LowRank(c.lora_rank, c.d_model, outward, c.compute_dtype)

    def _product(self, name: str, x: Float[Array, "B T _"]) -> Float[Array, "B T _"]:
        y = getattr(self, name)(x)
        return y + getattr(self, f"{name}_lora")(x) if name in self.config.lora else y

    def _split_heads(self, x: Float[Array, "B T HK"]) -> Float[Array, "B T H K"]:
        x = x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)
        return constrain(x, "batch", "length", "heads", "kv")

    def keys_values(self, x_BSD: Float[Array, "B S D"]) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]:
        return self._split_heads(self._product("key", x_BSD)), self._split_heads(self._product("value", x_BSD))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        key_BSHK: Float[Array, "B S H K"],
        value_BSHK: Float[Array, "B S H K"],
        bias_HR: Float[Array, "H R"] | None,
        attention_mask: AttentionMask,
    ) -> Float[Array, "B T D"]:
        rate = self.config.dropout_rate if self.train else 0.0
        y_BTHK = dot_product_attention(
            self._split_heads(self._product("query", x_BTD)),
            key_BSHK,
            value_BSHK,
            bias_HR,
            attention_mask,
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None,
            implementation=self.config.attention,
        )
        return self._product("out", y_BTHK.reshape(*y_BTHK.shape[:2], -1))


def _relative_bias(config: T5Config, **options: Any) -> RelativePositionBias:
    return RelativePositionBias(config.num_heads, config.relative_buckets, config.relative_max_distance, **options)


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Without a given bias, the layer has its own."""

    config: T5Config
    train: bool

    @nn.compact
    def __call__(
        self, x_BSD: Float[Array, "B S D"], bias_HR: Float[Array, "H R"] | None, attention_mask: AttentionMask
    ) -> tuple[Float[Array, "B S D"], None]:
        c = self.config
        if bias_HR is None:
            bias_HR = _relative_bias(c, bidirectional=True, name="relpos_bias")()
        dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,), deterministic=not self.train)
        h_BSD = RMSNorm(c.compute_dtype, name="pre_attention_layer_norm")(x_BSD)
        attention = Attention(c, self.train, name="attention")
        h_BSD = attention(h_BSD, *attention.keys_values(h_BSD), bias_HR, attention_mask)
        x_BSD += dropout(h_BSD)
        h_BSD = RMSNorm(c.compute_dtype, name="pre_mlp_layer_norm")(x_BSD)
        lora = {"lora_rank": c.lora_rank, "lora_targets": c.lora}
        mlp = GatedMlp(c.d_ff, c.mlp_activations, c.dropout_rate, c.compute_dtype, self.train, **lora, name="mlp")
        h_BSD = mlp(h_BSD)
        if c.adapter_size:
            h_BSD = Adapter(c.adapter_size, c.compute_dtype, name="adapter")(h_BSD)
        x_BSD += dropout(h_BSD)
        return constrain(x_BSD, "batch", "length", "embed"), None


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention if there is an encoder, and the MLP, as pre-norm residual blocks.

    Without a given bias, the layer has its own.
    """

    config: T5Config
    train: bool

    def setup(self) -> None:
        c = self.config
        self.pre_self_attention_layer_norm = RMSNorm(c.compute_dtype)
        self.self_attention = Attention(c, self.train)
        if c.relative_bias == "per_layer":
            self.relpos_bias = _relative_bias(c, bidirectional=False)
        if not c.decoder_only:
            self.pre_cross_attention_layer_norm = RMSNorm(c.compute_dtype)
            self.encoder_decoder_attention = Attention(c, self.train)
        self.pre_mlp_layer_norm = RMSNorm(c.compute_dtype)
        lora = {"lora_rank": c.lora_rank, "lora_targets": c.lora}
        self.mlp = GatedMlp(c.d_ff, c.mlp_activations, c.dropout_rate, c.compute_dtype, self.train, **lora)
        if c.adapter_size:
            self.adapter = Adapter(c.adapter_size, c.compute_dtype)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,), deterministic=not self.train)

    def __call__(
        self,
        state: tuple[Float[Array, "B T D"], Cache | None],
        layer: Int[Array, ""],
        encoded_BSD: Float[Array, "B S D"] | None,
        bias_HR: Float[Array, "H R"] | None,
        self_attention_mask: AttentionMask,
        cross_attention_mask: AttentionMask,
        parents_B: Int[Array, " B"] | None,
    ) -> tuple[tuple[Float[Array, "B T D"], Cache | None], None]:
        x_BTD, cache = state
        h_BTD = self.pre_self_attention_layer_norm(x_BTD)
        key, value = self.self_attention.keys_values(h_BTD)
        if cache is not None:
            assert self_attention_mask.offset is not None
            offset = self_attention_mask.offset
            self_key, key = append_to_cache(cache.self_key, key, layer, offset, parents_B)
            self_value, value = append_to_cache(cache.self_value, value, layer, offset, parents_B)
            cache = dataclasses.replace(cache, self_key=self_key, self_value=self_value)
        if bias_HR is None:
            bias_HR = self.relpos_bias()
        x_BTD += self.dropout(self.self_attention(h_BTD, key, value, bias_HR, self_attention_mask))

        if not self.config.decoder_only:
            h_BTD = self.pre_cross_attention_layer_norm(x_BTD)
            cross = self.encoder_decoder_attention
            if encoded_BSD is not None:
                key, value = cross.keys_values(encoded_BSD)
            else:
                assert cache is not None and cache.cross_key is not None and cache.cross_value is not None
                key, value = layer_slice(cache.cross_key, layer), layer_slice(cache.cross_value, layer)
            # Consecutive rows decoded from the same inputs become queries of one row, since there is no causal mask.
            h_BTD = cross(h_BTD.reshape(key.shape[0], -1, h_BTD.shape[-1]), key, value, None, cross_attention_mask)
            x_BTD += self.dropout(h_BTD.reshape(x_BTD.shape))

        h_BTD = self.mlp(self.pre_mlp_layer_norm(x_BTD))
        if self.config.adapter_size:
            h_BTD = self.adapter(h_BTD)
        x_BTD += self.dropout(h_BTD)
        return (constrain(x_BTD, "batch", "length", "embed"), cache), None

    def cross_keys_values(self, carry: None, encoded_BSD: Float[Array, "B S D"]) -> tuple[None, tuple[Array, Array]]:
        key, value = self.encoder_decoder_attention.keys_values(encoded_BSD)
        return carry, (jnp.moveaxis(key, 1, -1), jnp.moveaxis(value, 1, -1))


def stack(layer: type[nn.Module], config: Any, length: int, **in_axes: tuple) -> type[nn.Module]:
    """Stack `length` layers, with parameters on a leading axis, by config.scan_layers and config.remat.

    in_axes: method -> scan axes of its arguments.
    """
    options = {
        "variable_axes": {"params": 0},
        "split_rngs": {"params": True, "dropout": True},
        "length": length,
        "unroll": 1 if config.scan_layers else length,
        "metadata_params": {nn.PARTITION_NAME: "layers"},
    }
    return nn.scan(
        remat.checkpointed(layer, config.remat, scanned=config.scan_layers),
        methods={method: {"in_axes": axes, **options} for method, axes in in_axes.items()},
    )


class Encoder(nn.Module):
    """The encoder stack: maps embedded inputs to encodings."""

    config: T5Config
    train: bool

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"], attention_mask: AttentionMask) -> Float[Array, "B S D"]:
        c = self.config
        dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,), deterministic=not self.train)
        bias_HR = None
        if c.relative_bias == "shared":
            bias_HR = _relative_bias(c, bidirectional=True, name="relpos_bias")()
        layers = stack(EncoderLayer, c, c.num_encoder_layers, __call__=(nn.broadcast, nn.broadcast))
        x_BSD = dropout(constrain(x_BSD, "batch", "length", "embed"))
        x_BSD, _ = layers(c, self.train, name="layers")(x_BSD, bias_HR, attention_mask)
        return dropout(RMSNorm(c.compute_dtype, name="encoder_norm")(x_BSD))


class Decoder(nn.Module):
    """The decoder stack: maps embedded tokens to hidden states, with cross-attention to encodings or their cache."""

    config: T5Config
    train: bool

    def setup(self) -> None:
        c = self.config
        if c.relative_bias == "shared":
            self.relpos_bias = _relative_bias(c, bidirectional=False)
        self.layers = stack(
            DecoderLayer,
            c,
            c.num_decoder_layers,
            __call__=(0, *(nn.broadcast,) * 5),
            cross_keys_values=(nn.broadcast,),
        )(c, self.train)
        self.decoder_norm = RMSNorm(c.compute_dtype)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,), deterministic=not self.train)
        if not c.tie_embeddings:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
            self.logits_dense = Dense(
                c.vocab_size, ("embed", "vocab"), init, c.compute_dtype, output_dtype=jnp.dtype("float32")
            )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        encoded_BSD: Float[Array, "B S D"] | None,
        self_attention_mask: AttentionMask,
        cross_attention_mask: AttentionMask,
        cache: Cache | None = None,
        parents_B: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        bias_HR = None
        if self.config.relative_bias == "shared":
            bias_HR = self.relpos_bias()
        x_BTD = self.dropout(constrain(x_BTD, "batch", "length", "embed"))
        layers = jnp.arange(self.config.num_decoder_layers)
        (x_BTD, cache), _ = self.layers(
            (x_BTD, cache), layers, encoded_BSD, bias_HR, self_attention_mask, cross_attention_mask, parents_B
        )
        return self.dropout(self.decoder_norm(x_BTD)), cache

    def start_cache(self, encoded_BSD: Float[Array, "B S D"] | None, rows: int, max_length: int) -> Cache:
        c = self.config
        cross = (None, None) if encoded_BSD is None else self.layers.cross_keys_values(None, encoded_BSD)[1]
        empty_LBHKT = jnp.zeros((c.num_decoder_layers, rows, c.num_heads, c.head_dim, max_length), c.compute_dtype)
        return Cache(empty_LBHKT, empty_LBHKT, *cross)
