"""Several corpora as a mixture, without Python: one's own files by name, registered tasks, or both.

    register({"news": "news/*.parquet", "chat": "chat.jsonl"}, tasks=["squad_v010_allanswers"], mixing="temperature",
             temperature=2.0)

Each name becomes a task (user_files.py), and all together the mixture `mixture`, with the rates of mixtures.py. Must
not import: models, datasets.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import seqio
from absl import logging

from tasks import mixtures, text_metrics, user_files
from tasks.errors import UserError

Names = str | Sequence[str]
FILES = "files"  # the task of files without a name
MIXTURE = "mixture"


def register(
    train_files: Names | Mapping[str, Names] | None = None,
    eval_files: Names | Mapping[str, Names] | None = None,
    tasks: Sequence[str] = (),
    *,
    mixing: str | Mapping[str, float] = "proportional",
    limit: float | None = None,
    temperature: float = 1.0,
    budget: float | None = None,
    max_epochs: float | None = None,
    metrics: Names | Mapping[str, Names] | None = None,
    mode_tokens: Mapping[str, str] | None = None,
    **options: Any,
) -> str:
    """Register the tasks and, if there are several, their mixture; return its name, or that of the only task.

    Args:
      train_files, eval_files: paths or patterns, or a mapping of the names of corpora to them. A corpus that has only
        files to evaluate on has rate 0.
      tasks: names of registered tasks to mix with them.
      mixing: a strategy of `mixtures.rates`, or the rate of each corpus and task that is trained on.
      limit, temperature, budget, max_epochs: of the strategy; the budget is a number of examples.
      metrics: names in text_metrics.METRICS, for all corpora or by corpus; None: exact match and F1.
      mode_tokens: of the corpora whose objective is UL2's.
      options: objective, its settings, and templates of `user_files.register_files`, for all corpora or by corpus.

    Raises:
      UserError: a name is not valid or taken, a mapping has an unknown corpus, or the rates cannot be computed.
    """
    train, evaluated = _by_name("TRAIN_FILES", train_files), _by_name("EVAL_FILES", eval_files)
    names = list(dict.fromkeys([*train, *evaluated]))
    several = len(names) + len(tasks) > 1
    for name in names:
        _check_name(name)
    by_corpus = {
        key: _by_corpus(user_files.SETTINGS.get(key, f"FILES_{key.upper()}"), value, names)
        for key, value in options.items()
    }
    if mode_tokens is not None:  # for those that use them, or all, which is an error
        denoised = [name for name in names if by_corpus.get("objective", {}).get(name) in user_files.WITH_MODES]
        by_corpus["mode_tokens"] = dict.fromkeys(denoised or names, mode_tokens)
    by_corpus["metrics"] = _by_corpus("METRICS", metrics, names)
    own: dict[str, user_files.FilesTask] = {}
    for name in names:
        settings = {key: values[name] for key, values in by_corpus.items() if name in values}
        chosen = settings["metrics"] = text_metrics.named(settings.get("metrics"))
        own[name] = task = user_files.register_files(name, train.get(name), evaluated.get(name), **settings)
        if name in evaluated and (of_numbers := [m.__name__ for m in chosen if m.__name__ in text_metrics.OF_NUMBERS]):
            for text in task.texts("validation"):
                text_metrics.check_number(f"{name}: {of_numbers[0]}", text["targets"])
    if not several:
        return next(iter([*own, *tasks]))
    trained = {name: task for name, task in own.items() if "train" in task.splits} | _registered(tasks)
    rates = _rates(trained, mixing, limit, temperature, budget, max_epochs)
    if MIXTURE in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(MIXTURE)
    mixtures.add_mixture(MIXTURE, rates | {name: 0.0 for name in own if name not in trained})
    return MIXTURE


def num_examples(task: seqio.Task) -> int | None:
    """Return the number of a task's training examples: published, in its files, or known to its source; else None."""
    if isinstance(task, user_files.FilesTask):
        return task.num_rows("train")
    published = mixtures.train_examples(task.name)
    return task.source.num_input_examples("train") if published is None else published


def _by_name(option: str, files: Names | Mapping[str, Names] | None) -> dict[str, Names]:
    if files is None:
        return {}
    by_name = dict(files) if isinstance(files, Mapping) else {FILES: files}
    if not by_name or not all(by_name.values()):
        raise UserError(f"{option} = {files!r} names no files")
    return by_name


def _check_name(name: str) -> None:
    if not (isinstance(name, str) and re.fullmatch(r"\w[\w.:-]*", name)):
        raise UserError(
            f"{name!r} cannot be the name of a corpus: use letters, digits, '_', '-', '.' and ':', and begin "
            "with one of the first three"
        )
    if name == MIXTURE:
        raise UserError(f"{name!r} is the name of all corpora together: give this one another")
    taken = seqio.TaskRegistry._REGISTRY.get(name)
    if (taken is not None and not isinstance(taken, user_files.FilesTask)) or name in seqio.MixtureRegistry.names():
        raise UserError(f"{name!r} is the name of a registered task or mixture: give the corpus another")


def _by_corpus(option: str, value: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the value of an option for each corpus; those that a mapping lacks keep the default."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    for name in value:
        if name not in names:
            raise UserError(f"{option} has a value for {name!r}, but {_there_are(name, names)}")
    return dict(value)


def _there_are(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"the corpora are {', '.join(names)}." + (f" Did you mean {near[0]!r}?" if near else "")


def _registered(names: Sequence[str]) -> dict[str, seqio.Task]:
    tasks = {}
    for name in names:
        if name in tasks:
            raise UserError(f"MIXTURE_OR_TASK_NAME names {name} twice: to see it more often, give rates in MIXING")
        if name in seqio.MixtureRegistry.names():
            members = [task.name for task in seqio.MixtureRegistry.get(name).tasks]
            raise UserError(f"{name} is a mixture: to mix it with others, list its tasks: {', '.join(members)}")
        if name not in seqio.TaskRegistry.names():
            near = difflib.get_close_matches(name, seqio.TaskRegistry.names(), n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"no task {name!r} is registered.{hint}")
        tasks[name] = seqio.TaskRegistry.get(name)
    return tasks


def _rates(
    tasks: Mapping[str, seqio.Task],
    mixing: str | Mapping[str, float],
    limit: float | None,
    temperature: float,
    budget: float | None,
    max_epochs: float | None,
) -> dict[str, float]:
    if not isinstance(mixing, str):
        if unknown := [name for name in mixing if name not in tasks]:
            raise UserError(f"the rates have {unknown[0]!r}, but {_there_are(unknown[0], tasks)}")
        if missing := [name for name in tasks if name not in mixing]:
            raise UserError(f"the rates have none for {', '.join(missing)}: give it one, or 0 to evaluate it alone")
        for name, rate in mixing.items():
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
                raise UserError(f"MIXING: the rate of {name} is {rate!r}: it must be a finite number, at least 0")
        if not any(mixing.values()):
            raise UserError("MIXING: all rates are 0, so there is nothing to train on")
        return {name: float(mixing[name]) for name in tasks}
    counts = {}
    for name, task in tasks.items():
        count = 1 if mixing == "equal" else num_examples(task)
        if count is None:
            raise UserError(f"the number of examples of {name} is not known: give rates as numbers, or mix equally")
        counts[name] = count
    rates = mixtures.raw_rates(counts, mixing, limit, temperature, budget=budget, max_epochs=max_epochs)  # pyright: ignore[reportArgumentType]
    if mixing == "unimax" and budget is not None and (used := math.fsum(rates.values())) < 0.999 * budget:
        logging.warning(
            "The corpora hold %.4g examples within MIXING_MAX_EPOCHS = %s, the run takes %.4g: each is read %.3g times "
            "as often as that allows.",
            used,
            max_epochs or 1,
            budget,
            budget / used,
        )
    return rates
