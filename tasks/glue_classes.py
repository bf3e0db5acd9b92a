"""GLUE for models with a head for classes, one model per task: `glue_cola_classes`, ..., and `glue_cola_bert`, ...

The features, for at most `TASK_FEATURE_LENGTHS["inputs"]` tokens:

  inputs    first </s> second </s>, or sentence </s>; of `_bert` [CLS] first [SEP] second [SEP], or [CLS] sentence
            [SEP]; the longer sentence is truncated first
  segments  of `_bert`: 0 for [CLS] first [SEP], 1 for second [SEP]
  label     [class id], -1 if the test set has no labels; for STS-B [similarity], float32 (regression)

and for inspection `inputs_pretokenized` and `idx`. BERT's special tokens are those of tasks.bert; examples and metrics
those of the text tasks in glue.py. Sources: google-research/bert, run_classifier.py; the pairs of transformers'
T5Tokenizer. Must not import: models, mixtures.
"""

import functools
from collections.abc import Sequence

import seqio
import tensorflow as tf

from tasks import bert, data_sources, glue, objectives, vocabulary
from tasks.errors import UserError


class Labels(seqio.PassThroughVocabulary):
    """The class names of a task, by id; without names, the target is a number.

    Tasks with different classes have different vocabularies, so SeqIO rejects a mixture of them.
    """

    def __init__(self, words: Sequence[str]):
        super().__init__(max(len(words), 1))
        self.words = tuple(words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and self.words == other.words

    def __str__(self) -> str:
        return f"Labels({', '.join(self.words) or 'a number'})"


def tokenized(
    dataset: tf.data.Dataset, output_features: objectives.Features, text_features: Sequence[str]
) -> tf.data.Dataset:
    """Tokenise one text to `first`, or two to `first` and `second`."""
    encode = output_features["inputs"].vocabulary.encode_tf
    dtype = output_features["label"].dtype

    def tokens(x: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        texts = [x[name] for name in text_features]
        parts = {name: tf.cast(encode(text), tf.int32) for name, text in zip(("first", "second"), texts, strict=False)}
        between = " [SEP] " if "segments" in output_features else " </s> "
        metadata = {"inputs_pretokenized": tf.strings.join(texts, between), "idx": x["idx"]}
        return {**parts, "label": tf.cast(x["label"], dtype)[None], **metadata}

    return dataset.map(tokens, num_parallel_calls=tf.data.AUTOTUNE)


def pairs(
    dataset: tf.data.Dataset, sequence_length: objectives.Lengths | None, output_features: objectives.Features
) -> tf.data.Dataset:
    """Combine `first` and `second` into `inputs` and, if they are among the features, `segments`; others stay."""
    vocab, has_segments = output_features["inputs"].vocabulary, "segments" in output_features
    if has_segments:
        length, ids = bert.needed_length(sequence_length), bert.special(vocab)
        first_tokens, end_token = [ids.cls], ids.sep
    else:
        length = objectives.needed_lengths(sequence_length, "inputs")["inputs"]
        if length < 4:
            raise UserError(f"TASK_FEATURE_LENGTHS['inputs'] = {length}: first </s> second </s> needs 4 tokens or more")
        first_tokens, end_token = [], vocabulary.resolved(vocab).eos_id
        assert end_token is not None
    start, end = tf.constant(first_tokens, tf.int32), tf.constant([end_token], tf.int32)
    whole = length - 1 - len(first_tokens)  # most tokens of a sentence alone

    def pair(x: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        x = dict(x)
        first, second = x.pop("first"), tf.zeros(0, tf.int32)
        if "second" in x:  # the longer (or the second, if equal) loses its last token until they fit
            room, second = whole - 1, x.pop("second")
            second = second[: tf.maximum(room - tf.size(first), room // 2)]
            first = first[: room - tf.size(second)]
            second = tf.concat([second, end], 0)
        first = tf.concat([start, first[:whole], end], 0)
        segments = tf.concat([tf.zeros_like(first), tf.ones_like(second)], 0)
        return {"inputs": tf.concat([first, second], 0)} | ({"segments": segments} if has_segments else {}) | x

    return dataset.map(pair, num_parallel_calls=tf.data.AUTOTUNE)


_INPUTS = {"inputs": seqio.Feature(vocabulary.SHARED, add_eos=False)}
_FEATURES = {
    "classes": _INPUTS,
    "bert": _INPUTS | {"segments": seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False)},
}

for _config in glue.CONFIGS:
    _label = seqio.Feature(Labels(_config.labels), add_eos=False, dtype=tf.int32 if _config.labels else tf.float32)
    for _form, _features in _FEATURES.items():
        seqio.TaskRegistry.add(
            f"glue_{_config.name}_{_form}",
            source=seqio.TaskRegistry.get(f"glue_{_config.name}_v002").source,  # pyright: ignore[reportArgumentType]
            preprocessors=[
                functools.partial(tokenized, text_features=tuple(_config.text)),
                seqio.CacheDatasetPlaceholder(),
                pairs,
            ],
            output_features=_features | {"label": _label},
            metric_fns=_config.metric_fns,
            task_cls=data_sources.CorpusTask,
        )
