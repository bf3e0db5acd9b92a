"""T5's layers. Shape, logical axes and initialiser of each parameter are defined in one place.

The letters of axes are defined in `t5.py`. Parameters are float32; a layer computes in the given dtype. This module
does not depend on configs, stacks, meshes or losses: `sharding.py` maps logical axis names to mesh axes.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_lite.model import quantization, remat
from t5x_lite.sharding import constrain

Initializer = Callable[..., Array]


def named_axes(init: Initializer, *axes: str | None) -> Initializer:
    """Return an initialiser that attaches these logical axes, which `sharding.py` maps to mesh axes."""
    return cast(Initializer, nn.with_logical_partitioning(init, axes))


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + 1e-6) * scale, in float32: no centring and no bias (T5X layers.LayerNorm).

    plus_one: the parameter is the scale minus 1 (Gemma). axis: its logical axis.
    """

    dtype: jnp.dtype
    epsilon: float = 1e-6
    plus_one: bool = False
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale_D = self.param("scale", named_axes(init, self.axis), (x.shape[-1],)) + float(self.plus_one)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * constrain(scale_D, None)).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(
    x: Float[Array, "*batch I"], kernel: Float[Array, "_ _"], output_dtype: jnp.dtype, axis: int = 0
) -> Float[Array, "*batch O"]:
    """Compute x @ kernel, with operands in x's dtype and the result in `output_dtype`.

    The kernel's gradient is rounded to x's dtype, as in T5X and torch's autocast, so that devices sum half as many
    bytes in bfloat16; on one CPU device XLA leaves the rounding out. The backward pass is explicit, because autodiff
    makes the kernel's gradient the transpose of a product, for which XLA's CPU compiler copies transposed activations:
    an MLP's forward and backward pass takes 1.7 times as long.

    Args:
      axis: the kernel's input axis: 0 for [I, O], 1 for [O, I]. Transposing the kernel instead does not work for its
        gradient: XLA's CPU compiler cannot run the transpose of a product of bfloat16 in float32.
    """
    return _product(x, kernel.astype(x.dtype), (x.ndim - 1,), (axis,), output_dtype)


def _project_forward(x: Array, kernel: Array, output_dtype: jnp.dtype, axis: int) -> tuple[Array, tuple[Array, Array]]:
    return project(x, kernel, output_dtype, axis), (x, kernel)


def _project_backward(
    output_dtype: jnp.dtype, axis: int, saved: tuple[Array, Array], d_y: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    d_y = d_y.astype(x.dtype)
    d_x = _product(d_y, kernel.astype(x.dtype), (x.ndim - 1,), (1 - axis,), x.dtype)
    # With one axis of rows XLA's CPU compiler transposes `left` apart from what computes it, which is quicker.
    left, right = (a.reshape(-1, a.shape[-1]) for a in ((x, d_y) if axis == 0 else (d_y, x)))
    return d_x, _product(left, right, (0,), (0,), x.dtype).astype(kernel.dtype)


def _product(a: Array, b: Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Contract pairs of axes; the result has the other axes, first those of `a`."""
    return jax.lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=dtype)


project.defvjp(_project_forward, _project_backward)


class Dense(nn.Module):
    """A matrix product, with a bias if `use_bias`. `axes` are the logical names of the kernel's input and output axes.

    Operands are cast to `dtype`; the result is `output_dtype` (default: `dtype`), accumulated at least as precisely.
    The kernel may be stored in int8 (quantization.py).
    """

    features: int
    axes: tuple[str | None, str | None]
    kernel_init: Initializer
    dtype: jnp.dtype
    output_dtype: jnp.dtype | None = None
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        output_dtype, stored = self.output_dtype or self.dtype, self.get_variable("params", "kernel")
        if quantization.is_quantized(stored):
            y = remat.keep(project(x.astype(self.dtype), stored["int8"].astype(self.dtype), output_dtype))
            y *= stored["scale"].astype(output_dtype)
        else:
            kernel_init = named_axes(self.kernel_init, *self.axes)
            kernel_IO = self.param("kernel", kernel_init, (x.shape[-1], self.features), jnp.float32)
            y = remat.keep(project(x.astype(self.dtype), kernel_IO, output_dtype))
        if not self.use_bias:
            return y
        bias_O = self.param("bias", named_axes(nn.initializers.zeros, self.axes[1]), (self.features,), jnp.float32)
        return y + bias_O.astype(y.dtype)


class Embed(nn.Module):
    """The token embedding [V, D], initialised N(0, 1). A gather: 1.24x as fast as T5X's one-hot product on CPU."""

    vocab_size: int
    features: int
    dtype: jnp.dtype
    embedding_init: Initializer = nn.initializers.normal(1.0)

    def setup(self) -> None:
        init = named_axes(self.embedding_init, "vocab", "embed")
        self.embedding = self.param("embedding", init, (self.vocab_size, self.features), jnp.float32)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        with jax.named_scope("embedding"):
            # Each device looks its columns of the table up, for the rows of all devices that have other columns. So
            # activations are sent, which are smaller than the table and its gradient.
            table_VD = constrain(self.embedding, "vocab", "embed")
            x_BTD = jnp.take(table_VD, constrain(tokens_BT, "batch", "length", first="embed"), axis=0)
            x_BTD = constrain(x_BTD.astype(self.dtype), "batch", "length", "embed", first="embed")
            return constrain(x_BTD, "batch", "length", "embed")

    def attend(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return the logits of every token, by the transposed table (tied output)."""
        return project(x_BTD, self.embedding, jnp.dtype("float32"), axis=1)


def relative_position_bucket(
    relative_position: Int[Array, "..."], *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Int[Array, "..."]:
    """Map (key position - query position) to a bucket in [0, num_buckets) (T5 paper 2.1; equals T5X on every integer).

    Half of the buckets hold one distance each; the other half grow logarithmically up to `max_distance`, and all larger
    distances share the last. If bidirectional, the upper half of the buckets is for keys after the query; otherwise
    those keys get bucket 0.
    """
    distance = -relative_position
    first = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = jnp.where(distance < 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(distance, 0)
    # The logarithm is computed on the host: an accelerator's could move a bucket boundary by one position.
    exact = num_buckets // 2
    distances = np.arange(max_distance + 1)
    with np.errstate(divide="ignore"):
        ratio = np.log(distances.astype(np.float32) / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    coarse = np.minimum(exact + (ratio * (num_buckets - exact)).astype(np.int32), num_buckets - 1)
    table = jnp.asarray(np.where(distances < exact, distances, coarse), jnp.int32)
    return first + table[jnp.minimum(distance, max_distance)]


class RelativePositionBias(nn.Module):
    """A learned scalar per head and distance bucket, added to the attention logits."""

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool

    @nn.compact
    def __call__(self) -> Float[Array, "H R"]:
        """Return the bias by distance, as `attention.dot_product_attention` takes it."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        init = named_axes(init, "heads", "relpos_buckets")
        table_HN = self.param("rel_embedding", init, (self.num_heads, self.num_buckets), jnp.float32)
        buckets_R = relative_position_bucket(
            jnp.arange(-self.max_distance, self.max_distance + 1),
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return jnp.take(table_HN, buckets_R, axis=1)


ACTIVATIONS: Mapping[str, Callable] = {"relu": nn.relu, "gelu": nn.gelu, "silu": nn.silu, "linear": lambda x: x}


class GatedMlp(nn.Module):
    """(product of act_i(x W_i)) W_o: ("relu",) is the MLP of T5 1.0, ("gelu", "linear") the GEGLU of T5 1.1.

    The dropout mask of the hidden layer is shared along the length, as in T5X. lora_targets: "wi" (every W_i), "wo".
    """

    hidden: int
    activations: Sequence[str]
    dropout_rate: float
    dtype: jnp.dtype
    train: bool
    lora_rank: int = 0
    lora_targets: Sequence[str] = ()

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        with jax.named_scope("mlp"):
            init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
            h_BTF: Array | None = None
            for i, activation in enumerate(self.activations):
                name = "wi" if len(self.activations) == 1 else f"wi_{i}"
                x_BTF = Dense(self.hidden, ("embed", "mlp"), init, self.dtype, name=name)(x_BTD)
                if "wi" in self.lora_targets:
                    lora = LowRank(self.lora_rank, self.hidden, ("embed", "mlp"), self.dtype, name=f"{name}_lora")
                    x_BTF += lora(x_BTD)
                x_BTF = ACTIVATIONS[activation](x_BTF)
                h_BTF = x_BTF if h_BTF is None else h_BTF * x_BTF
            h_BTF = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(h_BTF, deterministic=not self.train)
            h_BTF = constrain(h_BTF, "batch", "length", "mlp")
            y_BTD = Dense(x_BTD.shape[-1], ("mlp", "embed"), init, self.dtype, name="wo")(h_BTF)
            if "wo" in self.lora_targets:
                lora = LowRank(self.lora_rank, x_BTD.shape[-1], ("mlp", "embed"), self.dtype, name="wo_lora")
                y_BTD += lora(h_BTF)
            return y_BTD


class Adapter(nn.Module):
    """x + relu(x W_i) W_o, with few hidden units (Houlsby et al. 2019). W_o is initialised to 0."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        with jax.named_scope("adapter"):
            init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
            h_BTF = nn.relu(Dense(self.hidden, ("embed", "mlp"), init, self.dtype, name="wi")(x_BTD))
            h_BTF = constrain(h_BTF, "batch", "length", "mlp")
            return x_BTD + Dense(x_BTD.shape[-1], ("mlp", "embed"), nn.initializers.zeros, self.dtype, name="wo")(h_BTF)


class LowRank(nn.Module):
    """x A B, added to the output of a dense layer (LoRA, Hu et al. 2021). B is initialised to 0."""

    rank: int
    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        x = Dense(self.rank, (self.axes[0], "rank"), init, self.dtype, name="a")(x)
        return Dense(self.features, ("rank", self.axes[1]), nn.initializers.zeros, self.dtype, name="b")(x)
