"""The arrays that the model gets for examples: one in each row, or several short ones.

In numpy, a block of examples at a time. The results are those of seqio.EncDecFeatureConverter and, for a decoder alone,
of seqio.PrefixLMFeatureConverter (inputs and targets one behind the other, loss on the targets), whose packing loops
over TensorFlow tensors at the cost of all the rest of a pipeline. Must not know: datasets, tasks, models.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

Scatter = Callable[[np.ndarray], np.ndarray]

WINDOW = 16  # batches that are read together where rows of similar length are to share one


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """The indices of all examples in groups of `size`, the longest first: those of a group are about equally long."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return (order[start : start + size] for start in range(0, len(order), size))


def width(longest: int, limit: int) -> int:
    """The longest example's length, rounded up to one of eight widths up to `limit`: each is compiled by itself."""
    step = -(-limit // 512) * 64
    return min(limit, -(-max(longest, 1) // step) * step)


def unpacked(inputs_BS: np.ndarray, targets_BT: np.ndarray) -> dict[str, np.ndarray]:
    """One example a row, padded with 0: a decoder starts with 0 and reads the targets one place later."""
    return {
        "encoder_input_tokens": inputs_BS,
        "decoder_target_tokens": targets_BT,
        "decoder_input_tokens": _one_later(targets_BT),
        "decoder_loss_weights": (targets_BT > 0).astype(np.int32),
    }


def joined(inputs_BS: np.ndarray, targets_BT: np.ndarray) -> dict[str, np.ndarray]:
    """One example a row of a decoder alone, [B, S + T]; padding is moved behind the targets."""
    length = inputs_BS.shape[1] + targets_BT.shape[1]
    arrays = _joined(inputs_BS, targets_BT, np.arange(len(inputs_BS)), np.zeros(len(inputs_BS), np.int64), length)
    del arrays["decoder_positions"]
    return arrays | {"decoder_input_tokens": _one_later(arrays["decoder_target_tokens"])}


def _one_later(tokens_BT: np.ndarray) -> np.ndarray:
    return np.pad(tokens_BT, [(0, 0), (1, 0)])[:, :-1]


def pack(inputs_NS: np.ndarray, targets_NT: np.ndarray, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Packs examples in their order, each behind the one before if both its inputs and its targets still fit.

    Args:
      inputs_NS, targets_NT: N examples, padded with 0, none longer than its length.
      lengths: {"inputs": S, "targets": T}, the rows' lengths.

    Returns int32 [R, S] or [R, T], where R <= N is the number of rows: encoder_input_tokens, decoder_target_tokens,
    decoder_input_tokens (targets moved right by one inside each example, which begins with 0), decoder_loss_weights (1
    on targets), and segment ids (from 1; 0 is padding) and positions (from 0) of both sides.
    """
    sizes = [np.count_nonzero(tokens, axis=1) for tokens in (inputs_NS, targets_NT)]
    rows_N, (starts_inputs, starts_targets), segments_N = _places(sizes, [lengths["inputs"], lengths["targets"]])
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
    """As `pack`, for a decoder alone: inputs, then targets, then the next example, in rows of `length`.

    Returns int32 [R, length]: the decoder's arrays of `pack`, with loss weights on targets only, and
    decoder_causal_attention, 1 where the inputs are read.
    """
    sizes_N = np.count_nonzero(inputs_NS, axis=1) + np.count_nonzero(targets_NT, axis=1)
    rows_N, (starts_N,), segments_N = _places([sizes_N], [length])
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
    """What lays the tokens of N examples, one after the other, out in rows; and the tokens' positions in them."""
    positions = np.arange(sizes_N.sum()) - np.repeat(np.cumsum(sizes_N) - sizes_N, sizes_N)
    places = np.repeat(rows_N * length + starts_N, sizes_N) + positions

    def scatter(values: np.ndarray) -> np.ndarray:
        array = np.zeros((int(rows_N[-1]) + 1, length), np.int32)
        array.reshape(-1)[places] = values
        return array

    return scatter, positions


def _places(sizes: list[np.ndarray], lengths: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row of each example, where in it each of its features starts, and its number there, from 1."""
    row, segment, used = 0, 0, [0] * len(lengths)
    places = []
    for example in np.stack(sizes, axis=1).tolist():
        if segment and any(u + n > length for u, n, length in zip(used, example, lengths, strict=True)):
            row, segment, used = row + 1, 0, [0] * len(lengths)
        segment += 1
        places.append((row, segment, *used))
        used = [u + n for u, n in zip(used, example, strict=True)]
    rows, segments, *starts = np.array(places, np.int64).T
    return rows, np.stack(starts), segments
