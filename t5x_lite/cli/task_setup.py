"""Register and validate the run's SeqIO task; build its batches and evaluator; choose the checkpoint to read.

TensorFlow and SeqIO take seconds to import, so the functions that need them import them.
"""

import contextlib
import dataclasses
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from t5x_lite import checkpoint, distributed, options, run_config, storage
from t5x_lite.data import tensorflow_start
from t5x_lite.errors import MissingFileError, UserError, nearest
from t5x_lite.inference.predictor import Predictor, Scores
from t5x_lite.model.families import model_of
from t5x_lite.model.feature_converter import FeatureConverter
from t5x_lite.run_config import RunConfig
from t5x_lite.storage import MirroredDirectory
from t5x_lite.training import step
from t5x_lite.training.partitioner import Partitioner

log = logging.getLogger("t5x_lite")


def register_tasks(run: RunConfig) -> str:
    """Registers all tasks, including the user's. Returns the name of the run's task or mixture, validated."""
    if not (run.mixture_or_task_name or run.train_files):
        raise UserError(
            "no task is set: set MIXTURE_OR_TASK_NAME to a SeqIO task or mixture, or TRAIN_FILES to your own files"
        )
    import_tasks(run)
    from t5x_lite.data import pipeline

    name = _register_corpora(run)
    from tasks import cache, data_sources

    describe = cache.describe if run.use_cached_tasks else data_sources.describe
    for task, files in describe(pipeline.find_provider(name)).items():
        log.info("%s reads %s", task, files)
    pipeline.check_vocabulary(name, run.model.vocab_size)
    pipeline.check_lengths(name, run.task_feature_lengths, feature_converter(run))
    with_labels(run, name)  # checks the task against the model
    return name


def data_notes(run: RunConfig, name: str) -> list[str]:
    """Returns what the user should know of their own files: texts that are cut, unknown, empty or not given back."""
    import seqio

    from t5x_lite.data import pipeline
    from tasks import user_files

    own = [task for task in seqio.get_subtasks(pipeline.find_provider(name)) if isinstance(task, user_files.FilesTask)]
    return [note for task in own for note in task.notes(run.task_feature_lengths)]


def with_labels(run: RunConfig, name: str) -> RunConfig:
    """Returns `run` with the task's additions to the model config, such as class names, to store in checkpoints."""
    from t5x_lite.data import pipeline

    return dataclasses.replace(run, model=run.model.for_task(name, pipeline.find_provider(name).output_features))


def partitioner(run: RunConfig, devices: Sequence[Any] | None = None, *, trains: bool = True) -> Partitioner:
    """Creates the run's Partitioner; `devices` are those of a plan, None means all devices."""
    return Partitioner(
        run.model,
        run.optimizer if trains else run.optimizer.without_training(),
        mesh=run.mesh,
        rules=run.logical_axis_rules,
        batch_rows={
            "BATCH_SIZE / NUM_MICROBATCHES": run.batch_size // run.num_microbatches,
            "EVAL_BATCH_SIZE": run.eval_batch_size,
        },
        devices=devices,
    )


def predictor(run: RunConfig, partitioner: Partitioner) -> Predictor:
    feature_converter(run)
    length = run.max_decode_length or run.task_feature_lengths.get("targets", 0)
    return model_of(run.model).predictor(partitioner, run.decoding, length, run.random_seed)


def feature_converter(run: RunConfig) -> FeatureConverter:
    """Returns the model's feature converter. Raises UserError if TASK_FEATURE_LENGTHS do not match it."""
    converter = model_of(run.model).feature_converter(run.pack)
    converter.check_lengths(run.task_feature_lengths)
    return converter


def import_tasks(run: RunConfig) -> None:
    """Imports this project's tasks and MIXTURE_OR_TASK_MODULE; sets the vocabulary, BAD_ROWS and cache folders."""
    log.info("Loading TensorFlow and SeqIO ...")
    with _without_chatter():
        tensorflow_start.import_tensorflow()
        import seqio

        import tasks
        from t5x_lite.data import pipeline  # noqa: F401  takes TensorFlow off the accelerators before its first op

    tasks.readers.set_bad_rows(run.bad_rows)
    modules = run.mixture_or_task_module or []
    for module in [modules] if isinstance(modules, str) else modules:
        own = Path("tasks.py") if Path("tasks.py").exists() else Path("tasks")
        if module.split(".")[0] == "tasks" and own.exists() and not own.resolve() == Path(tasks.__file__).parent:
            raise UserError(
                f"MIXTURE_OR_TASK_MODULE = {module!r}: t5x_lite's own tasks are a package of that name, which hides "
                f"{own.resolve()}: give yours another name"
            )
        try:
            with _first_definitions(module):
                importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # a module that the user's module imports
            raise UserError(
                f"MIXTURE_OR_TASK_MODULE: no module {error.name!r} in the current folder or the installed packages"
            ) from None
    chosen = _vocabulary_of(run)
    if chosen or run.vocabulary_extra_ids is not None:
        tasks.vocabulary.set_default(chosen, run.vocabulary_extra_ids)
    folders = run.seqio_additional_cache_dirs or []
    seqio.add_global_cache_dirs([folders] if isinstance(folders, str) else folders)


@contextlib.contextmanager
def _first_definitions(module: str) -> Iterator[None]:
    """Keeps the registered tasks and mixtures when a module registers the same names, as t5.data.mixtures does.

    SeqIO would raise an error. The names are logged.
    """
    import seqio

    again: list[str] = []
    registries: list[Any] = [seqio.TaskRegistry, seqio.MixtureRegistry]
    originals = [registry.add_provider for registry in registries]

    def tolerant(registry: Any, add: Callable) -> Callable:
        def add_provider(name: str, provider: Any) -> None:
            if name in registry.names():
                again.append(name)
            else:
                add(name, provider)

        return add_provider

    for registry, original in zip(registries, originals, strict=True):
        registry.add_provider = tolerant(registry, original)
    try:
        yield
    finally:
        for registry in registries:
            del registry.add_provider
        if again:
            more = f" and {len(again) - 5} more" if len(again) > 5 else ""
            names = ", ".join(again[:5]) + more
            log.info("%s registers %s again: the definitions of t5x_lite are kept.", module, names)


def _vocabulary_of(run: RunConfig) -> str | None:
    """Returns VOCABULARY, or the tokenizer that lies with the run or with the checkpoint that it starts from.

    None means T5's. Where VOCABULARY is another one than that of INITIAL_CHECKPOINT_PATH, that is logged.
    """
    import tensorflow as tf

    place = _initial_place(run)
    own, initial = _tokenizer_in(run.model_dir), _tokenizer_in(place)
    unknown = run.vocabulary is None and own is None and initial is None
    if unknown and place is not None and (place / "tokenizer.json").is_file():
        raise UserError(
            f"INITIAL_CHECKPOINT_PATH = {run.initial_checkpoint_path!r} has its tokenizer as tokenizer.json, which "
            "SeqIO does not read: set VOCABULARY to its spiece.model, tokenizer.model or vocab.txt, or convert it, "
            f"which makes one: python -m t5x_lite.convert {run.initial_checkpoint_path} start --to=t5x_lite"
        )
    if run.vocabulary is None:
        if beside := own or initial:
            log.info("VOCABULARY is not set: the run uses %s, which lies with the checkpoint.", beside)
        return beside
    if run.vocabulary == "bytes" or tf.io.gfile.exists(run.vocabulary):
        same = run.vocabulary == initial or not initial
        if not same and "bytes" not in (run.vocabulary, initial):
            same = tf.io.gfile.GFile(run.vocabulary, "rb").read() == tf.io.gfile.GFile(initial, "rb").read()
        if not same:
            log.warning(
                "VOCABULARY = %r is not the tokenizer of INITIAL_CHECKPOINT_PATH, %s: its parameters were trained on "
                "other ids.",
                run.vocabulary,
                initial,
            )
        return run.vocabulary
    if own:
        log.info("VOCABULARY = %r does not exist: the run uses its copy, %s.", run.vocabulary, own)
        return own
    return run.vocabulary


def _tokenizer_in(model: Any) -> str | None:
    """Returns the tokenizer of a model, local or in a bucket, as a value of VOCABULARY, or None."""
    from t5x_lite import convert
    from t5x_lite.convert import tokenizer

    if model is None or not (storage.is_url(model) or Path(model).is_dir()):
        return None
    if (file := convert.tokenizer_file(model)) is not None:
        return str(file)
    configs = (tokenizer.describe(folder).config for folder in convert.tokenizer_folders(model))
    return "bytes" if any(config.get("tokenizer_class") == "ByT5Tokenizer" for config in configs) else None


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Discards what TensorFlow's C++ code writes to stderr during import, unless the import fails."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except BaseException:
            captured.seek(0)
            os.write(stderr, captured.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _register_corpora(run: RunConfig) -> str:
    """Registers the user's files and mixture. Returns the name of the run's task or mixture."""
    from tasks import corpora

    for field in options.options(options.MixingOptions):
        if not run.mixes and getattr(run, field.name) != field.metadata["default"]:
            log.warning(
                "%s has no effect: nothing is mixed by it. It is for a list of tasks in MIXTURE_OR_TASK_NAME and a "
                "dict of corpora in TRAIN_FILES; a registered mixture has its own rates.",
                field.name.upper(),
            )
    names = run.mixture_or_task_name
    if isinstance(names, str):
        if not run.train_files:
            return names
        log.info("TRAIN_FILES is set: the run uses these files, not MIXTURE_OR_TASK_NAME = %r.", names)
        names = []
    return corpora.register(
        run.train_files,
        run.eval_files,
        names or [],
        objective=run.files_objective,
        inputs_template=run.files_inputs_template,
        targets_template=run.files_targets_template,
        text_template=run.files_text_template,
        noise_density=run.noise_density,
        mean_noise_span_length=run.mean_noise_span_length,
        concatenate=run.join_texts,
        mode_tokens=run.ul2_mode_tokens,
        metrics=run.metrics,
        mixing=run.mixing,
        limit=run.mixing_limit,
        temperature=run.mixing_temperature,
        budget=run_config.last_step(run) * run.batch_size if run.mixing == "unimax" else None,
        max_epochs=run.mixing_max_epochs,
    )


def build_train_batches(run: RunConfig, name: str, rows: tuple[int, int] | None = None) -> Any:
    from t5x_lite.data import fingerprint, pipeline

    facts = fingerprint.data_facts(pipeline.find_provider(name), ("train", run.eval_split), run.use_cached_tasks)
    if run.train_files:
        said_otherwise = ("train_files", "eval_files", "metrics")
        fields = (field for field in options.options(options.FilesOptions) if field.name not in said_otherwise)
        facts |= {field.name.upper(): getattr(run, field.name) for field in fields}
    return pipeline.TrainBatches(
        name,
        run.task_feature_lengths,
        batch_size=run.batch_size,
        seed=run.random_seed,
        converter=feature_converter(run),
        shuffle=run.shuffle_train_examples,
        group_by_length=run.group_by_length,
        use_cached=run.use_cached_tasks,
        rows=rows,
        shards=run.data_shards,
        facts=facts,
        other_data=run.resume_with_other_data,
        agreed=distributed.largest,
    )


def build_evaluator(
    run: RunConfig, name: str, partitioner: Partitioner, predictor: Predictor, folder: MirroredDirectory
) -> Callable[[Any, int], Scores]:
    """Returns a function (params, step) -> loss and metrics of each task that has EVAL_SPLIT."""
    from t5x_lite.data import pipeline
    from t5x_lite.inference import evaluator

    batches = {
        task: pipeline.EvalBatches(
            task,
            run.task_feature_lengths,
            batch_size=run.eval_batch_size,
            converter=feature_converter(run),
            split=run.eval_split,
            num_batches=run.eval_steps,
            seed=run.random_seed,
            use_cached=run.use_cached_tasks,
            rows=partitioner.local_rows(run.eval_batch_size),
        )
        for task in pipeline.tasks_with_split(name, run.eval_split)
    }
    if not batches and run.eval_split != RunConfig.eval_split:
        splits = sorted(pipeline.find_provider(name).splits)
        raise UserError(f"EVAL_SPLIT = {run.eval_split!r}: {name} has no such split.{nearest(run.eval_split, splits)}")
    if not batches:
        log.info("No evaluation: no task of %s has the split %r.", name, run.eval_split)
    metrics = predictor.evaluator(
        name,
        run.task_feature_lengths,
        batch_size=run.eval_batch_size,
        split=run.eval_split,
        num_examples=run.eval_examples,
        use_cached=run.use_cached_tasks,
        seed=run.random_seed,
        predictions=_only_first(folder.path / "predictions"),
    )

    def evaluate(params: Any, at_step: int) -> Scores:
        scores = {task: predictor.loss(params, rows) for task, rows in batches.items()}
        task_metrics = metrics(params, at_step)
        scores = {task: {**values, **task_metrics.get(task, {})} for task, values in scores.items()}
        return scores | evaluator.averages(scores)

    return evaluate


def check_best_metrics(run: RunConfig, name: str, partitioner: Partitioner, predictor: Predictor, params: Any) -> None:
    """Evaluates one batch of each task. Raises UserError if KEEP_BEST_METRIC is none of the metrics."""
    probe = dataclasses.replace(
        run, eval_steps=1, eval_examples=min(run.eval_examples or run.eval_batch_size, run.eval_batch_size)
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            scores = build_evaluator(probe, name, partitioner, predictor, MirroredDirectory(folder))(params, 0)
        except UserError:
            raise
        except Exception as error:  # a metric that needs more examples, for example
            log.info("Whether KEEP_BEST_METRIC exists shows at the first evaluation (%s).", error)
            return
    names = [f"{task}/{metric}" for task, metrics in scores.items() for metric in metrics]
    best = run.keep_best_metric or ()
    for metric in [best] if isinstance(best, str) else best:
        if metric not in names:
            cure = nearest(metric, names) or f" There are: {', '.join(names)}."
            if not names:
                cure = f" Nothing is evaluated: no task of {name} has the split {run.eval_split!r}; see EVAL_FILES."
            raise UserError(f"KEEP_BEST_METRIC = {metric!r} is not measured.{cure}")


def _only_first(path: Path) -> Path | None:
    """Returns the path on the process that writes, None on the others."""
    return path if jax.process_index() == 0 else None


def choose_start(run: RunConfig, parts: Collection[str] | None = None) -> checkpoint.Start:
    """Chooses the checkpoint that the run starts from: see checkpoint.choose_start, or a model in another format."""
    checkpoint.moved_base.set(run.base_checkpoint_path or run.initial_checkpoint_path)
    try:
        return checkpoint.choose_start(run.model_dir, run.initial_checkpoint_path, parts=parts, strict=run.strict)
    except MissingFileError:
        from t5x_lite import convert

        place = _initial_place(run)
        if place is None or not convert.is_foreign(place):
            raise
        reason = f"Starting at step 0 with the parameters of {place}, INITIAL_CHECKPOINT_PATH, and a fresh optimizer."
        return checkpoint.Start("import", str(place), reason)


def _initial_place(run: RunConfig) -> Any:
    """Returns the place of INITIAL_CHECKPOINT_PATH (`hub.located`), or None."""
    from t5x_lite.convert import hub

    return None if run.initial_checkpoint_path is None else hub.located(run.initial_checkpoint_path)


def restore_params(run: RunConfig, start: checkpoint.Start, abstract: Any, **options: Any) -> Any:
    """Reads the parameters that a run starts from. The options are those of checkpoint.restore_params."""
    from t5x_lite import convert

    assert start.path is not None
    if start.kind == "import":
        return convert.import_params(start.path, run.model, abstract, **options)
    convert.warn_of_another_model(start.path, checkpoint.read_info(start.path).get("model", {}), run.model)
    return checkpoint.restore_params(start.path, abstract, verified=start.kind == "resume", **options)


def checkpoint_to_read(run: RunConfig) -> tuple[checkpoint.Start, int]:
    """Chooses the checkpoint that eval, infer and score read; returns it and its step."""
    start = choose_start(run, parts=("params", "info"))
    if start.path is None:
        raise MissingFileError(
            f"no checkpoint to read: MODEL_DIR = {run.model_dir!r} holds none, and INITIAL_CHECKPOINT_PATH is not set"
        )
    reason = "the newest of MODEL_DIR" if start.kind == "resume" else "INITIAL_CHECKPOINT_PATH; MODEL_DIR holds none"
    log.info("Reading the checkpoint %s: %s.", start.path, reason)
    step_name = Path(start.path).name
    return start, int(step_name) if step_name.isdecimal() else 0


def parameter_summary(run: RunConfig, partitioner: Partitioner) -> str:
    params, trainable = partitioner.abstract.params, run.optimizer.trainable
    count, trained = step.param_count(params), trainable.count(params)
    return f"{count:,} parameters" + (f", of which {trained:,} train" if trained != count else "")


def _baselines(name: str) -> Mapping[str, Mapping[str, float | str]]:
    """Returns baseline scores to print with the model's scores, by task."""
    if not name.startswith("quickstart"):
        return {}
    from tasks import quickstart

    return quickstart.baselines()


def tool(name: str) -> Any:
    """Imports an optional package of t5x_lite, such as "report"; returns None if it has been removed."""
    try:
        return importlib.import_module(f"t5x_lite.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"t5x_lite.{name}":
            raise
        return None


def describe_run(run: RunConfig, name: str) -> Any:
    """Returns the report's description of the run, a `report.page.About`."""
    run_name = Path(run.model_dir).resolve().name
    details = {
        row.task: {"examples": row.examples, "epochs": row.passes, "tokens": row.tokens, "token share": row.token_share}
        for row in mixture_table(run, name)
    }
    return tool("report").About(name, rates(name), _baselines(name), run_name, data_notes(run, name), details)


def rates(name: str) -> dict[str, float]:
    """Returns each task's share of the training mixture, largest first."""
    import seqio

    from t5x_lite.data import pipeline

    provider = pipeline.find_provider(name)
    if not isinstance(provider, seqio.Mixture):
        return {name: 1.0}
    rates = {t.name: provider.get_rate(t) for t in provider.tasks if "train" in t.splits}
    return {task: rates[task] / sum(rates.values()) for task in sorted(rates, key=lambda task: -rates[task])}


def log_mixture(run: RunConfig, name: str) -> None:
    """Logs the share of each task of the training mixture, with examples, epochs and tokens where they are known."""
    rows = mixture_table(run, name)
    if not rows:
        log.info("Training on %s", name)
        return
    from tasks.mixtures import table

    log.info("Training on %s:\n%s", name, table.to_text(rows))


def mixture_table(run: RunConfig, name: str) -> list[Any]:
    """Returns share, examples, epochs and tokens of each task of the training mixture, as `tasks.mixtures.table.Row`s.

    Tokens are measured for a mixture that the run makes; the epochs of packed rows are known with them.
    """
    import seqio

    from tasks import corpora, mixtures
    from tasks.mixtures import table

    shares, lengths = rates(name), run.task_feature_lengths
    if len(shares) < 2:
        return []
    tasks = {task: seqio.TaskRegistry.get(task) for task in shares}
    known = run.mixes or not run.pack
    examples = {
        task: corpora.num_examples(provider) if run.mixes else mixtures.train_examples(task)
        for task, provider in tasks.items()
    }
    tokens = {task: table.mean_lengths(task, 200, lengths) for task in shares if shares[task]} if run.mixes else {}
    per_row = 1.0
    if run.pack and tokens:
        means = {feature: sum(shares[task] * tokens[task].get(feature, 0) for task in tokens) for feature in lengths}
        per_row = max(1.0, min(lengths[feature] / mean for feature, mean in means.items() if mean))
    return table.rows(
        shares,
        examples if known else dict.fromkeys(shares),
        steps=run_config.last_step(run),
        batch=run.batch_size * per_row,
        tokens={task: sum(by_feature.values()) for task, by_feature in tokens.items()},
    )
