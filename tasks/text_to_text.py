"""Registers a task that is made of text alone: from raw examples to `inputs` and `targets`, tokenised, each with EOS.

Must not import: corpora, mixtures, models.
"""

from collections.abc import Callable, Sequence

import seqio

from tasks import data_sources, vocabulary


def add(
    name: str,
    source: seqio.DataSource,
    to_text: Sequence[Callable],
    metric_fns: Sequence[Callable],
    postprocess_fn: Callable | None = None,
    after_cache: Sequence[Callable] = (),
) -> seqio.Task:
    """Register a task.

    Args:
      to_text: preprocessors from raw examples to texts.
      metric_fns: of postprocessed targets and predictions; none if only the loss is evaluated.
      postprocess_fn: of decoded texts; None keeps them.
      after_cache: preprocessors of tokens, which an offline cache does not hold.
    """
    return seqio.TaskRegistry.add(
        name,
        source=source,  # pyright: ignore[reportArgumentType]  SeqIO declares int, but its own sources return None
        preprocessors=[
            *to_text,
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            *after_cache,
            seqio.preprocessors.append_eos_after_trim,
        ],
        postprocess_fn=postprocess_fn,
        metric_fns=[*metric_fns],
        output_features=vocabulary.output_features(),
        task_cls=data_sources.CorpusTask,
    )
