"""The prefix LM objective of t5's `c4_prefix_lm_objective_*`: full sequences, each split at a random place.

Unlike `objectives.prefix_lm`, which makes text to text, these make what a model reads: tokens, segments, positions and
weights, packed without padding. All lengths in TASK_FEATURE_LENGTHS are the same even number. Must not import: files,
TFDS, task names.
"""

import seqio
import tensorflow as tf

from tasks import objectives
from tasks.errors import UserError

DECODER = ("decoder_target_tokens", "decoder_input_tokens", "decoder_loss_weights", "decoder_causal_attention")
ENCODER_DECODER = (
    "encoder_input_tokens",
    "decoder_target_tokens",
    "decoder_input_tokens",
    "encoder_segment_ids",
    "encoder_positions",
    "decoder_segment_ids",
    "decoder_positions",
    "decoder_loss_weights",
)
Example = dict[str, tf.Tensor]


def full_targets(
    dataset: tf.data.Dataset, sequence_length: objectives.Lengths | None, output_features: objectives.Features
) -> tf.data.Dataset:
    """Concatenate documents, each with its EOS, and split them; the last piece of a block of documents is padded."""
    length = objectives.needed_lengths(sequence_length, "targets")["targets"]
    pieces = objectives.split_documents(dataset, length, eos=output_features["targets"].vocabulary.eos_id)
    return seqio.utils.trim_and_pad_dataset(pieces, {"targets": length})


def _length(sequence_length: objectives.Lengths | None) -> int:
    lengths = set(objectives.needed_lengths(sequence_length, "targets").values())
    if len(lengths) > 1 or next(iter(lengths)) % 2:
        raise UserError(f"this objective needs one even length for all features, got {dict(sequence_length or {})}")
    return lengths.pop()


def _split_point(length: int, seed: tf.Tensor) -> tf.Tensor:
    return tf.random.stateless_uniform((), minval=1, maxval=length, seed=seed, dtype=tf.int32)


def pack_encoder_decoder(dataset: tf.data.Dataset, sequence_length: objectives.Lengths | None) -> tf.data.Dataset:
    """Make one example of two pieces: the encoder reads a prefix of each, the decoder the rest of each.

    The prefixes fill the encoder and the rests the decoder: where the first is split late, the second is split early.
    """
    length = _length(sequence_length)

    @seqio.map_over_dataset(num_seeds=1)
    def pack(pieces: Example, seed: tf.Tensor) -> Example:
        first, second = pieces["targets"][0], pieces["targets"][1]
        in_encoder = _split_point(length, seed)  # tokens of the first piece
        in_decoder = length - in_encoder

        def join(one: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
            return tf.ensure_shape(tf.concat([one, other], axis=0), [length])

        def segments(size: tf.Tensor) -> tf.Tensor:
            return 1 + tf.cast(tf.range(length) >= size, tf.int32)

        targets = join(first[in_encoder:], second[in_decoder:])
        return {
            "encoder_input_tokens": join(first[:in_encoder], second[:in_decoder]),
            "decoder_target_tokens": targets,
            "decoder_input_tokens": seqio.utils.make_autoregressive_inputs(targets, sequence_id=segments(in_decoder)),
            "encoder_segment_ids": segments(in_encoder),
            "encoder_positions": join(tf.range(in_encoder), tf.range(in_decoder)),
            "decoder_segment_ids": segments(in_decoder),
            "decoder_positions": join(tf.range(in_decoder), tf.range(in_encoder)),
            "decoder_loss_weights": tf.cast(targets != 0, tf.int32),
        }

    return pack(dataset.batch(2, drop_remainder=True))  # pyright: ignore[reportCallIssue]  SeqIO gives the seeds


def pack_decoder_only(dataset: tf.data.Dataset, sequence_length: objectives.Lengths | None) -> tf.data.Dataset:
    """Mark a random prefix of each piece, over which attention goes both ways; the loss is on the rest."""
    length = _length(sequence_length)

    @seqio.map_over_dataset(num_seeds=1)
    def pack(piece: Example, seed: tf.Tensor) -> Example:
        split_point, targets = _split_point(length, seed), piece["targets"]
        return {
            "decoder_target_tokens": targets,
            "decoder_input_tokens": seqio.utils.make_autoregressive_inputs(targets),
            "decoder_loss_weights": tf.cast((tf.range(length) >= split_point) & (targets != 0), tf.int32),
            "decoder_causal_attention": tf.cast(tf.range(length) <= split_point, tf.int32),
        }

    return pack(dataset)  # pyright: ignore[reportCallIssue]
