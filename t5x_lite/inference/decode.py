"""Decode and score with a trained encoder-decoder or decoder: token ids in, token ids or log-likelihoods out.

The key-value cache is explicit: it is built from the encodings, then passed to and returned by every step. This module
uses the model and its parameters, not text.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from t5x_lite import sharding
from t5x_lite.errors import UserError
from t5x_lite.inference.decode_config import Decoding as Decoding
from t5x_lite.inference.decode_config import Method as Method
from t5x_lite.model.config import EncoderDecoderConfig
from t5x_lite.model.t5 import T5, forward
from t5x_lite.model.transformer import Cache

START = 0
END = 1
NEG_INF = -1e7  # the score of a missing beam, as in T5X


def generate(
    params: Any,
    encoder_input_tokens: Int[Array, "B S"],
    *,
    config: EncoderDecoderConfig,
    max_length: int,
    decoding: Decoding = Decoding(),
    key: Key[Array, "*B"] | None = None,
    max_lengths: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, "B N T"], Float[Array, "B N"]]:
    """Decode `decoding.num_decodes` = N results for each row, best first ("sample": in the order drawn).

    The inputs, padded with 0 at the end, go to the encoder; a decoder-only model reads them as a prefix in one pass.

    Args:
      key: for "sample": one key, or one for each row, so that a row's results do not depend on the other rows.
      max_lengths: the maximum length of each row, at most `max_length`; not for "beam".

    Returns:
      The tokens, without the start token (one of config.end_tokens at the end of a row, 0 after it), and the scores:
      the tokens' log-probabilities, for "beam" with the length penalty of alpha. A beam that did not end has the
      score -1e7 and tokens 0; if no beam of a row ended, the row has its live beams with their log-probabilities.

    Raises:
      ValueError: the key is missing for "sample", or max_lengths is given for "beam".
    """
    method, num_decodes = decoding.method, decoding.num_decodes
    if method == "beam":
        if max_lengths is not None:
            raise UserError("max_lengths is for greedy decoding and sampling; beam search has one max_length")
        tokens_BKT, scores_BK = _beam(
            params, encoder_input_tokens, config, max_length, decoding.beam_size, decoding.alpha
        )
        return tokens_BKT[:, :num_decodes], scores_BK[:, :num_decodes]
    if method == "sample":
        if key is None:
            raise UserError("sampling needs a key")
        choose = functools.partial(_draw, decoding=decoding)
    else:
        choose = _most_likely
    rows = encoder_input_tokens.shape[0]
    if max_lengths is None:
        max_lengths = jnp.full((rows,), max_length)
    key = jax.random.key(0) if key is None else key
    keys_B = _folded(key, jnp.arange(rows)) if key.ndim == 0 else key
    keys_BN = jax.vmap(_folded, (0, None))(keys_B, jnp.arange(num_decodes))
    tokens, scores = _token_by_token(
        params, encoder_input_tokens, config, max_length, num_decodes, choose, keys_BN.reshape(-1), max_lengths
    )
    return tokens.reshape(rows, num_decodes, max_length), scores.reshape(rows, num_decodes)


def _folded(key: Key[Array, ""], numbers: Int[Array, " N"]) -> Key[Array, " N"]:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def _start(
    params: Any, input_tokens: Int[Array, "B S"], config: EncoderDecoderConfig, max_length: int, copies: int
) -> tuple[Callable, Cache, Int[Array, " BN"]]:
    """Set up decoding with each row repeated `copies` times.

    Returns a step function (last tokens, index, cache) -> (logits, cache), the cache, and the last tokens at index 0.
    """
    B, S = input_tokens.shape
    apply: Any = functools.partial(config.network().apply, {"params": params})
    if config.decoder_only:
        # Right-align the rows, so that all continue at the same position; the padding on their left is masked.
        positions_BM = jnp.arange(S + max_length) - S + jnp.count_nonzero(input_tokens, axis=1)[:, None]
        prefix_BM = (positions_BM >= 0) & (jnp.arange(S + max_length) <= S)
        tokens_BM = jnp.take_along_axis(jnp.pad(input_tokens, [(0, 0), (1, 0)]), jnp.clip(positions_BM, 0, S), axis=1)
        keys = {
            "decoder_segment_ids": (positions_BM >= 0).astype(jnp.int32),
            "decoder_causal_attention": prefix_BM.astype(jnp.int32),
        }
        cache = apply(None, B, S + max_length, method=T5.start_cache)
        prompt = tokens_BM[:, : S + 1]
        _, cache = apply(prompt, 0, cache, None, **keys, method=T5.decode_step)
        first_B, offset, inputs = prompt[:, -1], S, None
    else:
        cache = apply(apply(input_tokens, method=T5.encode), B, max_length, method=T5.start_cache)
        first_B, offset, inputs, keys = jnp.full((B,), START, jnp.int32), 0, input_tokens, {}
    copied = {name: jnp.repeat(getattr(cache, name), copies, axis=1) for name in ("self_key", "self_value")}
    cache = dataclasses.replace(cache, **copied)  # the copies of a row share its encoded inputs
    first_B, keys = jax.tree.map(lambda x_B: jnp.repeat(x_B, copies, axis=0), (first_B, keys))
    decoder = params["decoder"]
    stacks = (decoder["layers"], cache.cross_key, cache.cross_value)
    cache = dataclasses.replace(cache, cross_key=None, cross_value=None)
    # In an exported program B and the platform are unknown.
    unstack = sharding.device().platform == "cpu" and isinstance(B, int)
    stepper = dataclasses.replace(config, scan_layers=config.scan_layers and not unstack).network()
    get_stacks = _unstacked(stacks) if unstack else lambda: stacks

    def step(last_B: Array, index: Array, cache: Cache, parents_B: Array | None = None) -> tuple[Array, Cache]:
        layers, cross_key, cross_value = get_stacks()
        logits_and_cache: Any = stepper.apply(
            {"params": {**params, "decoder": {**decoder, "layers": layers}}},
            last_B[:, None],
            offset + index,
            dataclasses.replace(cache, cross_key=cross_key, cross_value=cross_value),
            inputs,
            **keys,
            parents=parents_B,
            method=T5.decode_step,
        )
        logits_B1V, cache = logits_and_cache
        return logits_B1V[:, 0], dataclasses.replace(cache, cross_key=None, cross_value=None)

    return step, cache, first_B


def _unstacked(stacks: Any) -> Callable[[], Any]:
    """Split `stacks`, trees of arrays [L, ...], into layers; return a function that stacks the layers again.

    On CPU a matrix product takes whole arrays, so slicing a stack would copy each layer at each step, which takes half
    of the step's time. If unrolled layers slice the result of the returned function, XLA simplifies each slice to
    the layer's own array and never builds the stack.
    """
    length = jax.tree.leaves(stacks)[0].shape[0]
    layers = [jax.tree.map(lambda x, i=i: x[i], stacks) for i in range(length)]
    return lambda: jax.tree.map(lambda *parts: jnp.stack(parts), *layers)


def _token_by_token(
    params: Any,
    encoder_input_tokens: Int[Array, "B S"],
    config: EncoderDecoderConfig,
    max_length: int,
    copies: int,
    choose: Callable[[Array, Array], Array],
    keys: Key[Array, " BN"],
    max_lengths: Int[Array, " B"],
) -> tuple[Int[Array, "BN T"], Float[Array, " BN"]]:
    decode, cache, first_B = _start(params, encoder_input_tokens, config, max_length, copies)
    rows = encoder_input_tokens.shape[0] * copies
    limits_B = jnp.repeat(max_lengths, copies)

    def step(carry: tuple) -> tuple:
        index, last_B, tokens_BT, scores_B, ended_B, cache = carry
        logits_BV, cache = decode(last_B, index, cache)
        token_B = choose(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys, index))
        log_probs_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=-1)[:, 0]
        token_B = jnp.where(ended_B, 0, token_B).astype(jnp.int32)
        tokens_BT = tokens_BT.at[:, index].set(token_B)
        scores_B += jnp.where(ended_B, 0.0, log_probs_B)
        ended_B |= ended(token_B, config.end_tokens) | (index + 1 >= limits_B)
        return index + 1, token_B, tokens_BT, scores_B, ended_B, cache

    def unfinished(carry: tuple) -> Array:
        index, *_, ended_B, _ = carry
        return (index < max_length) & ~jnp.all(ended_B)

    start = (
        jnp.zeros((), jnp.int32),
        first_B,
        jnp.zeros((rows, max_length), jnp.int32),
        jnp.zeros((rows,), jnp.float32),
        limits_B < 1,
        cache,
    )
    _, _, tokens_BT, scores_B, _, _ = jax.lax.while_loop(unfinished, step, start)
    return tokens_BT, scores_B


def ended(tokens: Int[Array | np.ndarray, "..."], end_tokens: Sequence[int]) -> Bool[Array, "..."]:
    """Return whether each token ends its row."""
    return jnp.isin(tokens, jnp.asarray(end_tokens))


def _most_likely(logits_BV: Array, keys_B: Array) -> Array:
    return jnp.argmax(logits_BV, axis=-1)


def _draw(logits_BV: Array, keys_B: Array, *, decoding: Decoding) -> Array:
    logits_BV = logits_BV / decoding.temperature
    if 0 < decoding.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, decoding.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if decoding.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # the total probability of more likely tokens
        least_B1 = jnp.min(jnp.where(before_BV < decoding.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV)


def _penalty(length: Array | int, alpha: float) -> Array:
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


def _beam(
    params: Any,
    encoder_input_tokens: Int[Array, "B S"],
    config: EncoderDecoderConfig,
    max_length: int,
    K: int,
    alpha: float,
) -> tuple[Int[Array, "B K T"], Float[Array, "B K"]]:
    """Run T5X's beam search with K live and K finished sequences for each row, where K is the number of beams."""
    decode, cache, first = _start(params, encoder_input_tokens, config, max_length, K)
    B = encoder_input_tokens.shape[0]

    def pick(x: Array, beams: Array) -> Array:
        """Index x [B, K', ...] with beams [B, K'']."""
        return jnp.take_along_axis(x, beams.reshape(*beams.shape, *[1] * (x.ndim - 2)), axis=1)

    def step(carry: tuple) -> tuple:
        index, live_BKT, live_BK, ended_BKT, ended_BK, parents, cache = carry
        last_BK = jnp.where(index == 0, first.reshape(B, K), live_BKT[:, :, index - 1])
        logits, cache = decode(last_BK.reshape(-1), index, cache, parents)
        V = logits.shape[-1]
        totals_BKV = jax.nn.log_softmax(logits).reshape(B, K, V) + live_BK[:, :, None]
        # 2K candidates: even if K of them end here, K can continue.
        best_BJ, indices_BJ = jax.lax.top_k(totals_BKV.reshape(B, K * V), 2 * K)
        beams_BJ, tokens_BJ = indices_BJ // V, (indices_BJ % V).astype(jnp.int32)
        grown_BJT = pick(live_BKT, beams_BJ).at[:, :, index].set(tokens_BJ)
        ends_BJ = ended(tokens_BJ, config.end_tokens)

        live_BK, live_indices_BK = jax.lax.top_k(best_BJ + ends_BJ * NEG_INF, K)
        live_BKT = pick(grown_BJT, live_indices_BK)
        parents = (jnp.arange(B)[:, None] * K + pick(beams_BJ, live_indices_BK)).reshape(-1)

        scores_BJ = best_BJ / _penalty(index + 1, alpha) + ~ends_BJ * NEG_INF
        ended_BK, ended_indices_BK = jax.lax.top_k(jnp.concatenate([ended_BK, scores_BJ], axis=1), K)
        ended_BKT = pick(jnp.concatenate([ended_BKT, grown_BJT], axis=1), ended_indices_BK)
        ended_BKT = jnp.where((ended_BK > NEG_INF / 2)[..., None], ended_BKT, 0)
        return index + 1, live_BKT, live_BK, ended_BKT, jnp.maximum(ended_BK, NEG_INF), parents, cache

    def unfinished(carry: tuple) -> Array:
        index, _, live_BK, _, ended_BK, *_ = carry
        bounds_B = live_BK[:, 0] / _penalty(max_length, alpha)  # upper bound of a live sequence's final score
        return (index < max_length) & ~jnp.all(jnp.min(ended_BK, axis=1) > bounds_B)

    empty_BKT = jnp.zeros((B, K, max_length), jnp.int32)
    neg_inf_BK = jnp.full((B, K), NEG_INF, jnp.float32)
    start = (
        jnp.zeros((), jnp.int32),
        empty_BKT,
        neg_inf_BK.at[:, 0].set(0.0),
        empty_BKT,
        neg_inf_BK,
        jnp.arange(B * K),
        cache,
    )
    _, live_BKT, live_BK, ended_BKT, ended_BK, *_ = jax.lax.while_loop(unfinished, step, start)
    any_B = jnp.any(ended_BK > NEG_INF / 2, axis=1)
    return jnp.where(any_B[:, None, None], ended_BKT, live_BKT), jnp.where(any_B[:, None], ended_BK, live_BK)


def log_likelihoods(
    tokens_BNT: Int[Array, "B N T"],
    scores_BN: Float[Array, "B N"],
    decoding: Decoding,
    end_tokens: Sequence[int] = (END,),
) -> Float[Array, "B N"]:
    """Return the log-probability of each result of `generate`, without length penalty; -inf if it is missing."""
    if decoding.method != "beam":
        return scores_BN
    is_end_BNT = ended(tokens_BNT, end_tokens)
    lengths_BN = jnp.argmax(is_end_BNT, axis=-1) + 1
    unranked_BN = scores_BN * _penalty(lengths_BN, decoding.alpha)
    # Beams that did not end have no length penalty.
    log_probs_BN = jnp.where(jnp.any(is_end_BNT, axis=-1), unranked_BN, scores_BN)
    return jnp.where(scores_BN > NEG_INF / 2, log_probs_BN, -jnp.inf)


def score(params: Any, batch: dict[str, Int[Array, "B _"]], *, config: EncoderDecoderConfig) -> Float[Array, " B"]:
    """Return the log-likelihood (natural logarithm) of each row's targets, summed over targets with a loss weight."""
    log_probs_BTV = jax.nn.log_softmax(forward(config, params, batch), axis=-1)
    targets_BT = batch["decoder_target_tokens"]
    log_probs_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(log_probs_BT * (batch["decoder_loss_weights"] != 0), axis=-1)
