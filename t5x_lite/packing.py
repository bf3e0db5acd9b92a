"""The arrays that the model gets for examples: one in each row, or several short ones.

In numpy, a block of examples at a time. The result of packing is that of seqio.EncDecFeatureConverter(pack=True), whose
loop over TensorFlow tensors costs more than all the rest of a pipeline. Must not know: datasets, tasks, models.
"""

from collections.abc import Mapping

import numpy as np


def unpacked(inputs_BS: np.ndarray, targets_BT: np.ndarray) -> dict[str, np.ndarray]:
    """One example a row, padded with 0: a decoder starts with 0 and reads the targets one place later."""
    return {
        "encoder_input_tokens": inputs_BS,
        "decoder_target_tokens": targets_BT,
        "decoder_input_tokens": np.pad(targets_BT, [(0, 0), (1, 0)])[:, :-1],
        "decoder_loss_weights": (targets_BT > 0).astype(np.int32),
    }


def pack(inputs_NS: np.ndarray, targets_NT: np.ndarray, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Packs examples in their order, each behind the one before if both its inputs and its targets still fit.

    Args:
      inputs_NS, targets_NT: N examples, padded with 0, none longer than its length.
      lengths: {"inputs": S, "targets": T}, the rows' lengths.

    Returns int32 [R, S] or [R, T], where R <= N is the number of rows: encoder_input_tokens, decoder_target_tokens,
    decoder_input_tokens (targets moved right by one inside each example, which begins with 0), decoder_loss_weights (1
    on targets), and segment ids (from 1; 0 is padding) and positions (from 0) of both sides.
    """
    sizes_2N = np.stack([np.count_nonzero(inputs_NS, axis=1), np.count_nonzero(targets_NT, axis=1)])
    rows_N, starts_2N, segments_N = _places(sizes_2N, (lengths["inputs"], lengths["targets"]))
    packed = {}
    for side, tokens, length, sizes, starts in zip(
        ("encoder", "decoder"),
        (inputs_NS, targets_NT),
        (lengths["inputs"], lengths["targets"]),
        sizes_2N,
        starts_2N,
        strict=True,
    ):
        shape = (int(rows_N[-1]) + 1, length)
        positions = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        places = np.repeat(rows_N * length + starts, sizes) + positions
        values = tokens[tokens != 0]

        def scatter(x: np.ndarray, places: np.ndarray = places, shape: tuple[int, int] = shape) -> np.ndarray:
            array = np.zeros(shape, np.int32)
            array.reshape(-1)[places] = x
            return array

        if side == "encoder":
            packed["encoder_input_tokens"] = scatter(values)
        else:
            before = np.where(positions == 0, 0, np.roll(values, 1))
            packed["decoder_target_tokens"] = scatter(values)
            packed["decoder_input_tokens"] = scatter(before)
            packed["decoder_loss_weights"] = scatter(np.ones_like(values))
        packed[f"{side}_segment_ids"] = scatter(np.repeat(segments_N, sizes))
        packed[f"{side}_positions"] = scatter(positions)
    return packed


def _places(sizes_2N: np.ndarray, lengths: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row of each example, where in it its inputs and targets start, and its number there, from 1."""
    row, segment, used_inputs, used_targets = 0, 0, 0, 0
    places = []
    for inputs, targets in sizes_2N.T.tolist():
        if segment and (used_inputs + inputs > lengths[0] or used_targets + targets > lengths[1]):
            row, segment, used_inputs, used_targets = row + 1, 0, 0, 0
        segment += 1
        places.append((row, used_inputs, used_targets, segment))
        used_inputs, used_targets = used_inputs + inputs, used_targets + targets
    rows, starts_inputs, starts_targets, segments = np.array(places, np.int64).T
    return rows, np.stack([starts_inputs, starts_targets]), segments
