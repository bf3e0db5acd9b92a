"""BERT as published (Devlin et al. 2019): a bidirectional encoder with its heads.

It shares T5's attention, token embedding and layer stack (scan, remat). Unlike T5, it is post-norm, with centred layer
norms and a bias in every layer, learned position and segment embeddings, and attention logits divided by sqrt(K).
Letters of axes are those of model/t5.py; N is classes. Token 0 is padding and masked. This module does not depend on
losses, optimizers, data or files.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num

from t5x_lite.bert import BertConfig
from t5x_lite.errors import UserError
from t5x_lite.model import classes
from t5x_lite.model.attention import AttentionMask, dot_product_attention
from t5x_lite.model.layers import Dense, Embed, named_axes
from t5x_lite.model.transformer import stack
from t5x_lite.sharding import constrain

# Truncated at two standard deviations, as `create_initializer` of google-research/bert.
_INIT = nn.initializers.truncated_normal(0.02)
_EPSILON = 1e-12  # in layer norms


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-12) * scale + bias, in float32."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale_D = self.param("scale", named_axes(nn.initializers.ones, "embed"), (x.shape[-1],))
        bias_D = self.param("bias", named_axes(nn.initializers.zeros, "embed"), (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _EPSILON)
        return (x * constrain(scale_D, None) + constrain(bias_D, None)).astype(self.dtype)


_affine = functools.partial(Dense, kernel_init=_INIT, use_bias=True)


class SelfAttention(nn.Module):
    config: BertConfig
    train: bool

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"], attention_mask: AttentionMask) -> Float[Array, "B S D"]:
        c = self.config

        def heads(name: str) -> Float[Array, "B S H K"]:
            x = _affine(c.d_model, ("embed", "joined_kv"), dtype=c.compute_dtype, name=name)(x_BSD)
            return constrain(x.reshape(*x.shape[:2], c.num_heads, c.head_dim), "batch", "length", "heads", "kv")

        rate = c.dropout_rate if self.train else 0.0
        y_BSHK = dot_product_attention(
            heads("query") * c.head_dim**-0.5,
            heads("key"),
            heads("value"),
            None,
            attention_mask,
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate else None,
            implementation=c.attention,
        )
        out = _affine(c.d_model, ("joined_kv", "embed"), dtype=c.compute_dtype, name="out")
        return out(y_BSHK.reshape(*y_BSHK.shape[:2], -1))


class Mlp(nn.Module):
    """gelu(x W_i + b_i) W_o + b_o, with the exact (erf) gelu."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        c = self.config
        with jax.named_scope("mlp"):
            h_BSF = nn.gelu(
                _affine(c.d_ff, ("embed", "mlp"), dtype=c.compute_dtype, name="wi")(x_BSD), approximate=False
            )
            h_BSF = constrain(h_BSF, "batch", "length", "mlp")
            return _affine(c.d_model, ("mlp", "embed"), dtype=c.compute_dtype, name="wo")(h_BSF)


class BertLayer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    config: BertConfig
    train: bool

    def setup(self) -> None:
        c = self.config
        self.attention = SelfAttention(c, self.train)
        self.attention_norm = LayerNorm(c.compute_dtype)
        self.mlp = Mlp(c)
        self.mlp_norm = LayerNorm(c.compute_dtype)
        self.dropout = nn.Dropout(c.dropout_rate, deterministic=not self.train)

    def __call__(
        self, x_BSD: Float[Array, "B S D"], attention_mask: AttentionMask
    ) -> tuple[Float[Array, "B S D"], None]:
        x_BSD = self.attention_norm(x_BSD + self.dropout(self.attention(x_BSD, attention_mask)))
        x_BSD = self.mlp_norm(x_BSD + self.dropout(self.mlp(x_BSD)))
        return constrain(x_BSD, "batch", "length", "embed"), None

    def kept(self, x_BSD: Float[Array, "B S D"], attention_mask: AttentionMask) -> tuple[Array, Array]:
        """Like `__call__`, but also returns the output, so that `scan` collects every layer."""
        x_BSD, _ = self(x_BSD, attention_mask)
        return x_BSD, x_BSD


class Encoder(nn.Module):
    config: BertConfig
    train: bool

    def setup(self) -> None:
        c = self.config
        axes = (nn.broadcast,)
        self.layers = stack(BertLayer, c, c.num_layers, __call__=axes, kept=axes)(c, self.train)

    def __call__(self, x_BSD: Float[Array, "B S D"], attention_mask: AttentionMask) -> Float[Array, "B S D"]:
        return self.layers(x_BSD, attention_mask)[0]

    def hidden(self, x_BSD: Float[Array, "B S D"], attention_mask: AttentionMask) -> Float[Array, "L B S D"]:
        return self.layers.kept(x_BSD, attention_mask)[1]


class MaskedLM(nn.Module):
    """The masked-LM head: a transform, then the transposed token embedding and a bias; logits for each position."""

    config: BertConfig

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"], table: Embed) -> Float[Array, "B S V"]:
        c = self.config
        with jax.named_scope("logits"):
            h_BSD = nn.gelu(_affine(c.d_model, ("embed", None), dtype=c.compute_dtype, name="transform")(x_BSD), False)
            h_BSD = LayerNorm(c.compute_dtype, name="norm")(h_BSD)
            bias_V = self.param("bias", named_axes(nn.initializers.zeros, "vocab"), (c.vocab_size,), jnp.float32)
            return constrain(table.attend(h_BSD) + bias_V, "batch", "length", "vocab")


class Bert(nn.Module):
    """The BERT model. `Bert(config, train=True)` turns dropout on and needs a "dropout" key if the rate is above 0.

    All methods take tokens; segments, 0 or 1 (None: all 0); and a mask, 0 where masked (None: at padding).
    """

    config: BertConfig
    train: bool = False

    def setup(self) -> None:
        c = self.config
        self.token_embedder = Embed(c.vocab_size, c.d_model, c.compute_dtype, _INIT)
        table = named_axes(_INIT, None, "embed")
        self.position_embedding = self.param("position_embedding", table, (c.max_length, c.d_model), jnp.float32)
        self.segment_embedding = self.param("segment_embedding", table, (c.num_segments, c.d_model), jnp.float32)
        self.embedding_norm = LayerNorm(c.compute_dtype)
        self.dropout = nn.Dropout(c.dropout_rate, deterministic=not self.train)
        self.encoder = Encoder(c, self.train)
        float32 = jnp.dtype("float32")
        if "pooler" in c.heads:
            self.pooler = _affine(c.d_model, ("embed", None), dtype=c.compute_dtype)
        if "mlm" in c.heads:
            self.mlm = MaskedLM(c)
        if "nsp" in c.heads:
            self.nsp = _affine(2, ("embed", None), dtype=c.compute_dtype, output_dtype=float32)
        if "classify" in c.heads:
            self.classify = _affine(c.num_labels, ("embed", None), dtype=c.compute_dtype, output_dtype=float32)

    def __call__(
        self,
        tokens_BS: Int[Array, "B S"],
        segments_BS: Int[Array, "B S"] | None = None,
        mask_BS: Int[Array, "B S"] | None = None,
    ) -> dict[str, Array]:
        """Return the output of each head of the config: pooler [B, D] in the config's dtype, and float32 logits: mlm
        [B, S, V], nsp [B, 2] (class 0: it follows), classify [B, N]."""
        x_BSD = self.encoder(*self._embedded(tokens_BS, segments_BS, mask_BS))
        outputs: dict[str, Array] = {}
        if "mlm" in self.config.heads:
            outputs["mlm"] = self.mlm(x_BSD, self.token_embedder)
        if "pooler" in self.config.heads:
            outputs["pooler"] = pooled_BD = nn.tanh(self.pooler(x_BSD[:, 0]))
            if "nsp" in self.config.heads:
                outputs["nsp"] = self.nsp(pooled_BD)
            if "classify" in self.config.heads:
                outputs["classify"] = self.classify(self.dropout(pooled_BD))
        return outputs

    def hidden(
        self,
        tokens_BS: Int[Array, "B S"],
        segments_BS: Int[Array, "B S"] | None = None,
        mask_BS: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "_ B S D"]:
        """Return the embeddings and the output of every layer, L + 1 arrays."""
        x_BSD, attention_mask = self._embedded(tokens_BS, segments_BS, mask_BS)
        return jnp.concatenate([x_BSD[None], self.encoder.hidden(x_BSD, attention_mask)])

    def _embedded(
        self, tokens_BS: Array, segments_BS: Array | None, mask_BS: Array | None
    ) -> tuple[Float[Array, "B S D"], AttentionMask]:
        c, length = self.config, tokens_BS.shape[1]
        if length > c.max_length:
            raise UserError(f"a row has {length} tokens, but BertConfig.max_length is {c.max_length}: truncate it")
        segments_BS = jnp.zeros_like(tokens_BS) if segments_BS is None else segments_BS
        position_SD = constrain(self.position_embedding, None, None)[:length]
        segment_BSD = jnp.take(constrain(self.segment_embedding, None, None), segments_BS, axis=0)
        x_BSD = self.token_embedder(tokens_BS).astype(jnp.float32) + position_SD + segment_BSD
        x_BSD = self.dropout(self.embedding_norm(x_BSD))
        visible_BS = (tokens_BS if mask_BS is None else mask_BS) != 0
        return constrain(x_BSD, "batch", "length", "embed"), AttentionMask(None, visible_BS.astype(jnp.int32))


def forward(
    config: BertConfig, params: Any, batch: Mapping[str, Array], dropout_key: Key[Array, ""] | None = None
) -> dict[str, Array]:
    """Return the output of each head for `inputs` and `segments` [B, S]; dropout is on if a key is given."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    model = Bert(config, train=dropout_key is not None)
    outputs = model.apply({"params": params}, batch["inputs"], batch["segments"], rngs=rngs)
    assert isinstance(outputs, dict)
    return outputs


def targets(batch: Mapping[str, Array]) -> dict[str, tuple[Num[Array, "B _"], Num[Array, "B _"]]]:
    """Return targets and weights of each head that the batch has targets for; ignored positions have weight 0.

    "mlm": `targets` [B, S], where not 0. "nsp": `random` [B, 1]. "classify": see
    classes.targets. Padding rows have weight 0. The loss is the sum of the heads' weighted means over the batch: cross
    entropy (run_pretraining.py and run_classifier.py of google-research/bert) or, for regression, squared error.
    """
    real_B1 = jnp.any(batch["inputs"] != 0, axis=-1, keepdims=True)
    by_head: dict[str, tuple[Array, Array]] = {}
    if "targets" in batch:
        by_head["mlm"] = (batch["targets"], batch["targets"] != 0)
    if "random" in batch:
        by_head["nsp"] = (batch["random"], real_B1)
    if "label" in batch:
        by_head["classify"] = classes.targets(batch["inputs"], batch["label"])
    return {head: (labels, weights.astype(jnp.float32)) for head, (labels, weights) in by_head.items()}
