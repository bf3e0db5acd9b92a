"""Prints docs/reference/tasks.md: every task and mixture of the registries, without reading data or the network.

    python -m tasks > docs/reference/tasks.md

Must not know: what a task's text looks like.
"""

import functools
import inspect
from collections.abc import Callable, Iterator

import seqio

import tasks  # noqa: F401  fills the registries
from tasks import data_sources, mc4

_HEAD = """\
# Tasks and mixtures

`import tasks` registers these in SeqIO's registries; `MIXTURE_OR_TASK_NAME` takes their names. This page is made by
`python -m tasks`.

A task reads the corpus's official files under `T5X_LITE_DATA_DIR` if the folder is there, and TFDS otherwise. Splits
are those of the official files. A task without metric functions is evaluated by its loss alone."""

# Steps that most tasks have and that say nothing about one of them.
_COMMON = {"tokenize", "tokenized", "text_as_targets", "append_eos_after_trim", "CacheDatasetPlaceholder"}


def _step(preprocessor: Callable) -> str:
    """A preprocessor's name, with the numbers that it is given: span_corruption(mean_noise_span_length=2.0)."""
    given = preprocessor.keywords if isinstance(preprocessor, functools.partial) else {}
    function = inspect.unwrap(preprocessor.func if isinstance(preprocessor, functools.partial) else preprocessor)
    name = getattr(function, "__name__", type(function).__name__)
    numbers = ", ".join(f"{key}={value}" for key, value in given.items() if isinstance(value, float))
    return f"{name}({numbers})" if numbers else name


def _task_row(task: seqio.Task) -> str:
    steps = [step for step in map(_step, task.preprocessors) if step not in _COMMON]
    source = task.source
    if isinstance(source, data_sources.CorpusSource):
        reads = f"`{source._folder}/` or TFDS `{source._tfds_name}`"
    else:
        reads = "text of the installed Python"
    columns = (
        f"`{task.name}`",
        reads,
        ", ".join(source._splits),  # source.splits would look for the files
        ", ".join(task.output_features),
        ", ".join(f"`{step}`" for step in steps),
        ", ".join(f"`{metric.__name__}`" for metric in task.metric_fns) or "none",
    )
    return f"| {' | '.join(columns)} |"


def _mixture_row(mixture: seqio.Mixture) -> str:
    rates = {task.name: float(mixture.get_rate(task)) for task in mixture.tasks}
    total = sum(rates.values())
    order = sorted(rates, key=lambda name: (-rates[name], name))
    shares = ", ".join(f"`{name}` {rates[name] / total:.1%}" for name in order if rates[name])
    evaluated = ", ".join(f"`{name}`" for name in order if not rates[name])
    return f"| `{mixture.name}` | {shares} | {evaluated} |"


def _task_rows() -> Iterator[str]:
    """Yield a row for each task, and one for all languages of mC4."""
    for name in sorted(seqio.TaskRegistry.names()):
        task = seqio.TaskRegistry.get(name)
        if not name.startswith("mc4."):
            yield _task_row(task)
        elif name == f"mc4.{mc4.LANGUAGES[0]}":
            rest = _task_row(task).split(" | ", 1)[1]
            yield f"| `mc4.LANGUAGE`: {', '.join(mc4.LANGUAGES).replace('-', '_')} | {rest}"


def lines() -> Iterator[str]:
    yield from (_HEAD, "", "## Tasks", "")
    yield from ("| task | reads | splits | features | made by | metrics |", "| --- | --- | --- | --- | --- | --- |")
    yield from _task_rows()
    yield from ("", "## Mixtures", "", "[Mixtures](../guides/mixtures.md) explains the names.", "")
    yield from ("| mixture | share of each task | only evaluated |", "| --- | --- | --- |")
    yield from (_mixture_row(seqio.MixtureRegistry.get(name)) for name in sorted(seqio.MixtureRegistry.names()))


if __name__ == "__main__":
    print(*lines(), sep="\n")
