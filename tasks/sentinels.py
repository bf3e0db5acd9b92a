"""A task's twin with a sentinel at the end of the inputs and at the start of the targets, such as `..._1_sentinel`.

Span corruption has taught a model to write a sentinel and then what it stands for; fine-tuning on small corpora starts
from that. As in the t5 package (seqio.experimental), but for any vocabulary's first sentinel. Must not import: corpora,
mixtures.
"""

import functools
from collections.abc import Callable
from typing import Any

import seqio
import tensorflow as tf

from tasks import data_sources, objectives, vocabulary

_ENDINGS = ("_train", "_dev", "_test", "_eval")  # the twin's name keeps them at its end


def add_twin(task: seqio.Task) -> seqio.Task:
    """Register the task's twin: `super_glue_cb_v102` gives `super_glue_cb_v102_1_sentinel`.

    The task's last step is seqio.preprocessors.append_eos_after_trim. The twin's keeps the last token of a text that
    it trims: the sentinel of the inputs, and, as in t5, the last token of the targets.
    """
    *steps, _ = task.preprocessors
    return seqio.TaskRegistry.add(
        twin_name(task.name),
        source=task.source,  # pyright: ignore[reportArgumentType]  as in c4.py
        preprocessors=[*steps, add_sentinel, append_eos_after_trim_before_last],
        postprocess_fn=functools.partial(_without_sentinel, postprocess=task.postprocessor),
        metric_fns=task.metric_fns,
        output_features=task.output_features,
        task_cls=data_sources.CorpusTask,
    )


def twin_name(name: str) -> str:
    """Return the name of a task's twin."""
    for ending in _ENDINGS:
        if name.endswith(ending):
            return f"{name.removesuffix(ending)}_1_sentinel{ending}"
    return f"{name}_1_sentinel"


def _sentinel(which: seqio.Vocabulary) -> int:
    which = vocabulary.resolved(which)
    return getattr(which, "first_sentinel", which.vocab_size - 1)


def add_sentinel(dataset: tf.data.Dataset, output_features: objectives.Features) -> tf.data.Dataset:
    """Put the vocabulary's first sentinel behind the inputs and before the targets."""
    for feature in output_features.values():
        vocabulary.require_sentinels(feature.vocabulary, 1)
    ends = {name: [_sentinel(feature.vocabulary)] for name, feature in output_features.items()}

    def add(x: dict[str, Any]) -> dict[str, Any]:
        inputs = tf.concat([x["inputs"], ends["inputs"]], axis=0)
        return {**x, "inputs": inputs, "targets": tf.concat([ends["targets"], x["targets"]], axis=0)}

    return dataset.map(add, num_parallel_calls=tf.data.AUTOTUNE)


def append_eos_after_trim_before_last(
    dataset: tf.data.Dataset, sequence_length: objectives.Lengths | None, output_features: objectives.Features
) -> tf.data.Dataset:
    """Trim tokens before their last one so that they fit with EOS, which is appended."""

    def append(name: str, tokens: tf.Tensor) -> tf.Tensor:
        if name not in output_features or not output_features[name].add_eos:
            return tokens
        length = (sequence_length or {}).get(name)
        if length is not None:
            room = max(length - 1, 0)
            kept = tf.concat([tokens[: max(room - 1, 0)], tokens[-1:]], axis=0)[:room]
            tokens = tf.cond(tf.size(tokens) > room, lambda: kept, lambda: tokens)
        return tf.concat([tokens, [output_features[name].vocabulary.eos_id]], axis=0)  # pyright: ignore[reportCallIssue, reportArgumentType]

    return dataset.map(lambda x: {name: append(name, tokens) for name, tokens in x.items()})


def _without_sentinel(text: str, postprocess: Callable | None = None, **settings) -> Any:
    """Remove the sentinel at the start of a text, and postprocess the rest."""
    which = vocabulary.SHARED
    sentinel = which.decode([_sentinel(which)])
    text = text.removeprefix(sentinel).strip() if sentinel and text.startswith(sentinel) else text
    if postprocess is None:
        return text
    return postprocess(text, **settings)
