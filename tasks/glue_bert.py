"""GLUE for an encoder with a classification head: `glue_cola_bert`, ..., `glue_ax_bert`; one model per task.

The features, for at most `TASK_FEATURE_LENGTHS["inputs"]` tokens:

  inputs    [CLS] first [SEP] second [SEP], or [CLS] sentence [SEP]; the longer sentence is truncated first
  segments  0 for [CLS] first [SEP], 1 for second [SEP]
  label     [class id], -1 if the test set has no labels; for STS-B [similarity], float32 (regression)

and for inspection `inputs_pretokenized` and `idx`. Special tokens are those of tasks.bert; examples and metrics those
of the text tasks in glue.py. Source: google-research/bert, run_classifier.py. Must not import: models, mixtures.
"""

import functools
from collections.abc import Sequence

import seqio
import tensorflow as tf

from tasks import bert, data_sources, glue, objectives, vocabulary


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
        metadata = {"inputs_pretokenized": tf.strings.join(texts, " [SEP] "), "idx": x["idx"]}
        return {**parts, "label": tf.cast(x["label"], dtype)[None], **metadata}

    return dataset.map(tokens, num_parallel_calls=tf.data.AUTOTUNE)


def pairs(
    dataset: tf.data.Dataset, sequence_length: objectives.Lengths | None, output_features: objectives.Features
) -> tf.data.Dataset:
    """Combine `first` and `second` into `inputs` and `segments`; other features stay."""
    length = bert.needed_length(sequence_length)
    ids = bert.special(output_features["inputs"].vocabulary)
    cls, sep = tf.constant([ids.cls], tf.int32), tf.constant([ids.sep], tf.int32)

    def pair(x: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        x = dict(x)
        first, second = x.pop("first"), tf.zeros(0, tf.int32)
        if "second" in x:  # the longer (or the second, if equal) loses its last token until they fit
            room, second = length - 3, x.pop("second")
            second = second[: tf.maximum(room - tf.size(first), room // 2)]
            first = first[: room - tf.size(second)]
            second = tf.concat([second, sep], 0)
        first = tf.concat([cls, first[: length - 2], sep], 0)
        segments = tf.concat([tf.zeros_like(first), tf.ones_like(second)], 0)
        return {"inputs": tf.concat([first, second], 0), "segments": segments, **x}

    return dataset.map(pair, num_parallel_calls=tf.data.AUTOTUNE)


for _config in glue.CONFIGS:
    _label = seqio.Feature(Labels(_config.labels), add_eos=False, dtype=tf.int32 if _config.labels else tf.float32)
    seqio.TaskRegistry.add(
        f"glue_{_config.name}_bert",
        source=seqio.TaskRegistry.get(f"glue_{_config.name}_v002").source,  # pyright: ignore[reportArgumentType]
        preprocessors=[
            functools.partial(tokenized, text_features=tuple(_config.text)),
            seqio.CacheDatasetPlaceholder(),
            pairs,
        ],
        output_features={
            "inputs": seqio.Feature(vocabulary.SHARED, add_eos=False),
            "segments": seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False),
            "label": _label,
        },
        metric_fns=_config.metric_fns,
        task_cls=data_sources.CorpusTask,
    )
