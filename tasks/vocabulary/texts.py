"""The raw text that a vocabulary is learnt from or measured on: of any text task, or of files.

Must not know: models of text.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import seqio
import tensorflow as tf

from tasks import files

_FILES_TASK = "vocabulary_files"


def of_task(name: str, split: str = "train") -> Iterator[str]:
    """The inputs and the targets of a task's examples as text, each where it is not empty, in the order of the source.

    Raises ValueError for a name that is no task, or a task without such a split or without text.
    """
    if name not in seqio.TaskRegistry.names():
        kind = "a mixture: name one of its tasks" if name in seqio.MixtureRegistry.names() else "not a registered task"
        raise ValueError(f"{name} is {kind}")
    task = seqio.TaskRegistry.get(name)
    if split not in task.splits:
        raise ValueError(f"task {name} has no split {split!r}; it has: {', '.join(task.splits) or 'none'}")
    dataset = _before_tokenizing(task, split)
    example: Any
    for example in dataset.as_numpy_iterator():
        for feature in task.output_features:
            if example.get(feature):
                yield example[feature].decode()


def _before_tokenizing(task: seqio.Task, split: str) -> tf.data.Dataset:
    """What the task's preprocessors give up to the first one that makes tokens of text.

    They are shown a vocabulary of bytes, so that the step that makes tokens can be told without having the task's own.
    """
    features = {name: seqio.Feature(seqio.ByteVocabulary()) for name in task.output_features}

    def is_text(dataset: tf.data.Dataset) -> bool:
        spec: Any = dataset.element_spec
        found = [spec[name].dtype for name in features if name in spec]
        return bool(found) and all(dtype == tf.string for dtype in found)

    dataset = task.source.get_dataset(split, shuffle=False)
    for step in task.preprocessors:
        step = seqio.utils.add_kwargs_to_transform(step, output_features=features, sequence_length=None)
        after = step(dataset)
        if is_text(dataset) and not is_text(after):
            return dataset
        dataset = after
    if not is_text(dataset):
        raise ValueError(f"task {task.name} has no text: its source gives other than strings for {', '.join(features)}")
    return dataset


def of_files(patterns: Sequence[str], template: str = "{text}") -> Iterator[str]:
    """The rows of files, read and refused as `tasks.files` does, each as the template says."""
    files.register_files(_FILES_TASK, patterns, objective="span_corruption", text_template=template)
    return of_task(_FILES_TASK)
