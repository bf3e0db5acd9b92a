"""The work of each mode of the command: train, eval, infer, score, inspect, plan, and the dry run.

Each function takes a `RunConfig` and wires the parts. TensorFlow and SeqIO are imported only when all that can be
refused without them has been, for that takes seconds. This module knows every part, and nothing of flags and gin.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from t5x_lite import checkpoint, convert
from t5x_lite.checkpoint import saving
from t5x_lite.cli import run_lock, task_setup
from t5x_lite.errors import MissingFileError, UserError, UserFileError
from t5x_lite.inference.predictor import Mode
from t5x_lite.metrics import metric_logger
from t5x_lite.metrics.metric_logger import MetricLogger
from t5x_lite.model.config import ADAPTER_PARAMS
from t5x_lite.model.interface import model_of
from t5x_lite.run_config import RunConfig, last_step
from t5x_lite.storage import Folder
from t5x_lite.training import loop, monitors, step
from t5x_lite.training.partitioner import Partitioner

if TYPE_CHECKING:
    from t5x_lite.plan import Memory, Plan
    from t5x_lite.plan.topologies import Topology

log = logging.getLogger("t5x_lite")

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)  # what a disk says

Scores = loop.Scores

# What every mode needs


def _checkpoint_to_read(run: RunConfig) -> tuple[str, int, Callable[[Any], Any]]:
    """The checkpoint that eval, infer and score read: its path, its step, and how to restore its parameters."""
    start = checkpoint.choose_start(
        run.model_dir, run.initial_checkpoint_path, parts=("params", "info"), strict=run.strict
    )
    if start.path is None:
        raise MissingFileError(
            f"no checkpoint to read: MODEL_DIR = {run.model_dir!r} holds none, and INITIAL_CHECKPOINT_PATH is not set"
        )
    why = "the newest of MODEL_DIR" if start.kind == "resume" else "INITIAL_CHECKPOINT_PATH; MODEL_DIR holds none"
    log.info("Reading the checkpoint %s: %s.", start.path, why)
    step_name = Path(start.path).name
    restore = partial(checkpoint.restore_params, start.path, verified=start.kind == "resume")
    return start.path, int(step_name) if step_name.isdecimal() else 0, restore


# The modes


def train(run: RunConfig, config: str) -> None:
    """Trains to the last step from wherever the run is, evaluating and saving on the way; then reports.

    Args:
      config: what is written to MODEL_DIR/config.gin, to do the same again.
    """
    last_step(run)  # refuses what is not set
    partitioner = task_setup.partitioner(run)
    try:
        with run_lock.held(run.model_dir) if jax.process_index() == 0 else contextlib.nullcontext():
            _train(run, config, partitioner)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise UserFileError(
            f"{error}. The checkpoints in MODEL_DIR = {run.model_dir!r} are as they were: put that right and start the "
            "same command again, and the run goes on from the newest."
        ) from error


def _train(run: RunConfig, config: str, partitioner: Partitioner) -> None:
    last = last_step(run)
    start = checkpoint.choose_start(run.model_dir, run.initial_checkpoint_path, strict=run.strict)
    name = task_setup.prepare(run)
    from t5x_lite.data import pipeline

    run = task_setup.with_labels(run, name)
    log.info("%s: %s", name, ", ".join(f"{task} {rate:.1%}" for task, rate in task_setup.rates(name).items()))
    log.info("%s on %s", _parameters(run, partitioner), partitioner)
    batches = task_setup.train_batches(run, name, partitioner.local_rows(run.batch_size))
    folder = Folder(run.model_dir, bring=(metric_logger.METRICS_FILE,))
    predictor = task_setup.predictor(run, partitioner)
    evaluation = task_setup.evaluation(run, name, partitioner, predictor, folder)
    with (
        contextlib.closing(
            metric_logger.MetricLogger(folder.path, last, _flops(run, partitioner), folder.publish)
        ) as logger,
        _checkpointer(run, start, partitioner, logger.settle) as saver,
        monitors.PreemptionSignal().listening() as stop,
    ):
        if jax.process_index() == 0:
            (folder.path / "config.gin").write_text(config)
            pipeline.keep_tokenizer(name, folder.path)

        log.info(start.reason)
        keys = jax.jit(  # compiled, so that they lie on all hosts
            lambda: jax.random.split(jax.random.key(run.random_seed, impl=run.rng_impl)),
            out_shardings=partitioner.compiler.replicated(),
        )
        parameter_key, dropout_key = keys()
        if start.step is not None:
            state = saver.restore(start.step, partitioner.abstract, batches)
        else:
            state = _first_state(run, start, partitioner, parameter_key)
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
            partitioner.train_step(
                config=run.model,
                optimizer=run.optimizer,
                loss=run.loss,
                num_microbatches=run.num_microbatches,
            ),
            batches,
            dropout_key,
            rows=partitioner.batch_sharding,
            schedule=schedule,
            logger=logger,
            saver=saver,
            evaluate=evaluate,
            stop=stop,
            max_skipped_steps=run.max_skipped_steps,
            dump=partial(_dump, folder),
        )
        logger.settle()
    if jax.process_index() == 0 and (report := task_setup.tool("report")):
        at = folder.path
        start_from = f"--gin.INITIAL_CHECKPOINT_PATH=\"'{at}'\""
        command = f"python run.py --gin_file={at / 'config.gin'}"
        next_steps = predictor.next_steps(command, start_from, task_setup.vocabulary_file(run, name))
        report.after_training(at, scores, int(state.step), task_setup.about(run, name), next_steps)
        folder.publish()


def _first_state(run: RunConfig, start: checkpoint.Start, partitioner: Partitioner, key: jax.Array) -> step.TrainState:
    """Random parameters; where INITIAL_CHECKPOINT_PATH has them, its own. The optimizer is new."""
    params = None
    if start.path is not None:
        heads = model_of(run.model).head_params
        may_be_new = re.compile(f"{ADAPTER_PARAMS}|{heads}")
        names = [name for name in checkpoint.flat(partitioner.abstract.params) if may_be_new.search(name)]
        added = step.init_params(run.model, key, partitioner.abstract, names)
        params = checkpoint.restore_params(start.path, partitioner.abstract.params, fresh=added, left_out=heads)
    return step.init_state(run.model, run.optimizer, key, partitioner.abstract, params)


def _flops(run: RunConfig, partitioner: Partitioner) -> float | None:
    """Of a step; None where a part of the model is frozen, whose gradients are not computed: no MFU is claimed then."""
    if run.optimizer.trainable.split(partitioner.abstract.params)[1]:
        return None
    return model_of(run.model).flops(run.batch_size, run.task_feature_lengths)


def _dump(folder: Folder, step_number: int, batch: Mapping[str, Any]) -> str:
    """Keeps this host's rows of the batch of a step; says where."""
    name = f"batch-{step_number}.{jax.process_index()}.npz"
    try:
        np.savez(folder.path / name, **batch)
        folder.publish()
    except OSError as error:  # the run ends for another reason, which is what has to be said
        return f"Its batch could not be kept ({error})."
    return f"Its batch is in {folder}/{name}: --mode=inspect shows it."


def _parameters(run: RunConfig, partitioner: Partitioner) -> str:
    params, trainable = partitioner.abstract.params, run.optimizer.trainable
    count, trained = step.param_count(params), trainable.count(params)
    return f"{count:,} parameters" + (f", of which {trained:,} train" if trained != count else "")


def _checkpointer(
    run: RunConfig, start: checkpoint.Start, partitioner: Partitioner, before_commit: Callable[[], None]
) -> saving.Checkpointer:
    info: dict[str, Any] = convert.info(run.model)
    trained, frozen = map(checkpoint.flat, run.optimizer.trainable.split(partitioner.abstract.params))
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


def eval(run: RunConfig) -> None:
    """Evaluates a checkpoint on every task that has EVAL_SPLIT; adds the scores to MODEL_DIR/metrics.jsonl."""
    _, at_step, restore = _checkpoint_to_read(run)
    partitioner = task_setup.partitioner(run)
    name = task_setup.prepare(run)
    folder = Folder(run.model_dir, bring=(metric_logger.METRICS_FILE,))
    predictor = task_setup.predictor(run, partitioner)
    evaluation = task_setup.evaluation(run, name, partitioner, predictor, folder)
    scores = evaluation(restore(partitioner.abstract.params), at_step)
    logger = MetricLogger(folder.path, at_step, publish=folder.publish)
    logger.evaluation(at_step, scores)
    logger.settle()
    logger.close()
    if jax.process_index() == 0 and not (report := task_setup.tool("report")):
        print(json.dumps(scores, indent=1))
    elif jax.process_index() == 0:
        about = task_setup.about(run, name)
        print(report.table(scores, about.baselines))
        if found := report.confusions(folder.path, at_step):
            print(f"\n{found}\n")
        if scores:
            written = report.write_page(folder.path, about)
            folder.publish()
            print(f"predictions: {folder}/predictions/*-{at_step}.jsonl\nfor a browser: {folder}/{written.name}")


def infer(run: RunConfig) -> None:
    """Writes a prediction for each line of INFER_INPUT, or for each example of the tasks, as JSON lines."""
    _write_results(run, "infer")


def score(run: RunConfig) -> None:
    """Writes the log-likelihood of the targets of each line of INFER_INPUT, or of each example, as JSON lines."""
    _write_results(run, "score")


def _write_results(run: RunConfig, mode: Mode) -> None:
    partitioner = task_setup.partitioner(run)
    predictor = task_setup.predictor(run, partitioner)
    predictor.check(mode, has_task=bool(run.mixture_or_task_name))
    path, at_step, restore = _checkpoint_to_read(run)
    named = run.mixture_or_task_name or run.train_files or run.infer_input is None
    name = task_setup.prepare(run) if named else task_setup.import_tasks(run)
    from t5x_lite.data import pipeline
    from tasks import vocabulary

    lengths, count, size = run.task_feature_lengths, run.eval_examples, run.eval_batch_size
    features = pipeline.find_provider(name).output_features if name else vocabulary.output_features()
    tasks = pipeline.tasks_with_split(str(name), run.eval_split) if run.infer_input is None else []
    if run.infer_output is not None and run.infer_input is None and len(tasks) != 1:
        raise UserError(
            f"INFER_OUTPUT = {run.infer_output!r} is one file, and there are {len(tasks)} tasks with the split "
            f"{run.eval_split!r} ({', '.join(tasks)}): leave it unset, or name one task"
        )
    if run.infer_input is not None:
        source = predictor.file_source(run.infer_input, features, lengths, mode, num_examples=count)
        sources = {Path(run.infer_input.removesuffix(".gz")).stem: source}
    else:
        options = {"split": run.eval_split, "num_examples": count, "use_cached": run.use_cached_tasks}
        sources = {task: predictor.task_source(task, lengths, seed=run.random_seed, **options) for task in tasks}
    params = restore(partitioner.abstract.params)
    about = _made_from(run, path, features) | predictor.settings(mode)
    folder = Folder(run.model_dir)
    for task, source in sources.items():
        output = run.infer_output or folder.path / mode / f"{task}-{at_step}.jsonl"
        written = predictor.write(mode, params, source, output, features, lengths=lengths, batch_size=size, about=about)
        log.info("%d lines in %s", written, run.infer_output or f"{folder}/{mode}/{task}-{at_step}.jsonl")
    if jax.process_index() == 0:
        folder.publish()


def _made_from(run: RunConfig, path: str, features: Mapping[str, Any]) -> dict[str, Any]:
    """What results follow from beside the examples: an interrupted run may only go on with the same."""
    metadata = Path(path, "_CHECKPOINT_METADATA")
    saved = json.loads(metadata.read_text()).get("commit_timestamp_nsecs") if metadata.exists() else None
    return {
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


def inspect(run: RunConfig) -> None:
    """Prints one training batch as the model gets it, or that in the .npz INFER_INPUT, decoded back to text."""
    name = task_setup.prepare(run)
    from t5x_lite.data import inspection, pipeline

    if run.infer_input is not None:
        with np.load(run.infer_input, allow_pickle=False) as arrays:
            batch = dict(arrays)
    else:
        batch = next(task_setup.train_batches(run, name))
    print(inspection.describe_batch(batch, pipeline.text_vocabulary(name)))


def dry_run(run: RunConfig, mode: str) -> None:
    """Builds all that the mode starts from, computes nothing, writes nothing, and prints what it found."""
    partitioner = task_setup.partitioner(run)
    if mode == "train":
        steps = f"{last_step(run):,} of {run.batch_size} rows, in {run.num_microbatches} micro-batch(es)"
        reason = checkpoint.choose_start(run.model_dir, run.initial_checkpoint_path, strict=run.strict).reason
    print(f"model       {_parameters(run, partitioner)}: {run.model}")
    print(f"mesh        {partitioner}")
    if mode == "train":
        print(f"steps       {steps}\nstart       {reason}")
    elif mode != "inspect":
        print(f"checkpoint  {_checkpoint_to_read(run)[0]}")
    name = task_setup.prepare(run)
    if mode in ("train", "inspect"):
        print(f"data        {name}, this host's batches:")
        for feature, shape in task_setup.train_batches(
            run, name, partitioner.local_rows(run.batch_size)
        ).shapes.items():
            print(f"            {feature} {list(shape)}")
    for task, rate in task_setup.rates(name).items():
        print(f"            {rate:7.3%} {task}")
    print("Dry run: nothing was computed or written.")


def plan(run: RunConfig, topology: str, decode: bool, suggest: bool) -> None:
    """Prints what the run takes on `topology`, and writes it to MODEL_DIR/plan.json; touches no devices, reads no data.

    Args:
      decode: compile decoding, too.
      suggest: before that, look for a mesh, REMAT and NUM_MICROBATCHES that fit, and plan with these.
    """
    if not (planning := task_setup.tool("plan")):
        raise UserError("--mode=plan: the package t5x_lite.plan has been removed")
    from t5x_lite.plan import topologies

    place = topologies.find(topology)
    if suggest:
        run, found = _suggested(run, place)
    else:
        found = step_plan(run, place)
    if decode:
        found.decode_memory = decode_memory(run, place)
    print(planning.table(found))
    folder = Folder(run.model_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(found) | {"fits": found.fits}
    (folder.path / "plan.json").write_text(json.dumps(values, indent=1) + "\n")
    folder.publish()
    print(f"as JSON: {folder}/plan.json")


def step_plan(run: RunConfig, place: "Topology", on_paper: bool = False) -> "Plan":
    """The plan of a run's training step. Args: those of plan.of_step."""
    from t5x_lite import plan as planning

    partitioner = task_setup.partitioner(run, place.devices)
    return planning.of_step(
        place,
        partitioner.compiler,
        partitioner.abstract,
        abstract_batch(run, partitioner),
        config=run.model,
        optimizer=run.optimizer,
        loss=run.loss,
        lengths=dict(run.task_feature_lengths),
        num_microbatches=run.num_microbatches,
        rng_impl=run.rng_impl,
        on_paper=on_paper,
    )


def abstract_batch(run: RunConfig, partitioner: Partitioner) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a global training batch."""
    shapes = task_setup.feature_converter(run).batch(run.task_feature_lengths, run.batch_size)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=partitioner.batch_sharding)
        for name, (shape, dtype) in shapes.items()
    }


def decode_memory(run: RunConfig, place: "Topology") -> "Memory":
    """The memory that each device needs to predict for a batch of EVAL_BATCH_SIZE rows."""
    from t5x_lite import plan as planning

    predictor = task_setup.predictor(run, task_setup.partitioner(run, place.devices))
    return planning.compile_within(predictor.lower(run.eval_batch_size, run.task_feature_lengths), place)[0]


def _suggested(run: RunConfig, place: "Topology") -> tuple[RunConfig, "Plan"]:
    from t5x_lite.plan import suggest

    def with_setting(setting: suggest.Setting) -> RunConfig:
        model: Any = dataclasses.replace(run.model, remat=setting.remat)  # pyright: ignore[reportArgumentType]
        return dataclasses.replace(run, model=model, mesh=setting.mesh, num_microbatches=setting.num_microbatches)

    setting, found = suggest.best(
        lambda setting: step_plan(with_setting(setting), place, on_paper=True), run.batch_size, place
    )
    return with_setting(setting), found
