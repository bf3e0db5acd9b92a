"""Decoding and scoring with a trained T5: token ids in, token ids or log-likelihoods out.

The cache is explicit: made from the encodings, then an argument and result of every step. This module knows the model
and its parameters, nothing of text.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_lite.model import T5, T5Config

START = 0
END = 1


def greedy(
    params: Any, encoder_input_tokens: Int[Array, "B S"], *, config: T5Config, max_length: int
) -> tuple[Int[Array, "B 1 T"], Float[Array, "B 1"]]:
    """The most likely token at each step, until every row has ended or has `max_length` tokens.

    Returns:
      tokens, without the start token: END where a row ends, 0 after it; and the sum of their log-probabilities. (The
      axis of size 1 counts the results for one input, as other ways of decoding give several.)
    """
    model = T5(config)
    variables = {"params": params}
    rows = encoder_input_tokens.shape[0]
    encoded_BSD = model.apply(variables, encoder_input_tokens, method=T5.encode)
    cache = model.apply(variables, encoded_BSD, max_length, method=T5.start_cache)

    def step(carry: tuple) -> tuple:
        index, last_B1, tokens_BT, scores_B, ended_B, cache = carry
        logits_B1V, cache = model.apply(variables, last_B1, index, cache, encoder_input_tokens, method=T5.decode_step)
        logits_BV = logits_B1V[:, 0]
        token_B = jnp.where(ended_B, 0, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)
        log_probs_B = jnp.max(logits_BV, axis=-1) - jax.nn.logsumexp(logits_BV, axis=-1)
        tokens_BT = tokens_BT.at[:, index].set(token_B)
        scores_B += jnp.where(ended_B, 0.0, log_probs_B)
        return index + 1, token_B[:, None], tokens_BT, scores_B, ended_B | (token_B == END), cache

    def unfinished(carry: tuple) -> Array:
        index, *_, ended_B, _ = carry
        return (index < max_length) & ~jnp.all(ended_B)

    start = (
        jnp.zeros((), jnp.int32),
        jnp.full((rows, 1), START, jnp.int32),
        jnp.zeros((rows, max_length), jnp.int32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows,), bool),
        cache,
    )
    _, _, tokens_BT, scores_B, _, _ = jax.lax.while_loop(unfinished, step, start)
    return tokens_BT[:, None, :], scores_B[:, None]


def score(params: Any, batch: dict[str, Int[Array, "B _"]], *, config: T5Config) -> Float[Array, " B"]:
    """Log-likelihood of each row's targets, summed over those with a loss weight (natural logarithm)."""
    logits_BTV = T5(config).apply({"params": params}, batch["encoder_input_tokens"], batch["decoder_input_tokens"])
    assert isinstance(logits_BTV, jax.Array)
    log_probs_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    targets_BT = batch["decoder_target_tokens"]
    log_probs_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(log_probs_BT * (batch["decoder_loss_weights"] != 0), axis=-1)
