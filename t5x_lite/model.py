"""T5 (Raffel et al. 2020): the encoder-decoder, versions 1.0 and 1.1, its decoder alone (a language model or a prefix
language model), and the configuration of its sizes.

Axes of every array are named by one letter, in names (`x_BTD`) and in einsum strings alike:

    B batch             D d_model            F d_ff (hidden layer of the MLP)
    S encoder length    H attention heads    V vocabulary
    T decoder length    K head_dim           L layers of a stack

The layers of a stack are stored stacked on a leading axis L, under the name `layers`, whether they are run by a scan
or unrolled: both have the same parameters, so checkpoints, optimizer and sharding know one layout only. Names are
T5X's. This module knows nothing of losses, optimizers, meshes or data; token 0 is padding, and starts the decoder.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from t5x_lite.attention import Implementation, Visibility, dot_product_attention
from t5x_lite.layers import (
    ACTIVATIONS,
    PRODUCT,
    Adapter,
    Dense,
    Embed,
    GatedMlp,
    LowRank,
    RelativePositionBias,
    RMSNorm,
)
from t5x_lite.sharding import constrain

Remat = Literal["none", "minimal", "full"]
Dtype = Literal["float32", "bfloat16"]
RelativeBias = Literal["shared", "per_layer"]


@dataclasses.dataclass(frozen=True)
class T5Config:
    """One T5. The published sizes are in `gin_configs/models/`.

    num_encoder_layers: 0 makes a decoder alone: inputs and targets follow each other in its row.
    prefix_lm: such a decoder sees all of the inputs from everywhere in them, not only what comes before.
    relative_bias: one table for all layers of a stack, or one in every layer (UMT5).
    adapter_size: hidden units of an adapter after each MLP (`layers.Adapter`); 0: none.
    lora_rank: of what is added to the kernels of query and value of every attention (`layers.LowRank`); 0: nothing.
    dtype: of activations; parameters, norms, softmax, logits and loss are float32 always.
    scan_layers: run a stack as one compiled loop (quick to compile) or unrolled (XLA may optimise across layers).
    remat: what the backward pass recomputes: "none", "minimal" (all but matrix products), "full" (all of a layer).
    attention: its implementation, where it can do what is asked; None: by platform and shape (attention.py).
    """

    d_model: int
    d_ff: int
    num_heads: int
    head_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    tie_embeddings: bool = False
    vocab_size: int = 32128
    prefix_lm: bool = False
    relative_bias: RelativeBias = "shared"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    adapter_size: int = 0
    lora_rank: int = 0
    dropout_rate: float = 0.0
    dtype: Dtype = "float32"
    scan_layers: bool = True
    remat: Remat = "none"
    attention: Implementation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        sizes = {"d_model": 1, "d_ff": 1, "num_heads": 1, "head_dim": 1, "num_decoder_layers": 1, "vocab_size": 1}
        for name, least in {**sizes, "num_encoder_layers": 0, "adapter_size": 0, "lora_rank": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"T5Config.{name} must be at least {least}, got {getattr(self, name)}")
        if self.prefix_lm and not self.decoder_only:
            raise ValueError(
                f"T5Config.prefix_lm is for a decoder alone, num_encoder_layers=0; got {self.num_encoder_layers}"
            )
        if unknown := [a for a in self.mlp_activations if a not in ACTIVATIONS]:
            raise ValueError(f"T5Config.mlp_activations has {unknown}; known: {sorted(ACTIVATIONS)}")
        if not self.mlp_activations:
            raise ValueError("T5Config.mlp_activations is empty; T5 1.0 has ('relu',), T5 1.1 ('gelu', 'linear')")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"T5Config.dropout_rate must be in [0, 1), got {self.dropout_rate}")
        if self.relative_buckets < 4 or self.relative_buckets % 4 or self.relative_max_distance < self.relative_buckets:
            raise ValueError(
                f"T5Config.relative_buckets={self.relative_buckets} must be a multiple of 4 and at most "
                f"relative_max_distance={self.relative_max_distance}"
            )
        check_choices(self, dtype=Dtype, remat=Remat, relative_bias=RelativeBias)

    @property
    def decoder_only(self) -> bool:
        return self.num_encoder_layers == 0

    @property
    def layout(self) -> Literal["encoder_decoder", "decoder"]:
        """How inputs and targets lie in a batch: apart, or one behind the other in one row."""
        return "decoder" if self.decoder_only else "encoder_decoder"

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def check_choices(config: Any, **kinds: Any) -> None:
    """Raises ValueError: a field is none of its kind's literals, or `attention` no implementation."""
    choices = {name: get_args(kind) for name, kind in kinds.items()} | {"attention": (*get_args(Implementation), None)}
    for name, among in choices.items():
        if getattr(config, name) not in among:
            raise ValueError(f"{type(config).__name__}.{name} must be one of {among}, got {getattr(config, name)!r}")


# Found in the names of the parameters that adapter_size and lora_rank add to a model.
ADDED = r"/adapter/|_lora/"


@flax.struct.dataclass
class Cache:
    """Keys and values of a decoder that is part of the way through: an explicit argument and result of `decode_step`.

    self_*: of the tokens decoded so far, zeros after them. cross_*: of the encoded inputs, complete from the start, or
    None without an encoder; several rows, one behind the other, may share one of these: the beams or samples of an
    input. The length comes last: a product with one query would else move it there, at each step.
    """

    self_key: Float[Array, "L B H K T"]
    self_value: Float[Array, "L B H K T"]
    cross_key: Float[Array, "L _ H K S"] | None = None
    cross_value: Float[Array, "L _ H K S"] | None = None


def _extended(
    x_LBHKT: Float[Array, "L B H K T"],
    new_BTHK: Float[Array, "B _ H K"],
    layer: Int[Array, ""],
    index: Int[Array, ""] | int,
    parents_B: Int[Array, " B"] | None,
) -> tuple[Float[Array, "L B H K T"], Float[Array, "B T H K"]]:
    """A cache with new tokens of a layer at `index`, written in place where XLA can; and that layer's part of it."""
    new_BHKT = jnp.moveaxis(new_BTHK, 1, -1)
    if parents_B is None:
        x_LBHKT = jax.lax.dynamic_update_slice(x_LBHKT, new_BHKT[None], (layer, 0, 0, 0, index))
        return x_LBHKT, _of_layer(x_LBHKT, layer)
    x_BHKT = jax.lax.dynamic_update_slice(x_LBHKT[layer][parents_B], new_BHKT, (0, 0, 0, index))
    return jax.lax.dynamic_update_slice(x_LBHKT, x_BHKT[None], (layer, 0, 0, 0, 0)), jnp.moveaxis(x_BHKT, -1, 1)


def _of_layer(x_LBHKT: Float[Array, "L B H K T"], layer: Int[Array, ""]) -> Float[Array, "B T H K"]:
    return jnp.moveaxis(x_LBHKT[layer], -1, 1)


class Attention(nn.Module):
    """Multi-head attention; keys and values come from `keys_values` (of x itself, of the encoder, or of a cache)."""

    config: T5Config
    train: bool

    def setup(self) -> None:
        c = self.config
        joined = c.num_heads * c.head_dim
        normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

        def query_init(*args: Any) -> Array:
            return normal(*args) / jnp.sqrt(c.head_dim)  # the scale that the logits do not get

        self.query = Dense(joined, ("embed", "joined_kv"), query_init, c.compute_dtype)
        self.key = Dense(joined, ("embed", "joined_kv"), normal, c.compute_dtype)
        self.value = Dense(joined, ("embed", "joined_kv"), normal, c.compute_dtype)
        self.out = Dense(c.d_model, ("joined_kv", "embed"), normal, c.compute_dtype)
        if c.lora_rank:
            self.query_lora = LowRank(c.lora_rank, joined, ("embed", "joined_kv"), c.compute_dtype)
            self.value_lora = LowRank(c.lora_rank, joined, ("embed", "joined_kv"), c.compute_dtype)

    def _split_heads(self, x: Float[Array, "B T HK"]) -> Float[Array, "B T H K"]:
        x = x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)
        return constrain(x, "batch", "length", "heads", "kv")

    def keys_values(self, x_BSD: Float[Array, "B S D"]) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]:
        value = self.value(x_BSD)
        if self.config.lora_rank:
            value += self.value_lora(x_BSD)
        return self._split_heads(self.key(x_BSD)), self._split_heads(value)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        key_BSHK: Float[Array, "B S H K"],
        value_BSHK: Float[Array, "B S H K"],
        bias_HTS: Float[Array, "H T S"] | None,
        visibility: Visibility,
    ) -> Float[Array, "B T D"]:
        rate = self.config.dropout_rate if self.train else 0.0
        query = self.query(x_BTD)
        if self.config.lora_rank:
            query += self.query_lora(x_BTD)
        y_BTHK = dot_product_attention(
            self._split_heads(query),
            key_BSHK,
            value_BSHK,
            bias_HTS,
            visibility,
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None,
            implementation=self.config.attention,
        )
        y_BTHK = checkpoint_name(y_BTHK, PRODUCT)  # kept, a fused kernel's forward pass is not run again
        return self.out(y_BTHK.reshape(*y_BTHK.shape[:2], -1))


def _relative_bias(config: T5Config, **options: Any) -> RelativePositionBias:
    return RelativePositionBias(config.num_heads, config.relative_buckets, config.relative_max_distance, **options)


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Where no bias is given, the layer has its own."""

    config: T5Config
    train: bool

    @nn.compact
    def __call__(
        self, x_BSD: Float[Array, "B S D"], bias_HSS: Float[Array, "H S S"] | None, visibility: Visibility
    ) -> tuple[Float[Array, "B S D"], None]:
        c = self.config
        if bias_HSS is None:
            positions_S = jnp.arange(x_BSD.shape[1])
            bias_HSS = _relative_bias(c, bidirectional=True, name="relpos_bias")(positions_S, positions_S)
        dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,), deterministic=not self.train)
        h_BSD = RMSNorm(c.compute_dtype, name="pre_attention_layer_norm")(x_BSD)
        attention = Attention(c, self.train, name="attention")
        h_BSD = attention(h_BSD, *attention.keys_values(h_BSD), bias_HSS, visibility)
        x_BSD += dropout(h_BSD)
        h_BSD = RMSNorm(c.compute_dtype, name="pre_mlp_layer_norm")(x_BSD)
        mlp = GatedMlp(c.d_ff, c.mlp_activations, c.dropout_rate, c.compute_dtype, self.train, name="mlp")
        h_BSD = mlp(h_BSD)
        if c.adapter_size:
            h_BSD = Adapter(c.adapter_size, c.compute_dtype, name="adapter")(h_BSD)
        x_BSD += dropout(h_BSD)
        return constrain(x_BSD, "batch", "length", "embed"), None


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoded inputs if any, and the MLP, each on a normed input and added.

    Where no bias is given, the layer has its own.
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
        self.mlp = GatedMlp(c.d_ff, c.mlp_activations, c.dropout_rate, c.compute_dtype, self.train)
        if c.adapter_size:
            self.adapter = Adapter(c.adapter_size, c.compute_dtype)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,), deterministic=not self.train)

    def __call__(
        self,
        state: tuple[Float[Array, "B T D"], Cache | None],
        layer: Int[Array, ""],
        encoded_BSD: Float[Array, "B S D"] | None,
        bias_HTS: Float[Array, "H T _"] | None,
        self_visibility: Visibility,
        cross_visibility: Visibility,
        parents_B: Int[Array, " B"] | None,
    ) -> tuple[tuple[Float[Array, "B T D"], Cache | None], None]:
        x_BTD, cache = state
        h_BTD = self.pre_self_attention_layer_norm(x_BTD)
        key, value = self.self_attention.keys_values(h_BTD)
        if cache is not None:
            where = (layer, self_visibility.offset, parents_B)
            self_key, key = _extended(cache.self_key, key, *where)
            self_value, value = _extended(cache.self_value, value, *where)
            cache = dataclasses.replace(cache, self_key=self_key, self_value=self_value)
        if bias_HTS is None:
            positions_T = self_visibility.offset + jnp.arange(x_BTD.shape[1])
            bias_HTS = self.relpos_bias(positions_T, jnp.arange(key.shape[1]))
        x_BTD += self.dropout(self.self_attention(h_BTD, key, value, bias_HTS, self_visibility))

        if not self.config.decoder_only:
            h_BTD = self.pre_cross_attention_layer_norm(x_BTD)
            cross = self.encoder_decoder_attention
            if encoded_BSD is not None:
                key, value = cross.keys_values(encoded_BSD)
            else:
                assert cache is not None and cache.cross_key is not None and cache.cross_value is not None
                key, value = _of_layer(cache.cross_key, layer), _of_layer(cache.cross_value, layer)
            # Rows that are decoded from the same inputs, one behind the other, are queries of one row: all see all.
            h_BTD = cross(h_BTD.reshape(key.shape[0], -1, h_BTD.shape[-1]), key, value, None, cross_visibility)
            x_BTD += self.dropout(h_BTD.reshape(x_BTD.shape))

        h_BTD = self.mlp(self.pre_mlp_layer_norm(x_BTD))
        if self.config.adapter_size:
            h_BTD = self.adapter(h_BTD)
        x_BTD += self.dropout(h_BTD)
        return (constrain(x_BTD, "batch", "length", "embed"), cache), None

    def cross_keys_values(self, carry: None, encoded_BSD: Float[Array, "B S D"]) -> tuple[None, tuple[Array, Array]]:
        key, value = self.encoder_decoder_attention.keys_values(encoded_BSD)
        return carry, (jnp.moveaxis(key, 1, -1), jnp.moveaxis(value, 1, -1))


def _remat(layer: type[nn.Module], config: Any) -> type[nn.Module]:
    if config.remat == "none":
        return layer
    # By name, for JAX's policies for products do not see into functions with a backward pass of their own, as Dense is.
    policy = None if config.remat == "full" else jax.checkpoint_policies.save_only_these_names(PRODUCT)
    # A scan already keeps XLA from merging the recomputation with the first pass; unrolled layers need the barrier.
    return nn.remat(layer, policy=policy, prevent_cse=not config.scan_layers)


def stack(layer: type[nn.Module], config: Any, length: int, **in_axes: tuple) -> type[nn.Module]:
    """`length` layers under one name, parameters on a leading axis, as config.scan_layers and config.remat say.

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
        _remat(layer, config), methods={method: {"in_axes": axes, **options} for method, axes in in_axes.items()}
    )


class Encoder(nn.Module):
    """Embedded inputs to encodings."""

    config: T5Config
    train: bool

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"], visibility: Visibility) -> Float[Array, "B S D"]:
        c = self.config
        dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,), deterministic=not self.train)
        bias_HSS = None
        if c.relative_bias == "shared":
            positions_S = jnp.arange(x_BSD.shape[1])
            bias_HSS = _relative_bias(c, bidirectional=True, name="relpos_bias")(positions_S, positions_S)
        layers = stack(EncoderLayer, c, c.num_encoder_layers, __call__=(nn.broadcast, nn.broadcast))
        x_BSD = dropout(constrain(x_BSD, "batch", "length", "embed"))
        x_BSD, _ = layers(c, self.train, name="layers")(x_BSD, bias_HSS, visibility)
        return dropout(RMSNorm(c.compute_dtype, name="encoder_norm")(x_BSD))


class Decoder(nn.Module):
    """Embedded tokens, attending to the encodings (or to a cache of them) if there are any, to hidden states."""

    config: T5Config
    train: bool

    def setup(self) -> None:
        c = self.config
        if c.relative_bias == "shared":
            self.relpos_bias = _relative_bias(c, bidirectional=False)
        everywhere = nn.broadcast
        self.layers = stack(
            DecoderLayer,
            c,
            c.num_decoder_layers,
            __call__=(0, everywhere, everywhere, everywhere, everywhere, everywhere),
            cross_keys_values=(everywhere,),
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
        self_visibility: Visibility,
        cross_visibility: Visibility,
        cache: Cache | None = None,
        parents_B: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        bias_HTS = None
        if self.config.relative_bias == "shared":
            length = x_BTD.shape[1]
            keys = length if cache is None else cache.self_key.shape[-1]
            bias_HTS = self.relpos_bias(self_visibility.offset + jnp.arange(length), jnp.arange(keys))
        x_BTD = self.dropout(constrain(x_BTD, "batch", "length", "embed"))
        layers = jnp.arange(self.config.num_decoder_layers)
        (x_BTD, cache), _ = self.layers(
            (x_BTD, cache), layers, encoded_BSD, bias_HTS, self_visibility, cross_visibility, parents_B
        )
        return self.dropout(self.decoder_norm(x_BTD)), cache

    def start_cache(self, encoded_BSD: Float[Array, "B S D"] | None, rows: int, max_length: int) -> Cache:
        c = self.config
        cross = (None, None) if encoded_BSD is None else self.layers.cross_keys_values(None, encoded_BSD)[1]
        empty_LBHKT = jnp.zeros((c.num_decoder_layers, rows, c.num_heads, c.head_dim, max_length), c.compute_dtype)
        return Cache(empty_LBHKT, empty_LBHKT, *cross)


class T5(nn.Module):
    """T5 1.0 and 1.1. `T5(config, train=True)` has dropout on and needs a "dropout" key where the rate is above 0.

    Of a decoder alone the encoder's arguments are None; a row holds inputs and targets one behind the other, and
    `decoder_causal_attention` (SeqIO's name) is 1 where a prefix language model's tokens see one another: where the
    start token and then the inputs are read.

    Token arrays are int32, 0 is padding. Segment ids (0 = padding) are given when several examples are packed into one
    row, and keep them apart. Positions are not asked for: T5 knows relative positions only, and those within a segment
    are differences of indices.
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
        """Teacher-forced logits, float32."""
        encoded_BSD = None if self.config.decoder_only else self.encode(encoder_input_tokens, encoder_segment_ids)
        return self.decode(
            *(encoded_BSD, encoder_input_tokens, decoder_input_tokens),
            *(encoder_segment_ids, decoder_segment_ids, decoder_causal_attention),
        )

    def encode(
        self, encoder_input_tokens: Int[Array, "B S"] | None, encoder_segment_ids: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        if encoder_input_tokens is None:
            raise ValueError("an encoder-decoder needs encoder_input_tokens")
        segments = _segments(encoder_input_tokens, encoder_segment_ids)
        return self.encoder(self.token_embedder(encoder_input_tokens), Visibility(segments, segments))

    def decode(
        self,
        encoded_BSD: Float[Array, "B S D"] | None,
        encoder_input_tokens: Int[Array, "B S"] | None,
        decoder_input_tokens: Int[Array, "B T"],
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        decoder_causal_attention: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits for all target positions at once, float32.

        Targets that are not packed need no mask beside the causal one: padding comes last, where nothing sees it.
        """
        x_BTD, _ = self.decoder(
            self.token_embedder(decoder_input_tokens),
            encoded_BSD,
            Visibility(decoder_segment_ids, decoder_segment_ids, self._prefix(decoder_causal_attention), causal=True),
            Visibility(decoder_segment_ids, _segments(encoder_input_tokens, encoder_segment_ids)),
        )
        return self._logits(x_BTD)

    def _prefix(self, decoder_causal_attention: Array | None) -> Array | None:
        return decoder_causal_attention if self.config.prefix_lm else None

    def start_cache(self, encoded_BSD: Float[Array, "B S D"] | None, rows: int, max_length: int) -> Cache:
        """The cache of B = `rows` rows before the first token, with room for `max_length` tokens."""
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
        """Logits of the next tokens (usually one), at positions index, index + 1, ...; and the new cache.

        Args:
          parents: row b goes on from what row parents[b] of the cache has decoded; None: each from its own.
          decoder_segment_ids, decoder_causal_attention: of all M places of the cache: segment 0 is never seen, which
            lets rows of different lengths end at the same place.
        """
        x_BTD, new_cache = self.decoder(
            self.token_embedder(decoder_input_tokens),
            None,
            Visibility(None, decoder_segment_ids, self._prefix(decoder_causal_attention), offset=index, causal=True),
            Visibility(None, _segments(encoder_input_tokens, None)),
            cache,
            parents,
        )
        assert new_cache is not None
        return self._logits(x_BTD), new_cache

    def _logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        with jax.named_scope("logits"):
            if self.config.tie_embeddings:
                logits_BTV = self.token_embedder.attend(x_BTD / jnp.sqrt(self.config.d_model).astype(x_BTD.dtype))
            else:
                logits_BTV = self.decoder.logits_dense(x_BTD)
            return constrain(logits_BTV, "batch", "length", "vocab")


def _segments(tokens: Int[Array, "B S"] | None, segment_ids: Int[Array, "B S"] | None) -> Int[Array, "B S"] | None:
    """A row that is not packed is one segment and padding."""
    return (tokens != 0).astype(jnp.int32) if segment_ids is None and tokens is not None else segment_ids


def forward(
    config: T5Config, params: Any, batch: Mapping[str, Array], dropout_key: Key[Array, ""] | None = None
) -> Float[Array, "B T V"]:
    """Teacher-forced logits of a batch of SeqIO's fields, packed or not; with dropout if a key is given."""
    logits_BTV = T5(config, train=dropout_key is not None).apply(
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
