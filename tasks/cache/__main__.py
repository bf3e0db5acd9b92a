"""Makes offline caches of tokenised tasks by SeqIO's own cache job on Apache Beam.

    python -m tasks.cache --tasks=c4_v220_span_corruption --output_cache_dir=DIR [--vocabulary=FILE|bytes]
        [--module_import=my.tasks] [--pipeline_options=--runner=DataflowRunner,--project=...] [--overwrite]

The job is seqio.scripts.cache_tasks_main, whose flags these are. What this adds: a mixture stands for its tasks; names,
data and folders are checked before Beam starts; every worker gets this process's data folders and vocabulary; and the
cache says which vocabulary that was. `--verbosity=0` shows what SeqIO and Beam do. Exit code 2 when nothing was begun.

Needs requirements-cache.txt. Must not know: what any task reads or makes.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf
from absl import app, flags, logging

from tasks import cache, readers, vocabulary
from tasks.errors import UserError

_ENVIRONMENT = (readers.DATA_DIR_VARIABLE, "TFDS_DATA_DIR")  # what says where examples come from


def main(_: Sequence[str]) -> int:
    """The command, once absl has parsed SeqIO's flags and those of `command`; returns the exit code."""
    import apache_beam as beam  # pyright: ignore[reportMissingImports]
    from seqio import beam_utils
    from seqio.scripts import cache_tasks_main as job

    given = flags.FLAGS
    if not given["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # SeqIO logs whole examples
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    prepare = functools.partial(cache.prepare_worker, environment, given.vocabulary, given.bad_rows)
    modules = ["tasks", *given.module_import]
    try:
        job._import_modules(modules)
        prepare()
        tasks = _to_do(_named(given.tasks or []), given.output_cache_dir, given.overwrite)
    except (ImportError, OSError, ValueError) as error:
        print(f"tasks.cache: {error}", file=sys.stderr)
        return 2
    # SeqIO's transforms can be told what a worker does first, and with which vocabulary to count tokens (one where the
    # first was not done has only T5's to stand for SHARED); SeqIO's job has no flag for that.
    preprocess, count = beam_utils.PreprocessTask, beam_utils.GetStats
    job.beam_utils.PreprocessTask = functools.partial(preprocess, setup_fn=prepare)
    job.beam_utils.GetStats = lambda features, **settings: count(_with_vocabularies(features), **settings)
    options = beam.options.pipeline_options.PipelineOptions(given.pipeline_options)
    with beam.Pipeline(options=options) as pipeline:
        for task in tasks:
            job.run_pipeline(
                pipeline,
                [re.escape(task.name)],
                given.output_cache_dir,
                modules_to_import=modules,
                completed_file_contents=cache.record(task),
            )
    for task in tasks:
        _print_counts(task, _folder(task, given.output_cache_dir))
    return 0


def _named(patterns: Sequence[str]) -> list[seqio.Task]:
    """The tasks that the names, or regular expressions, stand for. Raises ValueError for one that matches nothing."""
    if not patterns:
        raise UserError("nothing to cache: name tasks or mixtures, --tasks=glue_rte_v002,squad_v010_allanswers")
    known = {name: seqio.TaskRegistry.get(name) for name in seqio.TaskRegistry.names()}
    mixtures = {name: seqio.MixtureRegistry.get(name) for name in seqio.MixtureRegistry.names()}
    found: dict[str, seqio.Task] = {}
    for pattern in patterns:
        matching = [known[name] for name in known if re.fullmatch(pattern, name)]
        if not matching and pattern in mixtures:
            matching = mixtures[pattern].tasks
        if not matching:
            near = difflib.get_close_matches(pattern, [*known, *mixtures], n=3, cutoff=0.4)
            raise UserError(f"no task or mixture is called {pattern!r}; nearest: {', '.join(near) or 'none'}")
        found |= {task.name: task for task in matching}
    return list(found.values())


def _to_do(tasks: Sequence[seqio.Task], root: str, overwrite: bool) -> list[seqio.Task]:
    """Those not cached in `root` yet; with `overwrite` all, and what is there is removed."""
    seqio.add_global_cache_dirs([root])
    to_do = []
    for task in tasks:
        folder = _folder(task, root)
        if not task.supports_caching:
            raise UserError(f"{task.name} has no CacheDatasetPlaceholder among its steps: there is nothing to cache")
        if not task.splits:
            raise UserError(f"{task.name} has no data: none of its splits' files is there")
        for split in task.splits:
            task.source.list_shards(split)  # says so if the data is not there, before anything is removed
        if overwrite or not tf.io.gfile.isdir(folder):
            to_do.append(task)
        elif tf.io.gfile.exists(os.path.join(folder, cache.COMPLETED)):
            cache.check(task)
            print(f"{task.name} is cached already in {folder}; --overwrite makes it anew")
        else:
            raise UserError(
                f"{folder} holds an unfinished cache: its job was stopped, or still runs. If it does not, "
                "--overwrite (make cache CACHE_FLAGS=--overwrite) removes what is there and begins again"
            )
    for task in to_do:
        if tf.io.gfile.isdir(_folder(task, root)):
            tf.io.gfile.rmtree(_folder(task, root))
            task._cache_dir = None  # SeqIO remembers where it found one
    return to_do


def _with_vocabularies(features: Mapping[str, seqio.utils.Feature]) -> dict[str, seqio.utils.Feature]:
    return {k: dataclasses.replace(f, vocabulary=vocabulary.resolved(f.vocabulary)) for k, f in features.items()}


def _folder(task: seqio.Task, root: str) -> str:
    return os.path.join(root, seqio.get_task_dir_from_name(task.name))


def _print_counts(task: seqio.Task, folder: str) -> None:
    for split in task.splits:
        with tf.io.gfile.GFile(seqio.get_cached_stats_path(folder, split)) as file:
            counts = json.load(file)
        print(f"{folder}, {split}: " + ", ".join(f"{k.replace('_', ' ')} {counts[k]:,}" for k in sorted(counts)))


def command() -> None:
    """Adds to SeqIO's flags and runs `main`."""
    try:
        from seqio.scripts import cache_tasks_main  # noqa: F401  defines SeqIO's flags
    except ModuleNotFoundError as error:
        sys.exit(
            f"tasks.cache: making a cache needs Apache Beam ({error}): use `make cache`, or pip install -r "
            "requirements-cache.txt. Reading one does not"
        )
    flags.DEFINE_string("vocabulary", None, 'A SentencePiece model, or "bytes"; T5\'s if not given.')
    flags.DEFINE_enum("bad_rows", "refuse", ["refuse", "skip"], "What to do with lines that cannot be read.")
    flags.mark_flag_as_required("output_cache_dir")
    # Beam's own choice, DirectRunner, would first fetch a program from the network.
    flags.FLAGS.set_default("pipeline_options", ["--runner=FnApiRunner"])
    app.run(main)


if __name__ == "__main__":
    command()
