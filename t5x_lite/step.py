"""One training step: the state, how it starts, and the pure functions that advance and evaluate it.

Gin file to gradient: run.py -> train.train -> step.train_step -> `jax.value_and_grad`. This module knows a model, an
optimizer and a loss; nothing of data sources, checkpoints or logs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from t5x_lite import sharding
from t5x_lite.losses import LossConfig, cross_entropy_sums, normalizer
from t5x_lite.model import T5, T5Config, forward
from t5x_lite.optim import Optimizer

Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]

T5_LOSS = LossConfig()


@flax.struct.dataclass
class TrainState:
    """All that a step changes. `step` counts the updates done."""

    step: Any  # int32 scalar; in an abstract state its shape, in one of shardings where it lies
    params: Any
    opt_state: Any


def _boxed_params(config: T5Config, key: Key[Array, ""]) -> Any:
    token = jnp.zeros((1, 1), jnp.int32)
    return T5(config).init(key, None if config.decoder_only else token, token)["params"]


def _new_state(config: T5Config, optimizer: Optimizer, key: Key[Array, ""]) -> TrainState:
    params = nn.unbox(_boxed_params(config, key))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.transform.init(params))


def abstract_state(
    config: T5Config, optimizer: Optimizer, mesh: sharding.AnyMesh, rules: sharding.Rules = sharding.RULES
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing any of it (`jax.ShapeDtypeStruct` leaves)."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: _new_state(config, optimizer, key), key)
    params = jax.eval_shape(lambda key: _boxed_params(config, key), key)
    return sharding.shard_state(state, params, mesh, rules)


def init_state(config: T5Config, optimizer: Optimizer, key: Key[Array, ""], abstract: TrainState) -> TrainState:
    """A fresh state, each leaf made where it will lie. The same numbers on every mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda key: _new_state(config, optimizer, key), out_shardings=shardings)(key)


def param_count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def train_step(
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    config: T5Config,
    optimizer: Optimizer,
    loss: LossConfig = T5_LOSS,
    num_microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update from one global batch.

    Args:
      key: of the run; the step, and then the micro-batch, are folded into it for dropout.
      num_microbatches: parts that are run one after the other to save memory. The loss is normalised by the whole
        batch, so without dropout the result is that of one part, up to rounding.

    Returns:
      The new state, and float32 scalars: `loss` (cross entropy + z-loss), `cross_ent_loss` and `z_loss`, in nats a
      target token; `accuracy`; `learning_rate` as used; `grad_norm`, `param_norm` (before the update);
      `target_tokens` and `input_tokens`, without padding.
    """
    weights_BT, factor = normalizer(loss, batch)
    key = jax.random.fold_in(key, state.step)

    def loss_sums(params: Any, part: Batch, index: Int[Array, ""]) -> tuple[Array, Metrics]:
        logits_BTV = forward(config, params, part, jax.random.fold_in(key, index))
        with jax.named_scope("loss"):
            sums = cross_entropy_sums(
                logits_BTV,
                part["decoder_target_tokens"],
                part["weights"],
                z_loss=loss.z_loss,
                label_smoothing=loss.label_smoothing,
            )
        return sums["loss"] / factor, sums

    def gradient(part: Batch, index: Int[Array, ""] | int) -> tuple[Any, Metrics]:
        (_, sums), grads = jax.value_and_grad(loss_sums, has_aux=True)(state.params, part, jnp.asarray(index))
        return grads, sums

    batch = {**batch, "weights": weights_BT}
    if num_microbatches == 1:
        grads, sums = gradient(batch, 0)
    else:
        # Part i takes rows i, i + n, ...: each device cuts up its own rows, and no row moves.
        parts = {
            name: sharding.constrain(
                jnp.swapaxes(rows.reshape(-1, num_microbatches, *rows.shape[1:]), 0, 1), None, "batch"
            )
            for name, rows in batch.items()
        }
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts), 0))
        (grads, sums), _ = jax.lax.scan(
            lambda total, xs: (jax.tree.map(jnp.add, total, gradient(*xs)), None),
            zeros,
            (parts, jnp.arange(num_microbatches)),
        )

    with jax.named_scope("optimizer"):
        learning_rate = jnp.asarray(optimizer.schedule(state.step), jnp.float32)
        direction, opt_state = optax.with_extra_args_support(optimizer.transform).update(
            grads, state.opt_state, state.params, learning_rate=learning_rate
        )
        params = jax.tree.map(lambda p, d: p + (learning_rate * d).astype(p.dtype), state.params, direction)

    targets = jnp.sum(batch["decoder_loss_weights"] != 0)
    sides = ("encoder_input_tokens", "decoder_target_tokens")
    tokens = sum(jnp.sum(batch[side] != 0) for side in sides if side in batch)
    metrics = _means(sums) | {
        "learning_rate": learning_rate,
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(state.params),
        "target_tokens": targets.astype(jnp.float32),
        "input_tokens": jnp.asarray(tokens - targets, jnp.float32),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def _means(sums: Metrics) -> Metrics:
    tokens = jnp.maximum(sums["weights"], 1e-9)
    return {
        "loss": sums["loss"] / tokens,
        "cross_ent_loss": (sums["loss"] - sums["z_loss"]) / tokens,
        "z_loss": sums["z_loss"] / tokens,
        "accuracy": sums["correct"] / tokens,
    }


def eval_step(params: Any, batch: Batch, *, config: T5Config) -> Metrics:
    """Sums over a batch of the plain cross entropy (no z-loss, no smoothing): `loss`, `correct`, `weights`."""
    logits_BTV = forward(config, params, batch)
    return cross_entropy_sums(
        logits_BTV,
        batch["decoder_target_tokens"],
        batch["decoder_loss_weights"].astype(jnp.float32),
        z_loss=0.0,
        label_smoothing=0.0,
    )


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Compiles step functions for one mesh: arguments and results lie where `abstract_state` says."""

    mesh: Mesh
    rules: sharding.Rules = sharding.RULES

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def train_step(self, abstract: TrainState, **options: Any) -> Callable:
        """`train_step` with its keyword arguments fixed; the old state's memory is reused for the new one."""
        state = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.jit(
            self._traced(train_step, **options),
            in_shardings=(state, sharding.batch_sharding(self.mesh, self.rules), self.replicated()),
            out_shardings=(state, self.replicated()),
            donate_argnums=0,
        )

    def with_params(self, function: Callable, abstract: TrainState, **options: Any) -> Callable:
        """`function(params, batch, **options)` -> results that every host can read."""
        params = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
        return jax.jit(
            self._traced(function, **options),
            in_shardings=(params, sharding.batch_sharding(self.mesh, self.rules)),
            out_shardings=self.replicated(),
        )

    def _traced(self, function: Callable, **options: Any) -> Callable:
        def traced(*args: Any) -> Any:
            with sharding.layout(self.mesh, self.rules):
                return function(*args, **options)

        return traced
