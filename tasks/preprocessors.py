"""From raw examples to text: the `inputs` and `targets` of GLUE, SQuAD and plain text, as strings.

All agree with the t5 package (0.9.4) byte for byte. Must not know: files, TFDS, task names, vocabularies.
"""

from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow as tf

Example = dict[str, Any]  # feature to tensor; `answers` may nest


# ------------------------------------------------------------------------------------------------------- GLUE and SQuAD


def glue(dataset: tf.data.Dataset, prefix: str, text_features: Sequence[str], labels: Sequence[str]) -> tf.data.Dataset:
    """`prefix first: ... second: ...` with the features in order of their names; the target is the label's word.

    A label of -1 (GLUE's test sets) gives the target "<unk>".
    """
    names = sorted(text_features)

    def to_text(x: Example) -> Example:
        pieces = [prefix]
        for name in names:
            pieces += [f"{name}:", x[name]]
        target = tf.where(x["label"] < 0, "<unk>", tf.gather(tf.constant(labels), tf.maximum(x["label"], 0)))
        return {"inputs": tf.strings.join(pieces, " "), "targets": target, "idx": x["idx"]}

    return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE)


def stsb_label(score: tf.Tensor) -> tf.Tensor:
    """A similarity in 0..5 as the nearest fifth, one decimal; rounded in float32, half to even: 2.5 gives "2.4"."""
    return tf.strings.as_string(tf.round(score * 5) / 5, precision=1)


@seqio.map_over_dataset
def stsb(x: Example) -> Example:
    """STS-B: the score is a word to be generated, one of 0.0, 0.2, ... 5.0."""
    inputs = tf.strings.join(["stsb sentence1:", x["sentence1"], "sentence2:", x["sentence2"]], " ")
    return {"inputs": inputs, "targets": stsb_label(x["label"]), "idx": x["idx"]}


def pad_punctuation(text: tf.Tensor) -> tf.Tensor:
    """Spaces round every ASCII punctuation mark, then runs of white space as one space. Other marks are left alone."""
    return _one_space(tf.strings.regex_replace(text, r"([[:punct:]])", r" \1 "))


def _one_space(text: tf.Tensor) -> tf.Tensor:
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
    """t5's SQuAD: `question: ... context: ...` to the first answer, punctuation padded in all; answers are kept."""
    context, question = pad_punctuation(x["context"]), pad_punctuation(x["question"])
    inputs = _one_space(tf.strings.join(["question:", question, "context:", context], " "))
    return _squad_example(x, inputs, context, question, pad_punctuation(x["answers"]["text"]))


@seqio.map_over_dataset
def squad_context_free(x: Example) -> Example:
    """Closed-book SQuAD: `squad trivia question: ...`, to be answered from the parameters alone."""
    context, question = pad_punctuation(x["context"]), pad_punctuation(x["question"])
    inputs = _one_space(tf.strings.join(["squad trivia question:", question], " "))
    return _squad_example(x, inputs, context, question, pad_punctuation(x["answers"]["text"]))


@seqio.map_over_dataset
def squad_unpadded(x: Example) -> Example:
    """SQuAD as the paper prints it: `question: ... context: ...` with the text as the dataset has it."""
    inputs = tf.strings.join(["question:", x["question"], "context:", x["context"]], " ")
    return _squad_example(x, inputs, x["context"], x["question"], x["answers"]["text"])
