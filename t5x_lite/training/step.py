"""One training step: the state, how it starts, and the pure functions that advance and evaluate it.

Gin file to gradient: run.py -> train.train -> step.train_step -> `jax.value_and_grad`. This module knows a model, an
optimizer and a loss; nothing of data sources, checkpoints or logs.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from t5x_lite import sharding
from t5x_lite.model.interface import Batch, ModelConfig, model_of
from t5x_lite.training.freezing import ALL_PARAMETERS, combine
from t5x_lite.training.losses import LossConfig, cross_entropy_sums, normalizer, squared_error_sums
from t5x_lite.training.optim import Optimizer

Metrics = dict[str, Float[Array, ""]]

T5_LOSS = LossConfig()


@flax.struct.dataclass
class TrainState:
    """All that a step changes, and the parameters that it does not. `step` counts the updates done."""

    step: Any  # int32 scalar; in an abstract state its shape, in one of shardings where it lies
    params: Any
    opt_state: Any


def _new_state(config: ModelConfig, optimizer: Optimizer, key: Key[Array, ""], params: Any = None) -> TrainState:
    params = nn.unbox(model_of(config).init(key)) if params is None else params
    return TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.transform.init(optimizer.trainable.partition(params)[0])
    )


@functools.lru_cache(maxsize=32)  # tracing a model takes a second
def _boxed_params(config: ModelConfig) -> Any:
    return jax.eval_shape(model_of(config).init, jax.eval_shape(lambda: jax.random.key(0)))


def abstract_params(config: ModelConfig, mesh: sharding.AnyMesh, rules: sharding.Rules = sharding.RULES) -> Any:
    """Shapes, dtypes and shardings of the parameters, without computing any of them."""
    boxed = _boxed_params(config)
    return sharding.shard_state(nn.unbox(boxed), boxed, mesh, rules)


def abstract_state(
    config: ModelConfig, optimizer: Optimizer, mesh: sharding.AnyMesh, rules: sharding.Rules = sharding.RULES
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without computing any of it (`jax.ShapeDtypeStruct` leaves)."""
    boxed, key = _boxed_params(config), jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key, params: _new_state(config, optimizer, key, params), key, nn.unbox(boxed))
    return sharding.shard_state(state, boxed, mesh, rules)


def init_state(
    config: ModelConfig, optimizer: Optimizer, key: Key[Array, ""], abstract: TrainState, params: Any = None
) -> TrainState:
    """A fresh state, each leaf made where it will lie. The same numbers on every mesh.

    Args:
      params: the parameters, whose memory the state takes over; None: random ones.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(
        lambda key, params: _new_state(config, optimizer, key, params), out_shardings=shardings, donate_argnums=1
    )
    return make(key, params)


def init_params(
    config: ModelConfig, key: Key[Array, ""], abstract: TrainState, names: Collection[str]
) -> dict[str, Array]:
    """Random values of the parameters with these names ("a/b/c") alone, the same as in `init_state`."""

    def named(tree: Any) -> dict[str, Any]:
        return {k: v for k, v in traverse_util.flatten_dict(tree, sep="/").items() if k in names}

    shardings = {name: leaf.sharding for name, leaf in named(abstract.params).items()}
    return jax.jit(lambda key: named(nn.unbox(model_of(config).init(key))), out_shardings=shardings)(key)


def param_count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _sums(
    logits: Mapping[str, Array], targets: Mapping[str, tuple[Array, Array]], loss: LossConfig
) -> dict[str, Metrics]:
    def sums(logits: Array, right: Array, weights: Array) -> Metrics:
        logits, weights = logits.reshape(*right.shape, -1), weights.astype(jnp.float32)
        if jnp.issubdtype(right.dtype, jnp.floating):
            return squared_error_sums(logits[..., 0], right, weights)
        options = {"z_loss": loss.z_loss, "label_smoothing": loss.label_smoothing}
        return cross_entropy_sums(logits, right, weights, **options)

    return {head: sums(logits[head], right, weights) for head, (right, weights) in targets.items()}


def train_step(
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    config: ModelConfig,
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
      `target_tokens` and `input_tokens`, without padding; `skipped`, 1 where loss, gradients or update are not finite:
      the step is then counted, and changes nothing else. BERT has the first four of each head, and the sum as `loss`;
      a head that is to hit a number only its `loss`, the squared error.
      Where not everything trains, `trainable_params`, the number of those that did; `grad_norm` is of what has
      gradients.
    """
    trained, frozen = optimizer.trainable.partition(state.params)
    model = model_of(config)
    targets = model.targets(batch)
    normalized = {
        head: normalizer(loss, weights, batch.get("decoder_segment_ids")) for head, (_, weights) in targets.items()
    }
    key = jax.random.fold_in(key, state.step)

    def loss_sums(trained: Any, part: dict[str, Any], index: Int[Array, ""]) -> tuple[Array, dict[str, Metrics]]:
        logits = model.logits(combine(trained, frozen), part["batch"], jax.random.fold_in(key, index))
        with jax.named_scope("loss"):
            sums = _sums(logits, part["targets"], loss)
        return sum((sums[head]["loss"] / normalized[head][1] for head in sums), jnp.float32(0.0)), sums

    def gradient(part: dict[str, Any], index: Int[Array, ""] | int) -> tuple[Any, dict[str, Metrics]]:
        (_, sums), grads = jax.value_and_grad(loss_sums, has_aux=True)(trained, part, jnp.asarray(index))
        return grads, sums

    whole = {
        "batch": dict(batch),
        "targets": {head: (classes, normalized[head][0]) for head, (classes, _) in targets.items()},
    }
    if num_microbatches == 1:
        grads, sums = gradient(whole, 0)
    else:
        # Part i takes rows i, i + n, ...: each device cuts up its own rows, and no row moves.
        def cut(rows: Array) -> Array:
            parts = jnp.swapaxes(rows.reshape(-1, num_microbatches, *rows.shape[1:]), 0, 1)
            return sharding.constrain(parts, None, "batch")

        parts = jax.tree.map(cut, whole)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts), 0))
        (grads, sums), _ = jax.lax.scan(
            lambda total, xs: (jax.tree.map(jnp.add, total, gradient(*xs)), None),
            zeros,
            (parts, jnp.arange(num_microbatches)),
        )

    with jax.named_scope("optimizer"):
        learning_rate = jnp.asarray(optimizer.schedule(state.step), jnp.float32)
        direction, opt_state = optax.with_extra_args_support(optimizer.transform).update(
            grads, state.opt_state, trained, learning_rate=learning_rate
        )
        moved = jax.tree.map(lambda p, d: p + (learning_rate * d).astype(p.dtype), trained, direction)
        moved = optimizer.trainable.apply_mask(state.step, moved, trained)
        found = means(sums)
        grad_norm = optax.tree.norm(grads)
        sound = jnp.isfinite(found["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(direction))
        moved, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old), (moved, opt_state), (trained, state.opt_state)
        )

    sides = ("inputs", "encoder_input_tokens", "decoder_target_tokens")
    tokens = sum(jnp.sum(batch[side] != 0) for side in sides if side in batch)
    target_tokens = jnp.sum(next(iter(targets.values()))[1] != 0)
    metrics = found | {
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(state.params),
        "target_tokens": target_tokens.astype(jnp.float32),
        "input_tokens": jnp.asarray(tokens - target_tokens, jnp.float32),
        "skipped": 1.0 - sound,
    }
    if optimizer.trainable != ALL_PARAMETERS:
        metrics["trainable_params"] = jnp.asarray(optimizer.trainable.count(state.params, state.step), jnp.float32)
    return TrainState(state.step + 1, combine(moved, frozen), opt_state), metrics


def means(sums: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of `eval_step`, perhaps added up over batches, as means over what counts: `train_step` says which."""
    found: dict[str, Any] = {}
    for head, of in sums.items():
        count = jnp.maximum(of["weights"], 1e-9)
        values = {"loss": of["loss"] / count}
        if "correct" in of:  # of classes, not of numbers
            values["cross_ent_loss"] = (of["loss"] - of["z_loss"]) / count
            values |= {"z_loss": of["z_loss"] / count, "accuracy": of["correct"] / count}
        found |= {f"{head}_{name}" if head else name: value for name, value in values.items()}
    return found if "" in sums else {"loss": sum(found[f"{head}_loss"] for head in sums)} | found


def eval_step(params: Any, batch: Batch, *, config: ModelConfig) -> dict[str, Metrics]:
    """Sums over a batch of the plain loss (no z-loss, no smoothing), of each head ("" is T5's).

    They are `loss`, `weights` and, of classes, `correct`.
    """
    model = model_of(config)
    return _sums(model.logits(params, batch), model.targets(batch), LossConfig(z_loss=0.0))


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
            with sharding.use_mesh(self.mesh, self.rules):
                return function(*args, **options)

        return traced
