"""`--mode=train`: train to the last step, with evaluation and checkpoints on the way, then write the report.

TensorFlow and SeqIO take seconds to import, so they are imported after every check that does not need them.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5x_lite import checkpoint, convert, storage
from t5x_lite.checkpoint import saving
from t5x_lite.cli import run_lock, task_setup
from t5x_lite.errors import UserError, UserFileError
from t5x_lite.metrics import metric_logger, wandb_run
from t5x_lite.model import quantization
from t5x_lite.model.config import ADAPTER_PARAMS
from t5x_lite.model.families import model_of
from t5x_lite.run_config import RunConfig, last_step
from t5x_lite.storage import MirroredDirectory
from t5x_lite.training import loop, monitors, step
from t5x_lite.training.partitioner import Partitioner

log = logging.getLogger("t5x_lite")

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
Scores = loop.Scores


def train(run: RunConfig, config: str) -> None:
    """Trains from the newest checkpoint, or from the start, to the last step, and writes the report.

    Args:
      config: the operative gin config, which is written to MODEL_DIR/config.gin.
    """
    last_step(run)  # raises UserError if TRAIN_STEPS is not set
    if run.wandb_project is not None:
        wandb_run.check_installed(run.wandb_project)
    partitioner = task_setup.partitioner(run)
    try:
        with run_lock.exclusive(run.model_dir) if jax.process_index() == 0 else contextlib.nullcontext():
            _train(run, config, partitioner)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserFileError(
            f"{error}. The checkpoints in MODEL_DIR = {run.model_dir!r} are as they were: put that right and start the "
            "same command again, and the run resumes from the newest one."
        ) from error


def _train(run: RunConfig, config: str, partitioner: Partitioner) -> None:
    last = last_step(run)
    start = task_setup.choose_start(run)
    name = task_setup.register_tasks(run)
    from t5x_lite.data import pipeline

    run = task_setup.with_labels(run, name)
    task_setup.log_mixture(run, name)
    log.info("%s on %s", task_setup.parameter_summary(run, partitioner), partitioner)
    for note in task_setup.data_notes(run, name):
        log.info(note)
    batches = task_setup.build_train_batches(run, name, partitioner.local_rows(run.batch_size))
    if start.step is not None:
        check_model(run, str(start.path))
    if batches.position_problem is not None:
        log.warning(
            "The position in this data cannot be saved: %s. Checkpoints hold all else; a run that resumes begins "
            "the data anew.",
            batches.position_problem,
        )
    folder = MirroredDirectory(run.model_dir, bring=(metric_logger.METRICS_FILE, wandb_run.RUN_ID_FILE))
    predictor = task_setup.predictor(run, partitioner)
    evaluation = task_setup.build_evaluator(run, name, partitioner, predictor, folder)
    with (
        contextlib.closing(
            metric_logger.MetricLogger(
                folder.path, last, _flops(run, partitioner), folder.publish, _tracker(run, folder.path)
            )
        ) as logger,
        monitors.PreemptionSignal().listening() as stop,  # to the end of the last save, which a signal is not to cut
        _checkpointer(run, start, partitioner, logger.flush) as saver,
    ):
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
        if jax.process_index() == 0:  # not before: a resume that is refused must leave the run as it is
            (folder.path / "config.gin").write_text(config, encoding="utf-8")
            pipeline.keep_tokenizer(name, folder.path)
        schedule = loop.Schedule(last, run.log_period, run.eval_period, run.checkpoint_period)
        evaluated = start.step is None or checkpoint.read_info(str(start.path)).get(saving.EVALUATED, True)
        evaluated = evaluated or not schedule.due(schedule.evaluate, int(state.step))
        logger.resume(start.step or 0, evaluated)
        if batches.began_anew:
            logger.data_began_anew(int(state.step))
        scores: Scores = {}

        def evaluate(state: step.TrainState) -> Scores:
            scores.update(evaluation(state.params, int(state.step)))
            return scores

        done = int(state.step) >= last
        if done:
            log.info("Step %d of %d is done already: nothing to train.", int(state.step), last)
        elif run.keep_best_metric:
            task_setup.check_best_metrics(run, name, partitioner, predictor, state.params)
        if done or not evaluated:  # it was preempted when an evaluation was due
            evaluate(state)
            if not logger.has_evaluation(int(state.step)):
                logger.evaluation(int(state.step), scores)
            if start.step is not None:
                saver.add_scores(int(state.step), loop.flat(scores))
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
            profiler=_profiler(run, folder.path),
        )
        logger.flush()
    if jax.process_index() == 0 and (report := task_setup.tool("report")):
        at = str(folder)
        start_from = f"--gin.INITIAL_CHECKPOINT_PATH=\"'{at}'\""
        command = f"python run.py --gin_file={at}/config.gin"
        next_steps = predictor.next_steps(command, start_from)
        try:
            about = task_setup.describe_run(run, name)
            report.after_training(folder.path, scores, int(state.step), about, next_steps, at)
        except Exception as error:  # the run itself is complete
            log.warning("The run is saved, but its report could not be written: %s: %s", type(error).__name__, error)
        folder.publish()


def _first_state(run: RunConfig, start: checkpoint.Start, partitioner: Partitioner, key: jax.Array) -> step.TrainState:
    """Parameters from INITIAL_CHECKPOINT_PATH, random where it has none; the optimizer state is new."""
    params = None
    if start.path is not None:
        heads = model_of(run.model).head_params
        may_be_new = re.compile(f"{ADAPTER_PARAMS}|{heads}")
        names = [name for name in checkpoint.flat(partitioner.abstract.params) if may_be_new.search(name)]
        added = step.init_params(run.model, key, partitioner.abstract, names)
        params = task_setup.restore_params(run, start, partitioner.abstract.params, fresh=added, left_out=heads)
    return step.init_state(run.model, run.optimizer, key, partitioner.abstract, params)


def check_model(run: RunConfig, folder: str) -> None:
    """Raises UserError if the checkpoint to resume is of another model, also where all arrays have the same shapes."""
    saved = checkpoint.read_info(folder).get("model", {})
    current = json.loads(json.dumps(convert.info(run.model)["model"]))
    lines = [
        f"{type(run.model).__name__}.{key}: was {saved[key]!r}, is {value!r}"
        for key, value in current.items()
        if key in saved and saved[key] != value and key not in convert.RUN_SETTINGS
    ]
    if lines:
        listed = "\n  ".join(lines)
        raise UserError(
            f"MODEL_DIR = {run.model_dir!r} holds a run of another model:\n  {listed}\nRestore these settings, or use "
            "a new MODEL_DIR."
        )


def _tracker(run: RunConfig, model_dir: Path) -> Callable[[], metric_logger.Tracker] | None:
    if run.wandb_project is None:
        return None
    options = {field.name.upper(): getattr(run, field.name) for field in dataclasses.fields(run)}
    return partial(
        wandb_run.WandbRun, run.wandb_project, model_dir, {name: str(value) for name, value in options.items()}
    )


def _profiler(run: RunConfig, model_dir: Path) -> loop.Profiler | None:
    if run.profile_steps is None or jax.process_index() > 0:
        return None
    from t5x_lite.metrics.profiler import StepProfiler

    return StepProfiler(*run.profile_steps, model_dir)


def _flops(run: RunConfig, partitioner: Partitioner) -> float | None:
    """FLOPs per step, or None if some parameters are frozen or rows have several widths (MFU would be wrong)."""
    if run.group_by_length or run.optimizer.trainable.partition(partitioner.abstract.params)[1]:
        return None
    return model_of(run.model).flops(run.batch_size, run.task_feature_lengths)


def _dump(folder: MirroredDirectory, step_number: int, batch: Mapping[str, Any]) -> str:
    """Writes this host's rows of a step's batch to MODEL_DIR, and returns a sentence that says where."""
    name = f"batch-{step_number}.{jax.process_index()}.npz"
    try:
        np.savez(folder.path / name, **batch)
        folder.publish()
    except OSError as error:  # the run ends for another reason, and that is the error to raise
        return f"Its batch could not be kept ({error})."
    return f"Its batch is in {folder}/{name}: --mode=inspect shows it."


def _checkpointer(
    run: RunConfig, start: checkpoint.Start, partitioner: Partitioner, before_commit: Callable[[], None]
) -> saving.Checkpointer:
    info: dict[str, Any] = convert.info(run.model)
    trained, stored_frozen = map(checkpoint.flat, run.optimizer.trainable.partition(partitioner.abstract.params))
    frozen = quantization.plain(stored_frozen)
    base = None
    own = None if start.kind == "import" else start.path
    stored = checkpoint.parameter_names(own) if frozen and own is not None else set()
    unused = stored - frozen.keys() - trained.keys()
    heads = model_of(run.model).head_params
    not_needed = all(re.search(heads, name) for name in unused)  # heads that this run has no use for
    if frozen and own != start.path:
        log.info(
            "Checkpoints hold all parameters, for %s is in another format: convert it first "
            "(python -m t5x_lite.convert), and they hold only what is trained.",
            start.path,
        )
    if own is not None and frozen and frozen.keys() <= stored and not_needed:
        resumed = start.kind == "resume"
        base = checkpoint.base_in_use(own) if resumed else checkpoint.base_of(own)
        if base:
            in_step = os.path.join(checkpoint.checkpoints_folder(run.model_dir), "step")
            base |= {"unused": sorted(unused)} if unused and not resumed else {}
            base |= {} if storage.is_url(base["path"]) else {"relative": os.path.relpath(base["path"], in_step)}
    if not base and frozen.keys() != stored_frozen.keys():
        raise UserError(
            "FROZEN_DTYPE = 'int8' is for parameters that stay in INITIAL_CHECKPOINT_PATH; "
            + (f"{own} lacks {min(frozen.keys() - stored)}" if own else "convert it to this format first")
        )
    if base:
        info["base"] = base
        log.info("Checkpoints hold what is trained; the other parameters stay in %s.", base["path"])
    elif frozen and start.path and (own is None or "trained" in checkpoint.read_info(own)):
        info["trained"] = sorted(trained)  # the others are still those of the start
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
