"""Text preprocessors that several corpora share: from raw examples to the strings `inputs` and `targets`.

All agree with the t5 package (0.9.4) byte for byte. Must not import: files, TFDS, task names, vocabularies.
"""

from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow as tf

Example = dict[str, Any]  # feature -> tensor; `answers` may be nested


# ------------------------------------------------------------------------------------------------------- GLUE and SQuAD


def glue(dataset: tf.data.Dataset, prefix: str, text_features: Sequence[str], labels: Sequence[str]) -> tf.data.Dataset:
    """Make inputs `prefix first: ... second: ...`, with the features in this order; the target is the label word.

    A label of -1 (GLUE's test sets) gives the target "<unk>".
    """

    def to_text(x: Example) -> Example:
        pieces = [prefix]
        for name in text_features:
            pieces += [f"{name}:", x[name]]
        target = tf.where(x["label"] < 0, "<unk>", tf.gather(tf.constant(labels), tf.maximum(x["label"], 0)))
        return {"inputs": tf.strings.join(pieces, " "), "targets": target, "idx": x["idx"]}

    return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE)


def stsb_label(score: tf.Tensor) -> tf.Tensor:
    """Round a similarity in 0..5 to the nearest fifth, in float32, half to even: 2.5 gives "2.4"."""
    return tf.strings.as_string(tf.round(score * 5) / 5, precision=1)


@seqio.map_over_dataset
def stsb(x: Example) -> Example:
    """Make STS-B's inputs; the target is the score as text, one of 0.0, 0.2, ... 5.0."""
    inputs = tf.strings.join(["stsb sentence1:", x["sentence1"], "sentence2:", x["sentence2"]], " ")
    return {"inputs": inputs, "targets": stsb_label(x["label"]), "idx": x["idx"]}


def pad_punctuation(text: tf.Tensor) -> tf.Tensor:
    """Put spaces around ASCII punctuation and collapse white space. Other punctuation stays."""
    return one_space(tf.strings.regex_replace(text, r"([[:punct:]])", r" \1 "))


def one_space(text: tf.Tensor) -> tf.Tensor:
    """Collapse white space."""
    return tf.strings.regex_replace(text, r"\s+", " ")


def _squad_example(
    x: Example, inputs: tf.Tensor, context: tf.Tensor, question: tf.Tensor, answers: tf.Tensor
) -> Example:
    return {
        "inputs": inputs,
        "targets": answers[0],
        "id": x["id"],
        "context": context,
        "question": question,
        "answers": answers,
    }


@seqio.map_over_dataset
def squad(x: Example) -> Example:
    """Make t5's SQuAD: `question: ... context: ...` -> first answer, with padded punctuation."""
    context, question = pad_punctuation(x["context"]), pad_punctuation(x["question"])
    inputs = one_space(tf.strings.join(["question:", question, "context:", context], " "))
    return _squad_example(x, inputs, context, question, pad_punctuation(x["answers"]["text"]))


@seqio.map_over_dataset
def squad_context_free(x: Example) -> Example:
    """Make closed-book SQuAD: `squad trivia question: ...` without the context."""
    context, question = pad_punctuation(x["context"]), pad_punctuation(x["question"])
    inputs = one_space(tf.strings.join(["squad trivia question:", question], " "))
    return _squad_example(x, inputs, context, question, pad_punctuation(x["answers"]["text"]))


@seqio.map_over_dataset
def squad_unpadded(x: Example) -> Example:
    """Make SQuAD as printed in the T5 paper: `question: ... context: ...` with unchanged text."""
    inputs = tf.strings.join(["question:", x["question"], "context:", x["context"]], " ")
    return _squad_example(x, inputs, x["context"], x["question"], x["answers"]["text"])
