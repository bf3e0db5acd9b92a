"""Training loss: weighted cross entropy with z-loss and label smoothing, or squared error, and its normaliser.

Every loss here is a weighted *sum* over target tokens; the caller divides it, so that micro-batches can be added.
This module must not depend on the model, the mesh or the optimizer.
Dimensions: B batch, T decoder length, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from t5x_lite.training.loss_config import LossConfig


def cross_entropy_sums(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    z_loss: float,
    label_smoothing: float,
) -> dict[str, Float[Array, ""]]:
    """Sum loss and metrics over the target tokens of one batch, each token multiplied by its weight.

    The smoothed target's own entropy is subtracted, so a perfect prediction has loss 0 before z-loss. The code avoids a
    one-hot [B, T, V] operand: of six formulations measured on CPU the plain gather below takes the least time and
    memory. XLA makes its gradient an in-place scatter, and over a sharded V only [B, T] sums are communicated. A target
    outside the vocabulary makes the loss NaN. Agrees with `compute_weighted_cross_entropy` in t5x/losses.py.

    Args:
      logits_BTV: logits in any floating dtype; the arithmetic is float32.
      targets_BT: token ids in [0, V).
      weights_BT: loss weights; 0 excludes a token.
      z_loss, label_smoothing: see `LossConfig`.

    Returns:
      float32 scalars: `loss` (nats, z-loss included), `z_loss`, `correct` (tokens whose target has the highest logit;
      ties count as correct) and `weights`.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    vocab_size = logits_BTV.shape[-1]
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_logit_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    # argmax would double the time of this function on CPU; logsumexp computes this maximum anyway.
    max_logit_BT = jnp.max(jax.lax.stop_gradient(logits_BTV), axis=-1)

    cross_entropy_BT = log_z_BT - target_logit_BT
    if label_smoothing > 0:
        on, off = 1.0 - label_smoothing, label_smoothing / (vocab_size - 1)
        entropy = -(on * math.log(on) + label_smoothing * math.log(off))
        all_BT = vocab_size * log_z_BT - jnp.sum(logits_BTV, axis=-1)  # -sum over V of log softmax
        cross_entropy_BT = (on - off) * cross_entropy_BT + off * all_BT - entropy
    z_loss_BT = z_loss * jnp.square(log_z_BT)

    def weighted_sum(x_BT: Float[Array, "B T"]) -> Float[Array, ""]:
        return jnp.sum(x_BT * weights_BT, dtype=jnp.float32)

    return {
        "loss": weighted_sum(cross_entropy_BT + z_loss_BT),
        "z_loss": weighted_sum(z_loss_BT),
        "correct": weighted_sum((target_logit_BT >= max_logit_BT).astype(jnp.float32)),
        "weights": jnp.sum(weights_BT, dtype=jnp.float32),
    }


def squared_error_sums(
    predictions_BT: Float[Array, "B T"], targets_BT: Float[Array, "B T"], weights_BT: Float[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    """Return the regression sums: `loss`, the sum of the squared errors, and `weights`, both float32 scalars."""
    errors_BT = jnp.square(predictions_BT.astype(jnp.float32) - targets_BT)
    return {"loss": jnp.sum(errors_BT * weights_BT), "weights": jnp.sum(weights_BT, dtype=jnp.float32)}


def normalizer(
    config: LossConfig, weights_BT: Num[Array, "B T"], segments_BT: Int[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
    """Return the loss weights of a batch and the divisor of its summed loss.

    The batch must be the whole (global) batch: per micro-batch, loss and gradients would grow with the number of
    micro-batches. Agrees with `get_loss_normalizing_factor_and_weights` in t5x/losses.py, except that the divisor is 1
    instead of 0 if all weights are 0.

    Args:
      config: its normalizing_factor is used.
      weights_BT: loss weights; 0 excludes a token.
      segments_BT: segment ids (0 = padding) if examples are packed.

    Returns:
      float32 weights [B, T], for AVERAGE_PER_SEQUENCE divided by their sum in each sequence, and the divisor.
    """
    weights_BT = weights_BT.astype(jnp.float32)
    factor = config.normalizing_factor
    if factor == "AVERAGE_PER_SEQUENCE":
        if segments_BT is not None:
            same_BTT = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT[:, :, None] != 0)
            per_sequence_BT = jnp.sum(jnp.where(same_BTT, weights_BT[:, None, :], 0.0), axis=-1)
        else:
            per_sequence_BT = jnp.broadcast_to(jnp.sum(weights_BT, axis=-1, keepdims=True), weights_BT.shape)
        counts_BT = per_sequence_BT > 0
        weights_BT = jnp.where(counts_BT, weights_BT / jnp.where(counts_BT, per_sequence_BT, 1.0), 0.0)
    if factor in ("NUM_REAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"):
        total = jnp.sum(weights_BT)
    elif factor == "NUM_TOTAL_TARGET_TOKENS":
        total = jnp.float32(weights_BT.size)
    else:
        total = jnp.float32(1.0 if factor is None else factor)
    return weights_BT, jnp.where(total > 0, total, jnp.float32(1.0))
