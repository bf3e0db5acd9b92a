"""Raw text of any text task, or of files, to train or measure a vocabulary on.

Must not depend on tokenizer models.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tasks import user_files
from tasks.errors import UserError

_FILES_TASK = "vocabulary_files"
_FIRST_BYTE = 3  # in SeqIO's byte vocabulary, after padding, EOS and unknown


def of_task(name: str, split: str = "train") -> Iterator[str]:
    """Yield the non-empty inputs and targets of a task's examples as text, in the order of the source.

    Raises UserError if `name` is not a task, or the task lacks the split or has no text.
    """
    if name not in seqio.TaskRegistry.names():
        kind = "a mixture: name one of its tasks" if name in seqio.MixtureRegistry.names() else "not a registered task"
        raise UserError(f"{name} is {kind}")
    task = seqio.TaskRegistry.get(name)
    if split not in task.splits:
        raise UserError(f"task {name} has no split {split!r}; it has: {', '.join(task.splits) or 'none'}")
    example: Any
    for example in _bytes_as_tokens(task, split).as_numpy_iterator():
        for feature in task.output_features:
            if len(example.get(feature, ())):
                yield (example[feature] - _FIRST_BYTE).astype(np.uint8).tobytes().decode()


def _bytes_as_tokens(task: seqio.Task, split: str) -> tf.data.Dataset:
    """Run the task's preprocessors, up to the one that tokenises, with a byte vocabulary.

    The tokens are then the bytes of the text, whichever step and column they come from.
    """
    features = {name: seqio.Feature(seqio.ByteVocabulary()) for name in task.output_features}

    def has_tokens(dataset: tf.data.Dataset) -> bool:
        spec: Any = dataset.element_spec
        return any(spec[name].dtype != tf.string for name in features if name in spec)

    dataset = task.source.get_dataset(split, shuffle=False)
    steps = list(task.preprocessors)
    while not has_tokens(dataset):
        if not steps:
            raise UserError(f"task {task.name} never tokenises text")
        step = seqio.utils.add_kwargs_to_transform(steps.pop(0), output_features=features, sequence_length=None)
        dataset = step(dataset)
    if len(steps) == len(task.preprocessors):
        raise UserError(f"task {task.name} has no text: its source yields tokens")
    return dataset


def of_files(patterns: Sequence[str], template: str = "{text}") -> Iterator[str]:
    """Yield the rows of files, formatted by the template, with the checks of `tasks.user_files`."""
    user_files.register_files(_FILES_TASK, patterns, objective="span_corruption", text_template=template)
    return of_task(_FILES_TASK)
