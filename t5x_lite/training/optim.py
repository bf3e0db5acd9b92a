"""Optimizers and learning rate schedules.

An optimizer is an optax transform without a learning rate, and a schedule. The transform turns gradients into the step
at learning rate 1; the training step multiplies it by the schedule's value, once, and logs that value. Any optax
transform without its own learning rate works.

A parameter under a path component `layers` is a stack of layers along axis 0; each layer is treated as a separate
parameter. This module must not depend on the model, the mesh or the loop. The state is a pytree in which the path of
each slot ends with the path of its parameter, so that sharding can match them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Float, Int
from optax import GradientTransformation, GradientTransformationExtraArgs

from t5x_lite.errors import UserError
from t5x_lite.model import quantization
from t5x_lite.model.config import StoredDtype
from t5x_lite.training.freezing import ALL_PARAMETERS, NO_PARAMETERS, ParameterFilter, Rules, combine, is_layer_stack

Schedule = Callable[[Any], Float[Array, ""]]

MIN_LEARNING_RATE = 1e-8  # T5X's floor; keeps warm-up from doing nothing at step 0


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A transform without a learning rate, and the learning rate of each step.

    Attributes:
      transform: `transform.update(grads, state, params, learning_rate=lr)` returns the descent step at learning rate 1:
        the parameters move by lr times it. Only momentum in Adafactor uses `learning_rate`.
      schedule: number of updates so far -> learning rate, a float32 scalar.
      trainable: the parameters that the transform updates.
      frozen_dtype: dtype in which the others are stored.
    """

    transform: GradientTransformation
    schedule: Schedule
    trainable: ParameterFilter = ALL_PARAMETERS
    frozen_dtype: StoredDtype = "float32"

    def stored(self, params: Any) -> Any:
        """Return the parameters, arrays or shapes, with the frozen ones as they are stored in their dtype."""
        if self.frozen_dtype == "float32":
            return params
        if self.trainable.rules is None:
            raise UserError(
                f"FROZEN_DTYPE = {self.frozen_dtype!r}, but all parameters train (with gradual unfreezing, in the end) "
                "in float32: say which do by the rules of TRAINABLE, as adapt/lora.gin does"
            )
        trained, frozen = self.trainable.partition(params)
        return combine(trained, quantization.stored(frozen, self.frozen_dtype))

    def without_training(self) -> "Optimizer":
        """Return the optimizer of a run that does not train: all parameters are frozen, unless rules say which."""
        if self.trainable.rules is not None:
            return self
        return dataclasses.replace(self, transform=optax.identity(), trainable=NO_PARAMETERS)


def make_optimizer(
    transform: GradientTransformation,
    schedule: Schedule,
    clip_norm: float | None = None,
    trainable: ParameterFilter | Rules | None = None,
    frozen_dtype: StoredDtype = "float32",
) -> Optimizer:
    """Create an `Optimizer`. With `clip_norm`, gradients with a larger global norm are first scaled down to it.

    Args:
      trainable: the parameters that train, or rules for them; None means all.
      frozen_dtype: dtype in which the others are stored. In bfloat16 they take half of the memory; to a model that
        computes in bfloat16 only the scales of norms and biases are not the same. In int8 kernels take a quarter
        (quantization.py), and the rest is in bfloat16.
    """
    if clip_norm is not None:
        _require(clip_norm > 0, "clip_norm must be > 0 or None", clip_norm)
        transform = optax.chain(optax.clip_by_global_norm(clip_norm), transform)
    if isinstance(trainable, Sequence) and not trainable:
        raise UserError("TRAINABLE = () trains nothing")
    chosen = trainable if isinstance(trainable, ParameterFilter) else ParameterFilter(trainable)
    return Optimizer(transform, schedule, chosen, frozen_dtype)


# Adafactor


class AdafactorState(NamedTuple):
    """Trees with the parameters' structure. An unused slot holds zeros of shape (1,), as in T5X."""

    count: Int[Array, ""]
    v_row: Any  # second moments averaged over the parameter's largest dimension ...
    v_col: Any  # ... and over its second largest, if it is factored
    v: Any  # second moments of a parameter that is not factored
    m: Any  # momentum, if beta1 is set


def adafactor(
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    min_dim_size_to_factor: int = 128,
    step_offset: int = 0,
    beta1: float | None = None,
) -> GradientTransformationExtraArgs:
    """Adafactor (Shazeer & Stern 2018) as in t5x/adafactor.py, computed layer by layer.

    Args:
      decay_rate: second moments decay by 1 - t^-decay_rate at update t = 1, 2, ...
      clipping_threshold: maximum RMS of an update before scaling by the parameter's scale; None means no clipping.
      multiply_by_parameter_scale: scale an update by max(epsilon2, RMS of the parameter).
      epsilon1: added to squared gradients.
      epsilon2: minimum scale of a parameter.
      min_dim_size_to_factor: second moments are factored along the two largest dimensions if both have this size.
      step_offset: number of updates of an earlier phase, subtracted from t, which is at least 1.
      beta1: decay of momentum, which T5 does not use. As in T5X it averages steps multiplied by their learning rate, so
        `update` then needs `learning_rate`.

    Raises:
      ValueError: an argument is out of range; at update, parameters are missing, or beta1 is set without learning_rate.
    """
    _require(0 < decay_rate <= 1, "adafactor.decay_rate must lie in (0, 1]", decay_rate)
    _require(
        clipping_threshold is None or clipping_threshold > 0,
        "adafactor.clipping_threshold must be > 0 or None",
        clipping_threshold,
    )
    _require(epsilon1 > 0, "adafactor.epsilon1 must be > 0", epsilon1)
    _require(epsilon2 > 0, "adafactor.epsilon2 must be > 0", epsilon2)
    _require(min_dim_size_to_factor > 0, "adafactor.min_dim_size_to_factor must be > 0", min_dim_size_to_factor)
    _require(step_offset >= 0, "adafactor.step_offset must be >= 0", step_offset)
    _require(beta1 is None or 0 <= beta1 < 1, "adafactor.beta1 must lie in [0, 1) or be None", beta1)

    def factored_dims(shape: Sequence[int]) -> tuple[int, int] | None:
        if len(shape) < 2:
            return None
        *_, second, largest = (int(d) for d in np.argsort(shape, kind="stable"))
        return (second, largest) if shape[second] >= min_dim_size_to_factor else None

    def init(params: optax.Params) -> AdafactorState:
        def slots(path: Any, param: Any) -> list[Array]:
            lead = 1 if is_layer_stack(path) else 0
            shape, unused = param.shape, (1,)
            dims = factored_dims(shape[lead:])
            if dims:
                second, largest = (d + lead for d in dims)
                shapes = [shape[:largest] + shape[largest + 1 :], shape[:second] + shape[second + 1 :], unused]
            else:
                shapes = [unused, unused, shape]
            return [jnp.zeros(s, jnp.float32) for s in (*shapes, unused if beta1 is None else shape)]

        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        columns = zip(*(slots(path, param) for path, param in leaves), strict=True)
        return AdafactorState(jnp.zeros((), jnp.int32), *(tree.unflatten(column) for column in columns))

    def layer_step(param: Array, grad: Array, *moments: Array, beta2: Array) -> tuple[Array, tuple[Array, ...]]:
        """Return one layer's ascent step at learning rate 1, and its new second moments."""
        squared = jnp.square(grad) + epsilon1
        if dims := factored_dims(param.shape):
            second, largest = dims
            v_row = beta2 * moments[0] + (1 - beta2) * jnp.mean(squared, axis=largest)
            v_col = beta2 * moments[1] + (1 - beta2) * jnp.mean(squared, axis=second)
            moments = (v_row, v_col)
            rows = second - (largest < second)  # axis of the second largest dimension after removing the largest
            row_factor = jax.lax.rsqrt(v_row / jnp.mean(v_row, axis=rows, keepdims=True))
            step = grad * jnp.expand_dims(row_factor, largest) * jnp.expand_dims(jax.lax.rsqrt(v_col), second)
        else:
            moments = (beta2 * moments[0] + (1 - beta2) * squared,)
            step = grad * jax.lax.rsqrt(moments[0])
        if clipping_threshold is not None:
            step /= jnp.maximum(1.0, _rms(step) / clipping_threshold)
        if multiply_by_parameter_scale:
            step *= jnp.maximum(_rms(param), epsilon2)
        return step, moments

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        learning_rate: Any = None,
        **_: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise UserError("adafactor needs the parameters: call update(grads, state, params)")
        if beta1 is not None and learning_rate is None:
            raise UserError("adafactor with beta1 needs the learning rate: call update(..., learning_rate=lr)")
        assert isinstance(state, AdafactorState)
        t = jnp.maximum(state.count - step_offset, 0).astype(jnp.float32) + 1
        step_of = functools.partial(layer_step, beta2=1 - t**-decay_rate)

        def one(path: Any, param: Array, grad: Array, *slots: Array) -> tuple[Array, ...]:
            v_row, v_col, v, m = slots
            stacked = is_layer_stack(path)
            factored = factored_dims(param.shape[stacked:]) is not None
            used = (v_row, v_col) if factored else (v,)
            compute = jax.vmap(step_of) if stacked else step_of
            step, used = compute(param.astype(jnp.float32), grad.astype(jnp.float32), *used)
            if beta1 is not None:
                m = beta1 * m + (1 - beta1) * learning_rate * step
                step = m / learning_rate
            return (-step, *used, v, m) if factored else (-step, v_row, v_col, *used, m)

        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        others = (tree.flatten_up_to(t) for t in (updates, state.v_row, state.v_col, state.v, state.m))
        columns = zip(*(one(*leaf, *rest) for leaf, *rest in zip(leaves, *others, strict=True)), strict=True)
        steps, *slots = (tree.unflatten(column) for column in columns)
        return steps, AdafactorState(state.count + 1, *slots)

    return GradientTransformationExtraArgs(init, update)


# AdamW


def adamw(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    rms_scaling: bool = True,
) -> GradientTransformation:
    """AdamW with steps scaled by max(1e-3, RMS of the parameter), as in nanoT5's AdamWScale.

    Weight decay is not scaled, and excludes vectors (the norms' scales). Two details follow optax instead of nanoT5:
    `eps` is added after bias correction, and the decay applies to the parameters before the step.

    Args:
      b1, b2: decay of the first and second moments.
      eps: added to the square root of the second moment.
      weight_decay: each step subtracts learning rate * weight_decay * parameter.
      rms_scaling: False gives plain AdamW.

    Raises:
      ValueError: an argument is out of range.
    """
    _require(0 <= b1 < 1, "adamw.b1 must lie in [0, 1)", b1)
    _require(0 <= b2 < 1, "adamw.b2 must lie in [0, 1)", b2)
    _require(eps > 0, "adamw.eps must be > 0", eps)
    _require(weight_decay >= 0, "adamw.weight_decay must be >= 0", weight_decay)

    def matrices(params: optax.Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim - is_layer_stack(path) >= 2, params)

    parts = [optax.scale_by_adam(b1, b2, eps)]
    if rms_scaling:
        parts.append(_scale_by_rms_of_parameters())
    if weight_decay > 0:
        parts.append(optax.add_decayed_weights(weight_decay, mask=matrices))
    return optax.chain(*parts, optax.scale(-1.0))


def _scale_by_rms_of_parameters() -> GradientTransformation:
    """Multiply each layer's step by max(1e-3, RMS of the layer's parameter)."""

    def scale(step: Array, param: Array) -> Array:
        return step * jnp.maximum(_rms(param.astype(jnp.float32)), 1e-3)

    def scaled(path: Any, step: Array, param: Array) -> Array:
        return (jax.vmap(scale) if is_layer_stack(path) else scale)(step, param)

    return optax.stateless(functools.partial(jax.tree_util.tree_map_with_path, scaled))


# Muon


def muon(momentum: float = 0.95, iterations: int = 5) -> GradientTransformation:
    """Muon (Jordan et al. 2024) by optax for the matrices in layers, and `adamw` for all other parameters.

    The step of a matrix is its momentum (Nesterov's) with all singular values brought near 1, scaled to an RMS of about
    max(1e-3, RMS of the parameter). So the learning rates of `adafactor` and `adamw` suit it.

    Args:
      momentum: decay of the mean of gradients.
      iterations: Newton-Schulz iterations, each of three products of matrices of the parameter's size.

    Raises:
      ValueError: an argument is out of range.
    """
    _require(0 <= momentum < 1, "muon.momentum must lie in [0, 1)", momentum)
    _require(iterations > 0, "muon.iterations must be > 0", iterations)

    def part(path: Any, param: Any) -> str:
        return "muon" if is_layer_stack(path) and param.ndim == 3 else "adamw"

    def dimensions(steps: optax.Updates) -> Any:
        return jax.tree.map(lambda step: optax.contrib.MuonDimensionNumbers(1, 2), steps)

    def unit_rms(steps: optax.Updates, _: Any = None) -> Any:
        return jax.tree.map(lambda step: step * np.sqrt(max(step.shape[1:])), steps)

    matrices = optax.chain(
        optax.contrib.scale_by_muon(ns_steps=iterations, beta=momentum, weight_dimension_numbers=dimensions),
        optax.stateless(unit_rms),
        _scale_by_rms_of_parameters(),
        optax.scale(-1.0),
    )
    return optax.partition(
        {"muon": matrices, "adamw": adamw()}, lambda params: jax.tree_util.tree_map_with_path(part, params)
    )


# Schedules: functions from the number of updates so far, n, to a learning rate.


def rsqrt_decay(base: float = 1.0, warmup_steps: int = 10_000) -> Schedule:
    """base / sqrt(max(n, warmup_steps)): constant, then inverse square root decay; T5 uses it for pre-training."""
    _require(base > 0, "rsqrt_decay.base must be > 0", base)
    _require(warmup_steps > 0, "rsqrt_decay.warmup_steps must be > 0", warmup_steps)
    return _floored(lambda n: base / jnp.sqrt(jnp.maximum(n, warmup_steps)))


def warmup_rsqrt_decay(base: float = 0.5, warmup_steps: int = 1000) -> Schedule:
    """`rsqrt_decay` multiplied by a linear warm-up from 0; T5X's default schedule."""
    decay = rsqrt_decay(base, warmup_steps)
    return _floored(lambda n: _warmup(n, warmup_steps) * decay(n))


def constant(value: float, warmup_steps: int = 0) -> Schedule:
    """`value` after a linear warm-up from 0 over warmup_steps; T5 fine-tunes at 0.001 without warm-up."""
    _require(value > 0, "constant.value must be > 0", value)
    _require(warmup_steps >= 0, "constant.warmup_steps must be >= 0", warmup_steps)
    return _floored(lambda n: value * _warmup(n, warmup_steps))


def linear(base: float, warmup_steps: int, total_steps: int, final: float = 0.0) -> Schedule:
    """A linear warm-up from 0 to `base` over warmup_steps, then linear decay to `final` at total_steps."""
    return _decay("linear", lambda done: 1 - done, base, warmup_steps, total_steps, final)


def cosine(base: float, warmup_steps: int, total_steps: int, final: float = 0.0) -> Schedule:
    """A linear warm-up from 0 to `base` over warmup_steps, then cosine decay to `final` at total_steps."""
    return _decay("cosine", lambda done: (1 + jnp.cos(jnp.pi * done)) / 2, base, warmup_steps, total_steps, final)


def _decay(
    name: str, shape: Callable[[Array], Array], base: float, warmup_steps: int, total_steps: int, final: float
) -> Schedule:
    """Make a schedule: warm-up to base, then decay to final as `shape` maps the completed fraction 0..1 to 1..0."""
    _require(base > 0, f"{name}.base must be > 0", base)
    _require(0 <= final <= base, f"{name}.final must lie between 0 and base = {base}", final)
    _require(warmup_steps >= 0, f"{name}.warmup_steps must be >= 0", warmup_steps)
    _require(total_steps > warmup_steps, f"{name}.total_steps must be above warmup_steps = {warmup_steps}", total_steps)

    def value(n: Array) -> Array:
        done = jnp.clip((n - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        return _warmup(n, warmup_steps) * (final + (base - final) * shape(done))

    return _floored(value)


def _warmup(n: Array, steps: int) -> Array | float:
    return jnp.minimum(1.0, n / steps) if steps else 1.0


def _floored(value: Callable[[Array], Any]) -> Schedule:
    def schedule(step: Any) -> Float[Array, ""]:
        n = jnp.asarray(step).astype(jnp.float32)
        return jnp.maximum(jnp.asarray(value(n), jnp.float32), MIN_LEARNING_RATE)

    return schedule


def _rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def _require(condition: bool, rule: str, value: Any) -> None:
    if not condition:
        raise UserError(f"{rule}, got {value!r}")
