"""Build offline caches of tokenised tasks with SeqIO's cache job on Apache Beam.

    python -m tasks.cache --tasks=c4_v220_span_corruption --output_cache_dir=DIR [--vocabulary=FILE|bytes]
        [--module_import=my.tasks] [--pipeline_options=--runner=DataflowRunner,--project=...] [--overwrite]

The job and its flags are those of seqio.scripts.cache_tasks_main. In addition, a mixture is expanded to its tasks;
names, data and folders are checked before Beam starts; every worker gets this process's data folders and vocabulary;
and the cache records the vocabulary. `--verbosity=0` shows the logs of SeqIO and Beam. Exit code 2 if the job was not
started.

Needs requirements-cache.txt. Must not depend on particular tasks.
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

_ENVIRONMENT = (readers.DATA_DIR_VARIABLE, "TFDS_DATA_DIR")  # locations of the data


def main(_: Sequence[str]) -> int:
    """Run the command after absl has parsed SeqIO's flags and those of `command`; return the exit code."""
    import apache_beam as beam  # pyright: ignore[reportMissingImports]
    from seqio import beam_utils
    from seqio.scripts import cache_tasks_main as job

    args = flags.FLAGS
    if not args["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # SeqIO logs whole examples
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    prepare = functools.partial(cache.prepare_worker, environment, args.vocabulary, args.bad_rows)
    modules = ["tasks", *args.module_import]
    try:
        job._import_modules(modules)
        prepare()
        tasks = _to_do(_find_tasks(args.tasks or []), args.output_cache_dir, args.overwrite)
    except (ImportError, OSError, ValueError) as error:
        print(f"tasks.cache: {error}", file=sys.stderr)
        return 2
    # SeqIO's job has no flag for a worker's set-up function, nor for the vocabulary to count tokens with. (In a worker
    # without that set-up, SHARED is T5's vocabulary.) So its transforms are replaced.
    preprocess, count = beam_utils.PreprocessTask, beam_utils.GetStats
    job.beam_utils.PreprocessTask = functools.partial(preprocess, setup_fn=prepare)
    job.beam_utils.GetStats = lambda features, **settings: count(_with_vocabularies(features), **settings)
    options = beam.options.pipeline_options.PipelineOptions(args.pipeline_options)
    with beam.Pipeline(options=options) as pipeline:
        for task in tasks:
            job.run_pipeline(
                pipeline,
                [re.escape(task.name)],
                args.output_cache_dir,
                modules_to_import=modules,
                completed_file_contents=cache.record(task),
            )
    for task in tasks:
        _print_counts(task, _folder(task, args.output_cache_dir))
    return 0


def _find_tasks(patterns: Sequence[str]) -> list[seqio.Task]:
    """Return the tasks that match names or regular expressions. Raises UserError if one matches nothing."""
    if not patterns:
        raise UserError("nothing to cache: name tasks or mixtures, --tasks=glue_rte_v002,squad_v010_allanswers")
    registered = {name: seqio.TaskRegistry.get(name) for name in seqio.TaskRegistry.names()}
    mixtures = {name: seqio.MixtureRegistry.get(name) for name in seqio.MixtureRegistry.names()}
    tasks: dict[str, seqio.Task] = {}
    for pattern in patterns:
        matching = [registered[name] for name in registered if re.fullmatch(pattern, name)]
        if not matching and pattern in mixtures:
            matching = mixtures[pattern].tasks
        if not matching:
            near = difflib.get_close_matches(pattern, [*registered, *mixtures], n=3, cutoff=0.4)
            raise UserError(f"no task or mixture is called {pattern!r}; nearest: {', '.join(near) or 'none'}")
        tasks |= {task.name: task for task in matching}
    return list(tasks.values())


def _to_do(tasks: Sequence[seqio.Task], root: str, overwrite: bool) -> list[seqio.Task]:
    """Return the tasks that are not cached in `root`; with `overwrite`, delete their caches and return all."""
    seqio.add_global_cache_dirs([root])
    to_do = []
    for task in tasks:
        folder = _folder(task, root)
        if not task.supports_caching:
            raise UserError(f"{task.name} has no CacheDatasetPlaceholder among its preprocessors: it cannot be cached")
        if not task.splits:
            raise UserError(f"{task.name} has no data: no file of its splits exists")
        for split in task.splits:
            task.source.list_shards(split)  # raises an error if data are missing, before anything is deleted
        if overwrite or not tf.io.gfile.isdir(folder):
            to_do.append(task)
        elif tf.io.gfile.exists(os.path.join(folder, cache.COMPLETED)):
            cache.check(task)
            print(f"{task.name} is already cached in {folder}; --overwrite rebuilds it")
        else:
            raise UserError(
                f"{folder} has an unfinished cache: its job was interrupted or is still running. If it is not running, "
                "--overwrite (make cache CACHE_FLAGS=--overwrite) deletes it and starts again"
            )
    for task in to_do:
        if tf.io.gfile.isdir(_folder(task, root)):
            tf.io.gfile.rmtree(_folder(task, root))
            task._cache_dir = None  # reset SeqIO's cached location
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
    """Define additional flags and run `main`."""
    try:
        from seqio.scripts import cache_tasks_main  # noqa: F401  defines SeqIO's flags
    except ModuleNotFoundError as error:
        sys.exit(
            f"tasks.cache: building a cache needs Apache Beam ({error}): use `make cache`, or pip install -r "
            "requirements-cache.txt. Reading a cache does not need it"
        )
    flags.DEFINE_string("vocabulary", None, 'A SentencePiece model, or "bytes"; T5\'s if not given.')
    flags.DEFINE_enum("bad_rows", "refuse", ["refuse", "skip"], "What to do with lines that cannot be read.")
    flags.mark_flag_as_required("output_cache_dir")
    # Beam's default, DirectRunner, would first download a program.
    flags.FLAGS.set_default("pipeline_options", ["--runner=FnApiRunner"])
    app.run(main)


if __name__ == "__main__":
    command()
