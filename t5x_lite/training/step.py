"""The train state, its initialisation, and the pure functions that update and evaluate it.

From a gin file to gradients: run.py -> train.train -> step.train_step -> `jax.value_and_grad`. This module uses a
model, an optimizer and a loss; it must not depend on data sources, checkpoints or logs.
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
from t5x_lite.model import quantization
from t5x_lite.model.config import ModelConfig
from t5x_lite.model.families import model_of
from t5x_lite.model.interface import Batch
from t5x_lite.training.freezing import ALL_PARAMETERS, combine
from t5x_lite.training.losses import LossConfig, cross_entropy_sums, normalizer, squared_error_sums
from t5x_lite.training.optim import Optimizer

Metrics = dict[str, Float[Array, ""]]

T5_LOSS = LossConfig()


@flax.struct.dataclass
class TrainState:
    """The state of training: the number of updates, all parameters (frozen ones included) and the optimizer state."""

    step: Any  # int32 scalar; also its shape or sharding, in a tree of those
    params: Any
    opt_state: Any


def _new_state(config: ModelConfig, optimizer: Optimizer, key: Key[Array, ""], params: Any = None) -> TrainState:
    params = optimizer.stored(nn.unbox(model_of(config).init(key)) if params is None else params)
    return TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.transform.init(optimizer.trainable.partition(params)[0])
    )


@functools.lru_cache(maxsize=32)  # tracing a model takes a second
def _boxed_params(config: ModelConfig) -> Any:
    return jax.eval_shape(model_of(config).init, jax.eval_shape(lambda: jax.random.key(0)))


def abstract_params(config: ModelConfig, mesh: sharding.AnyMesh, rules: sharding.Rules = sharding.RULES) -> Any:
    """Return shapes, dtypes and shardings of the parameters (`jax.ShapeDtypeStruct` leaves)."""
    boxed = _boxed_params(config)
    return sharding.shard_state(nn.unbox(boxed), boxed, mesh, rules)


def abstract_state(
    config: ModelConfig, optimizer: Optimizer, mesh: sharding.AnyMesh, rules: sharding.Rules = sharding.RULES
) -> TrainState:
    """Return shapes, dtypes and shardings of the state (`jax.ShapeDtypeStruct` leaves)."""
    boxed, key = _boxed_params(config), jax.eval_shape(lambda: jax.random.key(0))
    in_float32 = dataclasses.replace(optimizer, frozen_dtype="float32")
    state = jax.eval_shape(lambda key, params: _new_state(config, in_float32, key, params), key, nn.unbox(boxed))
    state = sharding.shard_state(state, boxed, mesh, rules)
    return dataclasses.replace(state, params=optimizer.stored(state.params))


def init_state(
    config: ModelConfig, optimizer: Optimizer, key: Key[Array, ""], abstract: TrainState, params: Any = None
) -> TrainState:
    """Create the initial state, each leaf directly with its sharding. The values are the same on every mesh.

    Args:
      params: initial parameters, whose buffers are donated; None means random ones.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(
        lambda key, params: _new_state(config, optimizer, key, params), out_shardings=shardings, donate_argnums=1
    )
    return make(key, params)


def init_params(
    config: ModelConfig, key: Key[Array, ""], abstract: TrainState, names: Collection[str]
) -> dict[str, Array]:
    """Initialise only the parameters with these names ("a/b/c"), with the same values as in `init_state`."""

    def select(tree: Any) -> dict[str, Any]:
        return {k: v for k, v in traverse_util.flatten_dict(tree, sep="/").items() if k in names}

    shardings = {name: leaf.sharding for name, leaf in select(abstract.params).items()}
    return jax.jit(lambda key: select(nn.unbox(model_of(config).init(key))), out_shardings=shardings)(key)


def param_count(params: Any) -> int:
    leaves = quantization.plain(traverse_util.flatten_dict(params, sep="/"))
    return sum(leaf.size for leaf in leaves.values())


def _sums(
    logits: Mapping[str, Array], targets: Mapping[str, tuple[Array, Array]], loss: LossConfig
) -> dict[str, Metrics]:
    def sums(logits: Array, labels: Array, weights: Array) -> Metrics:
        logits, weights = logits.reshape(*labels.shape, -1), weights.astype(jnp.float32)
        if jnp.issubdtype(labels.dtype, jnp.floating):
            return squared_error_sums(logits[..., 0], labels, weights)
        options = {"z_loss": loss.z_loss, "label_smoothing": loss.label_smoothing}
        return cross_entropy_sums(logits, labels, weights, **options)

    return {head: sums(logits[head], labels, weights) for head, (labels, weights) in targets.items()}


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
    """Compute one update from one global batch.

    Args:
      key: the run's key; the step, and then the micro-batch, are folded into it for dropout.
      num_microbatches: number of sequential parts of the batch, to save memory. The loss is normalised by the whole
        batch, so without dropout the result equals that of one part, up to rounding.

    Returns:
      The new state, and float32 scalars: `loss` (cross entropy + z-loss), `cross_ent_loss` and `z_loss`, in nats per
      target token; `accuracy`; `learning_rate` of this step; `grad_norm`, `param_norm` (before the update);
      `target_tokens` and `input_tokens`, without padding; `skipped`, which is 1 if loss, gradients or update are not
      finite: the step is then counted, and nothing else changes. BERT has the first four for each head, and their sum
      as `loss`; a regression head has only its `loss`, the squared error.
      If some parameters are frozen, `trainable_params` is the number of trained ones, and `grad_norm` covers the
      parameters that have gradients.
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
        # Part i takes rows i, i + n, ..., so each device splits its own rows, and no row moves.
        def split(rows: Array) -> Array:
            parts = jnp.swapaxes(rows.reshape(-1, num_microbatches, *rows.shape[1:]), 0, 1)
            return sharding.constrain(parts, None, "batch")

        parts = jax.tree.map(split, whole)
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
        updated = jax.tree.map(lambda p, d: p + (learning_rate * d).astype(p.dtype), trained, direction)
        updated = optimizer.trainable.apply_mask(state.step, updated, trained)
        mean_metrics = means(sums)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(mean_metrics["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(direction))
        updated, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (updated, opt_state), (trained, state.opt_state)
        )

    sides = ("inputs", "encoder_input_tokens", "decoder_target_tokens")
    tokens = sum(jnp.sum(batch[side] != 0) for side in sides if side in batch)
    target_tokens = jnp.sum(next(iter(targets.values()))[1] != 0)
    metrics = mean_metrics | {
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(quantization.values(state.params)),
        "target_tokens": target_tokens.astype(jnp.float32),
        "input_tokens": jnp.asarray(tokens - target_tokens, jnp.float32),
        "skipped": 1.0 - finite,
    }
    if optimizer.trainable != ALL_PARAMETERS:
        metrics["trainable_params"] = jnp.asarray(optimizer.trainable.count(state.params, state.step), jnp.float32)
    return TrainState(state.step + 1, combine(updated, frozen), opt_state), metrics


def means(sums: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Turn the sums of `eval_step`, possibly added over batches, into weighted means, named as in `train_step`."""
    metrics: dict[str, Any] = {}
    for head, head_sums in sums.items():
        count = jnp.maximum(head_sums["weights"], 1e-9)
        values = {"loss": head_sums["loss"] / count}
        if "correct" in head_sums:  # classification, not regression
            values["cross_ent_loss"] = (head_sums["loss"] - head_sums["z_loss"]) / count
            values |= {"z_loss": head_sums["z_loss"] / count, "accuracy": head_sums["correct"] / count}
        metrics |= {f"{head}_{name}" if head else name: value for name, value in values.items()}
    return metrics if "" in sums else {"loss": sum(metrics[f"{head}_loss"] for head in sums)} | metrics


def eval_step(params: Any, batch: Batch, *, config: ModelConfig) -> dict[str, Metrics]:
    """Sum the plain loss (no z-loss, no smoothing) of each head ("" for T5) over a batch.

    The sums are `loss`, `weights` and, for classes, `correct`.
    """
    model = model_of(config)
    return _sums(model.logits(params, batch), model.targets(batch), LossConfig(z_loss=0.0))


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Compiles step functions for one mesh, with the shardings of `abstract_state` for arguments and results."""

    mesh: Mesh
    rules: sharding.Rules = sharding.RULES

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def train_step(self, abstract: TrainState, **options: Any) -> Callable:
        """Compile `train_step` with fixed keyword arguments; the old state is donated to the new one."""
        state = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.jit(
            self._traced(train_step, **options),
            in_shardings=(state, sharding.batch_sharding(self.mesh, self.rules), self.replicated()),
            out_shardings=(state, self.replicated()),
            donate_argnums=0,
        )

    def with_params(self, function: Callable, abstract: TrainState, **options: Any) -> Callable:
        """Compile `function(params, batch, **options)` with replicated results, which every host can read."""
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
