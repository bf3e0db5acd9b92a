"""The work of each mode of the command: train, eval, infer, score, inspect, plan, and the dry run.

Each function takes a `Run` and wires the parts. TensorFlow and SeqIO are imported only when all that can be refused
without them has been, for that takes seconds. This module knows every part, and nothing of flags and gin.
"""

import contextlib
import dataclasses
import errno
import importlib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from t5x_lite import checkpoint, logs, report, step, watch
from t5x_lite import train as loop
from t5x_lite.bert import ON_TOP, BertConfig
from t5x_lite.checkpoint import lock, saving
from t5x_lite.folder import Folder
from t5x_lite.machine import Functions, Machine
from t5x_lite.model import ADDED
from t5x_lite.options import Run, last_step

log = logging.getLogger("t5x_lite")

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)  # what a disk says

Scores = loop.Scores

# What every mode needs


def _prepare_tasks(run: Run) -> str:
    """Fills SeqIO's registries, the user's tasks included; returns the name of what to work on, checked."""
    if not (run.mixture_or_task_name or run.train_files):
        raise ValueError(
            "nothing to work on: set MIXTURE_OR_TASK_NAME to a SeqIO task or mixture, or TRAIN_FILES to your own files"
        )
    _import_tasks(run)
    from t5x_lite import data

    name = run.mixture_or_task_name or ""
    if run.train_files:
        if name:
            log.info("TRAIN_FILES is set: the run is on these files, not on MIXTURE_OR_TASK_NAME = %r.", name)
        name = _register_files(run)
    from tasks import cache, sources

    describe = cache.describe if run.use_cached_tasks else sources.describe
    for task, read in describe(data.find_provider(name)).items():
        log.info("%s reads %s", task, read)
    data.check_vocabulary(name, run.model.vocab_size)
    data.check_lengths(name, run.task_feature_lengths, run.model.layout)
    if isinstance(run.model, BertConfig) and run.model.layout == "classifier":
        data.check_labels(name, run.model.num_labels)
    return name


def _with_labels(run: Run, name: str) -> Run:
    """A classifier's run with the names of the task's classes, for its checkpoints to say."""
    if not (isinstance(run.model, BertConfig) and run.model.layout == "classifier"):
        return run
    from t5x_lite import data

    labels = getattr(data.find_provider(name).output_features["label"].vocabulary, "words", ())
    return dataclasses.replace(run, model=dataclasses.replace(run.model, labels=labels))


def _import_tasks(run: Run) -> None:
    """Imports this project's tasks and MIXTURE_OR_TASK_MODULE; sets the vocabulary, BAD_ROWS and cache folders."""
    log.info("Loading TensorFlow and SeqIO ...")
    with _without_chatter():
        import seqio

        import tasks
        from t5x_lite import data  # noqa: F401  takes TensorFlow off the accelerators before its first op

    tasks.formats.set_bad_rows(run.bad_rows)
    modules = run.mixture_or_task_module or []
    for module in [modules] if isinstance(modules, str) else modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # a module that the user's module asks for
            raise ValueError(
                f"MIXTURE_OR_TASK_MODULE: no module {error.name!r} in the current folder or among those installed"
            ) from None
    if run.vocabulary:
        tasks.vocabulary.set_default(run.vocabulary)
    folders = run.seqio_additional_cache_dirs or []
    seqio.add_global_cache_dirs([folders] if isinstance(folders, str) else folders)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Holds back what TensorFlow's C++ writes to stderr while it is loaded, unless that fails."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _register_files(run: Run) -> str:
    from tasks import files

    assert run.train_files
    name = "files"
    files.register_files(
        name,
        run.train_files,
        run.eval_files,
        objective=run.files_objective,
        inputs_template=run.files_inputs_template,
        targets_template=run.files_targets_template,
        text_template=run.files_text_template,
    )
    return name


def _train_batches(run: Run, name: str, rows: tuple[int, int] | None = None) -> Any:
    from t5x_lite import data

    return data.TrainBatches(
        name,
        run.task_feature_lengths,
        batch_size=run.batch_size,
        seed=run.random_seed,
        layout=run.model.layout,
        pack=run.pack,
        shuffle=run.shuffle_train_examples,
        use_cached=run.use_cached_tasks,
        rows=rows,
        shards=run.data_shards,
    )


def _checkpoint_to_read(run: Run) -> tuple[str, int]:
    """The checkpoint that eval, infer and score read, and its step."""
    start = checkpoint.choose_start(
        run.model_dir, run.initial_checkpoint_path, parts=("params", "info"), strict=run.strict
    )
    if start.path is None:
        raise FileNotFoundError(
            f"no checkpoint to read: MODEL_DIR = {run.model_dir!r} holds none, and INITIAL_CHECKPOINT_PATH is not set"
        )
    why = "the newest of MODEL_DIR" if start.kind == "resume" else "INITIAL_CHECKPOINT_PATH; MODEL_DIR holds none"
    log.info("Reading the checkpoint %s: %s.", start.path, why)
    step_name = Path(start.path).name
    return start.path, int(step_name) if step_name.isdecimal() else 0


def _evaluation(
    run: Run, name: str, machine: Machine, functions: Functions, folder: Folder
) -> Callable[[Any, int], Scores]:
    """A function of parameters and step: the loss and the metrics of each task that has EVAL_SPLIT."""
    from t5x_lite import classify, data, evaluate

    batches = {
        task: data.EvalBatches(
            task,
            run.task_feature_lengths,
            batch_size=run.eval_batch_size,
            layout=run.model.layout,
            split=run.eval_split,
            num_batches=run.eval_steps,
            seed=run.random_seed,
            use_cached=run.use_cached_tasks,
            rows=machine.local_rows(run.eval_batch_size),
        )
        for task in data.tasks_with_split(name, run.eval_split)
    }
    if not batches:
        log.info("Nothing is evaluated: no task of %s has the split %r.", name, run.eval_split)
    options = {
        "batch_size": run.eval_batch_size,
        "split": run.eval_split,
        "num_examples": run.eval_examples,
        "use_cached": run.use_cached_tasks,
        "seed": run.random_seed,
        "predictions": _only_first(folder.path / "predictions"),
    }
    answers: dict[str, Callable]
    if run.model.layout == "classifier":
        metrics: Any = classify.Evaluation(name, run.task_feature_lengths, **options)
        answers = {"classify": functions.classify}
    else:
        metrics = evaluate.Evaluation(name, run.task_feature_lengths, **options)
        answers = {"predict": functions.predict, "score": functions.score}

    def evaluated(params: Any, at_step: int) -> Scores:
        scores = {task: functions.loss(params, rows) for task, rows in batches.items()}
        found = metrics.run(**{name: partial(answer, params) for name, answer in answers.items()}, step=at_step)
        scores = {task: {**values, **found.get(task, {})} for task, values in scores.items()}
        return scores | evaluate.averages(scores)

    return evaluated


def _only_first(path: Path) -> Path | None:
    """The path, on the one process that writes."""
    return path if jax.process_index() == 0 else None


# The modes


def train(run: Run, config: str) -> None:
    """Trains to the last step from wherever the run is, evaluating and saving on the way; then reports.

    Args:
      config: what is written to MODEL_DIR/config.gin, to do the same again.
    """
    last_step(run)  # refuses what is not set
    machine = Machine(run)
    try:
        with lock.held(run.model_dir) if jax.process_index() == 0 else contextlib.nullcontext():
            _train(run, config, machine)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise OSError(
            f"{error}. The checkpoints in MODEL_DIR = {run.model_dir!r} are as they were: put that right and start the "
            "same command again, and the run goes on from the newest."
        ) from error


def _train(run: Run, config: str, machine: Machine) -> None:
    last = last_step(run)
    start = checkpoint.choose_start(run.model_dir, run.initial_checkpoint_path, strict=run.strict)
    name = _prepare_tasks(run)
    from t5x_lite import data

    run = _with_labels(run, name)
    log.info("%s: %s", name, ", ".join(f"{task} {rate:.1%}" for task, rate in _rates(name).items()))
    log.info("%s on %s", _parameters(run, machine), machine)
    batches = _train_batches(run, name, machine.local_rows(run.batch_size))
    folder = Folder(run.model_dir, bring=(logs.METRICS_FILE,))
    evaluation = _evaluation(run, name, machine, Functions(run, machine), folder)
    with (
        contextlib.closing(logs.MetricLogger(folder.path, last, _flops(run, machine), folder.publish)) as logger,
        _checkpointer(run, start, machine, logger.settle) as saver,
        watch.StopNotice().listening() as stop,
    ):
        if jax.process_index() == 0:
            (folder.path / "config.gin").write_text(config)
            data.keep_tokenizer(name, folder.path)

        log.info(start.reason)
        keys = jax.jit(  # compiled, so that they lie on all hosts
            lambda: jax.random.split(jax.random.key(run.random_seed, impl=run.rng_impl)),
            out_shardings=machine.compiler.replicated(),
        )
        parameter_key, dropout_key = keys()
        if start.step is not None:
            state = saver.restore(start.step, machine.abstract, batches)
        else:
            state = step.init_state(run.model, run.optimizer, parameter_key, machine.abstract)
            if start.path is not None:
                named = checkpoint.flat(state.params)
                added = {name: leaf for name, leaf in named.items() if re.search(f"{ADDED}|{ON_TOP}", name)}
                params = checkpoint.restore_params(start.path, machine.abstract.params, fresh=added, left_out=ON_TOP)
                state = dataclasses.replace(state, params=params)
        schedule = loop.Schedule(last, run.log_period, run.eval_period, run.checkpoint_period)
        evaluated = start.step is None or checkpoint.read_info(str(start.path)).get(saving.EVALUATED, True)
        evaluated = evaluated or not schedule.due(schedule.evaluate, int(state.step))
        logger.resume(start.step or 0, evaluated)
        scores: Scores = {}

        def evaluate(state: step.TrainState) -> Scores:
            scores.update(evaluation(state.params, int(state.step)))
            return scores

        done = int(state.step) >= last
        if done:
            log.info("Step %d of %d is done already: nothing to train.", int(state.step), last)
        if done or not evaluated:  # it was told to stop when an evaluation was due
            found = evaluate(state)
            if not logger.has_evaluation(int(state.step)):
                logger.evaluation(int(state.step), found)
        state = loop.train(
            state,
            machine.compiler.train_step(
                machine.abstract,
                config=run.model,
                optimizer=run.optimizer,
                loss=run.loss,
                num_microbatches=run.num_microbatches,
            ),
            batches,
            dropout_key,
            rows=machine.batch_sharding,
            schedule=schedule,
            logger=logger,
            saver=saver,
            evaluate=evaluate,
            stop=stop,
            max_skipped_steps=run.max_skipped_steps,
            dump=partial(_dump, folder),
        )
        logger.settle()
    if jax.process_index() == 0:
        made_with = (_vocabulary_file(run, name), run.model.layout)
        report.after_training(folder.path, scores, int(state.step), _about(run, name), *made_with)
        folder.publish()


def _flops(run: Run, machine: Machine) -> float | None:
    """Of a step; None where a part of the model is frozen, whose gradients are not computed: no MFU is claimed then."""
    if run.optimizer.trainable.split(machine.abstract.params)[1]:
        return None
    lengths = run.task_feature_lengths
    return logs.flops_per_step(run.model, run.batch_size, lengths.get("inputs", 0), lengths.get("targets", 0))


def _dump(folder: Folder, step_number: int, batch: Mapping[str, Any]) -> str:
    """Keeps this host's rows of the batch of a step; says where."""
    name = f"batch-{step_number}.{jax.process_index()}.npz"
    try:
        np.savez(folder.path / name, **batch)
        folder.publish()
    except OSError as error:  # the run ends for another reason, which is what has to be said
        return f"Its batch could not be kept ({error})."
    return f"Its batch is in {folder}/{name}: --mode=inspect shows it."


def _parameters(run: Run, machine: Machine) -> str:
    params, trainable = machine.abstract.params, run.optimizer.trainable
    count, trained = step.param_count(params), trainable.count(params)
    return f"{count:,} parameters" + (f", of which {trained:,} train" if trained != count else "")


def _checkpointer(
    run: Run, start: checkpoint.Start, machine: Machine, before_commit: Callable[[], None]
) -> saving.Checkpointer:
    info: dict[str, Any] = {"model": dataclasses.asdict(run.model)}
    trained, frozen = map(checkpoint.flat, run.optimizer.trainable.split(machine.abstract.params))
    base = None
    held = checkpoint.parameter_names(start.path) if frozen and start.path is not None else set()
    if start.path is not None and frozen and frozen.keys() <= held <= frozen.keys() | trained.keys():
        own = start.kind == "resume"
        base = checkpoint.read_info(start.path).get("base") if own else checkpoint.base_of(start.path)
    if base:
        info["base"] = base
        log.info("Checkpoints hold what is trained; the other parameters stay in %s.", base["path"])
    return saving.Checkpointer(
        run.model_dir,
        keep_last=run.keep_last,
        keep_best_metric=run.keep_best_metric,
        keep_best=run.keep_best,
        best_mode=run.keep_best_mode,
        info=info,
        trained=trained if "base" in info else None,
        damaged=start.damaged,
        before_commit=before_commit,
    )


def eval(run: Run) -> None:
    """Evaluates a checkpoint on every task that has EVAL_SPLIT; adds the scores to MODEL_DIR/metrics.jsonl."""
    path, at_step = _checkpoint_to_read(run)
    machine = Machine(run)
    name = _prepare_tasks(run)
    folder = Folder(run.model_dir, bring=(logs.METRICS_FILE,))
    evaluation = _evaluation(run, name, machine, Functions(run, machine), folder)
    scores = evaluation(checkpoint.restore_params(path, machine.abstract.params), at_step)
    logger = logs.MetricLogger(folder.path, at_step, publish=folder.publish)
    logger.evaluation(at_step, scores)
    logger.settle()
    logger.close()
    if jax.process_index() == 0:
        about = _about(run, name)
        print(report.table(scores, about.baselines))
        if found := report.confusions(folder.path, at_step):
            print(f"\n{found}\n")
        if scores:
            written = report.write_page(folder.path, about)
            folder.publish()
            print(f"predictions: {folder}/predictions/*-{at_step}.jsonl\nfor a browser: {folder}/{written.name}")


def infer(run: Run) -> None:
    """Writes a prediction for each line of INFER_INPUT, or for each example of the tasks, as JSON lines."""
    _write_results(run, "infer")


def score(run: Run) -> None:
    """Writes the log-likelihood of the targets of each line of INFER_INPUT, or of each example, as JSON lines."""
    _write_results(run, "score")


def _write_results(run: Run, mode: Literal["infer", "score"]) -> None:
    classifies = run.model.layout == "classifier"
    if run.model.layout == "encoder" or (classifies and mode == "score"):
        raise ValueError(f"--mode={mode} is for models that write text; t5x_lite.load(MODEL_DIR) gives BERT's logits")
    if classifies and not run.mixture_or_task_name:
        raise ValueError("--mode=infer of a classifier needs MIXTURE_OR_TASK_NAME: the task names the classes")
    path, at_step = _checkpoint_to_read(run)
    machine = Machine(run)
    functions = Functions(run, machine)
    named = run.mixture_or_task_name or run.train_files or run.infer_input is None
    name = _prepare_tasks(run) if named else _import_tasks(run)
    from t5x_lite import classify, data, infer
    from tasks import vocabulary

    lengths, count, size = run.task_feature_lengths, run.eval_examples, run.eval_batch_size
    features = data.find_provider(name).output_features if name else vocabulary.output_features()
    tasks = data.tasks_with_split(str(name), run.eval_split) if run.infer_input is None else []
    if run.infer_output is not None and run.infer_input is None and len(tasks) != 1:
        raise ValueError(
            f"INFER_OUTPUT = {run.infer_output!r} is one file, and there are {len(tasks)} tasks with the split "
            f"{run.eval_split!r} ({', '.join(tasks)}): leave it unset, or name one task"
        )
    if run.infer_input is not None:
        if classifies:
            source = classify.file_source(run.infer_input, features["inputs"].vocabulary, lengths, num_examples=count)
        else:
            of_score = {"with_targets": mode == "score"}
            source = infer.file_source(run.infer_input, features, lengths, num_examples=count, **of_score)
        sources = {Path(run.infer_input.removesuffix(".gz")).stem: source}
    else:
        options = {"split": run.eval_split, "num_examples": count, "use_cached": run.use_cached_tasks}
        task_source = classify.task_source if classifies else infer.task_source
        sources = {task: task_source(task, lengths, seed=run.random_seed, **options) for task in tasks}
    params = checkpoint.restore_params(path, machine.abstract.params)
    about = _made_from(run, path, features, mode)
    folder = Folder(run.model_dir)
    for task, source in sources.items():
        output = run.infer_output or folder.path / mode / f"{task}-{at_step}.jsonl"
        if mode == "score":
            answer = partial(functions.score, params)
            written = infer.write_scores(source, answer, output, lengths=lengths, batch_size=size, about=about)
        elif classifies:
            answer, label = partial(functions.classify, params), features["label"]
            written = classify.write_predictions(
                *(source, answer, output), label=label, lengths=lengths, batch_size=size, about=about
            )
        else:
            generate, vocabulary_of = partial(functions.generate, params), features["targets"].vocabulary
            written = infer.write_predictions(
                *(source, generate, output), vocabulary=vocabulary_of, lengths=lengths, batch_size=size, about=about
            )
        log.info("%d lines in %s", written, run.infer_output or f"{folder}/{mode}/{task}-{at_step}.jsonl")
    if jax.process_index() == 0:
        folder.publish()


def _made_from(run: Run, path: str, features: Mapping[str, Any], mode: Literal["infer", "score"]) -> dict[str, Any]:
    """What results follow from beside the examples: an interrupted run may only go on with the same."""
    metadata = Path(path, "_CHECKPOINT_METADATA")
    saved = json.loads(metadata.read_text()).get("commit_timestamp_nsecs") if metadata.exists() else None
    about = {
        "checkpoint": path,
        "checkpoint_saved_ns": saved,
        "model": str(run.model),
        "vocabulary": {
            name: [
                *(type(feature.vocabulary).__name__, feature.vocabulary.vocab_size),
                getattr(feature.vocabulary, "sentencepiece_model_file", None),
            ]
            for name, feature in features.items()
        },
    }
    if mode == "score" or run.model.layout == "classifier":
        return about
    length = run.max_decode_length or run.task_feature_lengths["targets"]
    seed = run.random_seed if run.decode_method == "sample" else None
    return about | {"decoding": dataclasses.asdict(run.decoding), "max_decode_length": length, "seed": seed}


def inspect(run: Run) -> None:
    """Prints one training batch as the model gets it, or that in the .npz INFER_INPUT, decoded back to text."""
    name = _prepare_tasks(run)
    from t5x_lite import data, describe

    if run.infer_input is not None:
        with np.load(run.infer_input, allow_pickle=False) as arrays:
            batch = dict(arrays)
    else:
        batch = next(_train_batches(run, name))
    print(describe.describe_batch(batch, data.text_vocabulary(name)))


def dry_run(run: Run, mode: str) -> None:
    """Builds all that the mode starts from, computes nothing, writes nothing, and prints what it found."""
    machine = Machine(run)
    if mode == "train":
        steps = f"{last_step(run):,} of {run.batch_size} rows, in {run.num_microbatches} micro-batch(es)"
        reason = checkpoint.choose_start(run.model_dir, run.initial_checkpoint_path, strict=run.strict).reason
    print(f"model       {_parameters(run, machine)}: {run.model}")
    print(f"mesh        {machine}")
    if mode == "train":
        print(f"steps       {steps}\nstart       {reason}")
    elif mode != "inspect":
        print(f"checkpoint  {_checkpoint_to_read(run)[0]}")
    name = _prepare_tasks(run)
    if mode in ("train", "inspect"):
        print(f"data        {name}, this host's batches:")
        for feature, shape in _train_batches(run, name, machine.local_rows(run.batch_size)).shapes.items():
            print(f"            {feature} {list(shape)}")
    for task, rate in _rates(name).items():
        print(f"            {rate:7.3%} {task}")
    print("Dry run: nothing was computed or written.")


def plan(run: Run, topology: str, decode: bool, suggest: bool) -> None:
    """Prints what the run takes on `topology`, and writes it to MODEL_DIR/plan.json; touches no devices, reads no data.

    Args:
      decode: compile decoding, too.
      suggest: before that, look for a mesh, REMAT and NUM_MICROBATCHES that fit, and plan with these.
    """
    from t5x_lite import plan as planning
    from t5x_lite.plan import suggest as search
    from t5x_lite.plan import topologies

    place = topologies.find(topology)
    run, found = search.best(run, place) if suggest else (run, planning.make(run, place))
    if decode:
        found.decode_memory = planning.decode_memory(run, place)
    print(planning.table(found))
    folder = Folder(run.model_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(found) | {"fits": found.fits}
    (folder.path / "plan.json").write_text(json.dumps(values, indent=1) + "\n")
    folder.publish()
    print(f"as JSON: {folder}/plan.json")


def _vocabulary_file(run: Run, name: str) -> str | None:
    """What VOCABULARY must be for a task of other files to have the vocabulary of `name`; None: nothing."""
    from t5x_lite import data

    return run.vocabulary or getattr(data.text_vocabulary(name), "sentencepiece_model_file", None)


def _baselines(name: str) -> Mapping[str, Mapping[str, float | str]]:
    """What needs no model, to print beside the scores; the embedded default computes its own."""
    if not name.startswith("quickstart"):
        return {}
    from tasks import quickstart

    return quickstart.baselines()


def _about(run: Run, name: str) -> report.About:
    return report.About(name, _rates(name), _baselines(name), Path(run.model_dir).resolve().name)


def _rates(name: str) -> dict[str, float]:
    """The share of each task of a mixture in training, largest first."""
    import seqio

    from t5x_lite import data

    provider = data.find_provider(name)
    if not isinstance(provider, seqio.Mixture):
        return {name: 1.0}
    rates = {t.name: provider.get_rate(t) for t in provider.tasks if "train" in t.splits}
    return {task: rates[task] / sum(rates.values()) for task in sorted(rates, key=lambda task: -rates[task])}
