"""Print a batch, as the model gets it, as text: segments, spans, positions, packing efficiency."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from tasks import vocabulary as vocabularies


def describe_batch(
    batch: Mapping[str, np.ndarray], vocabulary: seqio.Vocabulary, rows: int | None = None, segments: int | None = None
) -> str:
    """Describe a batch row by row and segment by segment, with spans and the packing efficiency.

    Args:
      batch: a batch from `TrainBatches` or `EvalBatches`.
      vocabulary: the vocabulary of both inputs and targets.
      rows, segments: how many rows, and segments of a row, to describe; None means all.
    """
    batch = {k: np.asarray(v) for k, v in batch.items()}
    if "segments" in batch or "label" in batch:
        return _describe_pairs({name: x[:rows] for name, x in batch.items()}, vocabulary)
    if "encoder_input_tokens" not in batch:  # a decoder-only model: the inputs are the tokens without loss
        parts = {"encoder": batch["decoder_loss_weights"] == 0, "decoder": batch["decoder_loss_weights"] != 0}
        batch |= {f"{k}_input_tokens": batch["decoder_target_tokens"] * part for k, part in parts.items()}
        batch["decoder_target_tokens"] = batch["decoder_input_tokens"]
        if "decoder_segment_ids" in batch:
            batch |= {f"{k}_segment_ids": batch["decoder_segment_ids"] * part for k, part in parts.items()}
            batch["encoder_positions"] = batch["decoder_positions"]
    inputs_BS, targets_BT = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    packed = "encoder_segment_ids" in batch
    segments_BS = batch["encoder_segment_ids"] if packed else (inputs_BS > 0).astype(int)
    segments_BT = batch["decoder_segment_ids"] if packed else (targets_BT > 0).astype(int)
    lines = []
    for row in range(len(inputs_BS))[:rows]:
        count = max(segments_BS[row].max(), segments_BT[row].max())
        filled = f"inputs {np.count_nonzero(segments_BS[row])}/{inputs_BS.shape[1]} tokens, "
        filled += f"targets {np.count_nonzero(segments_BT[row])}/{targets_BT.shape[1]}"
        lines.append(f"row {row}: {filled}, {count} segment{'s' if count != 1 else ''}")
        for segment in range(1, count + 1)[:segments]:
            columns_S = np.flatnonzero(segments_BS[row] == segment)
            columns_T = np.flatnonzero(segments_BT[row] == segment)
            inputs, targets = inputs_BS[row, columns_S].tolist(), targets_BT[row, columns_T].tolist()
            extents = f"inputs {_extent(columns_S)}{_positions(batch, 'encoder', row, columns_S)}, "
            extents += f"targets {_extent(columns_T)}{_positions(batch, 'decoder', row, columns_T)}"
            lines += [
                f"  segment {segment}: {extents}",
                f"    inputs:  {vocabulary.decode(inputs)}",
                f"    targets: {vocabulary.decode(targets)}",
            ]
            lines += [f"    span {name}: {text!r}" for name, text in _spans(targets, vocabulary)]
        if segments is not None and count > segments:
            lines.append(f"  ... and {count - segments} more segments")
    if rows is not None and len(inputs_BS) > rows:
        lines.append(f"... and {len(inputs_BS) - rows} more rows")
    share_S, share_T = np.mean(segments_BS > 0), np.mean(segments_BT > 0)
    weights = float(np.sum(batch["decoder_loss_weights"]))
    lines.append(
        f"packing efficiency: {share_S:.1%} of {segments_BS.size} input and {share_T:.1%} of {segments_BT.size} target "
        f"positions hold tokens; sum of loss weights {weights:g}"
    )
    return "\n".join(lines)


def _describe_pairs(batch: Mapping[str, np.ndarray], vocabulary: seqio.Vocabulary) -> str:
    lines = []
    is_end = batch["inputs"] == vocabulary.eos_id  # of T5's pairs, first </s> second </s>
    segments_BS = batch["segments"] if "segments" in batch else np.cumsum(is_end, -1) - is_end
    for row, (inputs, segments) in enumerate(zip(batch["inputs"], segments_BS, strict=True)):
        tokens = inputs != 0
        filled = f"row {row}: {np.count_nonzero(tokens)}/{len(inputs)} tokens, "
        parts = [
            f"  first:  {vocabulary.decode(inputs[tokens & (segments == 0)].tolist())}",
            f"  second: {vocabulary.decode(inputs[tokens & (segments == 1)].tolist())}",
        ]
        if "label" in batch:
            lines += [f"{filled}label {batch['label'][row, 0]}", *parts]
            continue
        chosen = batch["targets"][row][batch["targets"][row] != 0].tolist()
        is_random = batch["random"][row, 0]
        lines += [
            f"{filled}{len(chosen)} to be predicted, "
            + ("the second part is from another text" if is_random else "the second part follows the first"),
            *parts,
            f"  to be predicted: {' | '.join(vocabulary.decode([token]) for token in chosen)}",
        ]
    return "\n".join(lines)


def _extent(columns: np.ndarray) -> str:
    return f"[{columns[0]}:{columns[-1] + 1}]" if len(columns) else "none"


def _positions(batch: Mapping[str, np.ndarray], side: str, row: int, columns: np.ndarray) -> str:
    if f"{side}_positions" not in batch or not len(columns):
        return ""
    positions = batch[f"{side}_positions"][row, columns]
    return f" (positions {positions[0]}..{positions[-1]})"


def _spans(targets: Sequence[int], vocabulary: seqio.Vocabulary) -> list[tuple[str, Any]]:
    """Return each sentinel in the targets with the text after it; sentinel 0 is the last id [t5 span corruption]."""
    first = getattr(vocabulary, "first_sentinel", vocabulary.vocab_size - 1)
    last = first - vocabularies.sentinel_count(vocabulary)
    starts = [i for i, token in enumerate(targets) if last < token <= first]
    ends = [*starts, len(targets)][1:]
    return [
        (f"<extra_id_{first - targets[i]}>", vocabulary.decode(targets[i + 1 : end]))
        for i, end in zip(starts, ends, strict=True)
    ]
