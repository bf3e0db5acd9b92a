"""Arrange examples in the rows of a batch: one example in each row, or several packed ones.

The code is numpy and handles a block of examples at a time. Its results equal those of seqio.EncDecFeatureConverter
and, for a decoder-only model, of seqio.PrefixLMFeatureConverter (inputs followed by targets, loss on the targets).
SeqIO's packing loops over TensorFlow tensors, which costs as much as the rest of the pipeline. This module must not
depend on datasets, tasks or models.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

Scatter = Callable[[np.ndarray], np.ndarray]

WINDOW = 16  # batches that are read together, to group examples of similar length


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield the indices of all examples in groups of `size` with similar lengths, the longest first."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return (order[start : start + size] for start in range(0, len(order), size))


def width(longest: int, limit: int) -> int:
    """Round the longest example's length up to one of eight widths up to `limit`: each width is compiled separately."""
    step = -(-limit // 512) * 64
    return min(limit, -(-max(longest, 1) // step) * step)


_LEVELS = 8


def level(rows: Mapping[str, np.ndarray]) -> int:
    """Return the least level of width, 1 to 8, that all rows fit into: each array is cut to so many eighths."""
    return int(max(np.max(-(-sizes_B // step)) for sizes_B, step in _sizes(rows)) or 1)


def trimmed(rows: Mapping[str, np.ndarray], level: int) -> dict[str, np.ndarray]:
    """Cut arrays [B, S] to a level of width; those of numbers, [B, 1], stay."""
    return {name: x[:, : level * _step(x)] if x.shape[1] > 1 else x for name, x in rows.items()}


def grouped(rows: Mapping[str, np.ndarray], size: int, seed: Sequence[int]) -> np.ndarray:
    """Return the order of rows in which each `size` of them have similar lengths; these batches come in random order.

    Args:
      rows: arrays [N, S], where N is a multiple of `size`.
    """
    sizes = _sizes(rows)
    levels_N = np.max([-(-sizes_N // step) for sizes_N, step in sizes], axis=0)
    order = np.lexsort((np.sum([sizes_N for sizes_N, _ in sizes], axis=0), levels_N))[::-1]
    return np.random.default_rng(seed).permutation(order.reshape(-1, size)).reshape(-1)


def _sizes(rows: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, int]]:
    """Return the lengths of the rows in each array of tokens, without padding at the end, and its step of width."""
    lengths = []
    for x in rows.values():
        if (width := x.shape[1]) > 1:
            lengths.append((np.where(x.any(1), width - np.argmax(x[:, ::-1] != 0, axis=1), 0), _step(x)))
    return lengths


def _step(rows_BS: np.ndarray) -> int:
    return -(-rows_BS.shape[1] // (8 * _LEVELS)) * 8


def unpacked(inputs_BS: np.ndarray, targets_BT: np.ndarray) -> dict[str, np.ndarray]:
    """Arrange one example in each row, padded with 0. Decoder inputs are the targets shifted right, after a 0."""
    return {
        "encoder_input_tokens": inputs_BS,
        "decoder_target_tokens": targets_BT,
        "decoder_input_tokens": _shift_right(targets_BT),
        "decoder_loss_weights": (targets_BT > 0).astype(np.int32),
    }


def joined(inputs_BS: np.ndarray, targets_BT: np.ndarray) -> dict[str, np.ndarray]:
    """Arrange one example in each row, [B, S + T], for a decoder-only model; padding moves behind the targets."""
    length = inputs_BS.shape[1] + targets_BT.shape[1]
    arrays = _joined(inputs_BS, targets_BT, np.arange(len(inputs_BS)), np.zeros(len(inputs_BS), np.int64), length)
    del arrays["decoder_positions"]
    return arrays | {"decoder_input_tokens": _shift_right(arrays["decoder_target_tokens"])}


def _shift_right(tokens_BT: np.ndarray) -> np.ndarray:
    return np.pad(tokens_BT, [(0, 0), (1, 0)])[:, :-1]


def pack(inputs_NS: np.ndarray, targets_NT: np.ndarray, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Pack examples in order: each goes into the current row if its inputs and its targets both fit, else a new row.

    Args:
      inputs_NS, targets_NT: N examples, padded with 0, none longer than its row.
      lengths: {"inputs": S, "targets": T}, the lengths of the rows.

    Returns int32 arrays [R, S] or [R, T], where R <= N is the number of rows: encoder_input_tokens,
    decoder_target_tokens, decoder_input_tokens (targets shifted right by one in each example, which starts with 0),
    decoder_loss_weights (1 on targets), and segment ids (from 1; 0 is padding) and positions (from 0) of both sides.
    """
    sizes = [np.count_nonzero(tokens, axis=1) for tokens in (inputs_NS, targets_NT)]
    rows_N, (starts_inputs, starts_targets), segments_N = _assign_rows(sizes, [lengths["inputs"], lengths["targets"]])
    scatter, positions = _scatter(sizes[0], rows_N, starts_inputs, lengths["inputs"])
    packed = {
        "encoder_input_tokens": scatter(inputs_NS[inputs_NS != 0]),
        "encoder_segment_ids": scatter(np.repeat(segments_N, sizes[0])),
        "encoder_positions": scatter(positions),
    }
    scatter, positions = _scatter(sizes[1], rows_N, starts_targets, lengths["targets"])
    return packed | {
        **_decoder(scatter, positions, targets_NT[targets_NT != 0]),
        "decoder_loss_weights": scatter(np.ones_like(positions)),
        "decoder_segment_ids": scatter(np.repeat(segments_N, sizes[1])),
    }


def pack_joined(inputs_NS: np.ndarray, targets_NT: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """Pack examples for a decoder-only model: inputs, then targets, then the next example, in rows of `length`.

    Returns int32 arrays [R, length]: the decoder arrays of `pack`, with loss weights on targets only, and
    decoder_causal_attention, which is 1 on the positions that read inputs.
    """
    sizes_N = np.count_nonzero(inputs_NS, axis=1) + np.count_nonzero(targets_NT, axis=1)
    rows_N, (starts_N,), segments_N = _assign_rows([sizes_N], [length])
    packed = _joined(inputs_NS, targets_NT, rows_N, starts_N, length)
    scatter, _ = _scatter(sizes_N, rows_N, starts_N, length)
    return packed | {"decoder_segment_ids": scatter(np.repeat(segments_N, sizes_N))}


def _joined(
    inputs_NS: np.ndarray, targets_NT: np.ndarray, rows_N: np.ndarray, starts_N: np.ndarray, length: int
) -> dict[str, np.ndarray]:
    tokens = np.concatenate([inputs_NS, targets_NT], axis=1)
    sizes_N = np.count_nonzero(tokens, axis=1)
    scatter, positions = _scatter(sizes_N, rows_N, starts_N, length)
    inputs = np.repeat(np.count_nonzero(inputs_NS, axis=1), sizes_N)
    return {
        **_decoder(scatter, positions, tokens[tokens != 0]),
        "decoder_loss_weights": scatter(positions >= inputs),
        "decoder_causal_attention": scatter(positions <= inputs),
    }


def _decoder(scatter: Scatter, positions: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "decoder_target_tokens": scatter(tokens),
        "decoder_input_tokens": scatter(np.where(positions == 0, 0, np.roll(tokens, 1))),
        "decoder_positions": scatter(positions),
    }


def _scatter(sizes_N: np.ndarray, rows_N: np.ndarray, starts_N: np.ndarray, length: int) -> tuple[Scatter, np.ndarray]:
    """Return a scatter function from flat tokens to packed rows, and each token's position in its example."""
    positions = np.arange(sizes_N.sum()) - np.repeat(np.cumsum(sizes_N) - sizes_N, sizes_N)
    targets = np.repeat(rows_N * length + starts_N, sizes_N) + positions

    def scatter(values: np.ndarray) -> np.ndarray:
        array = np.zeros((int(rows_N[-1]) + 1, length), np.int32)
        array.reshape(-1)[targets] = values
        return array

    return scatter, positions


def _assign_rows(sizes: list[np.ndarray], lengths: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each example's row, the start of each of its features in the row, and its segment number, from 1."""
    row, segment, used = 0, 0, [0] * len(lengths)
    assigned = []
    for example in np.stack(sizes, axis=1).tolist():
        if segment and any(u + n > length for u, n, length in zip(used, example, lengths, strict=True)):
            row, segment, used = row + 1, 0, [0] * len(lengths)
        segment += 1
        assigned.append((row, segment, *used))
        used = [u + n for u, n in zip(used, example, strict=True)]
    rows, segments, *starts = np.array(assigned, np.int64).T
    return rows, np.stack(starts), segments
