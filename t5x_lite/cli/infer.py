"""`--mode=infer` and `--mode=score`: write predictions or log-likelihoods as JSON lines."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from t5x_lite.cli import task_setup
from t5x_lite.errors import UserError
from t5x_lite.inference.predictor import Mode
from t5x_lite.run_config import RunConfig
from t5x_lite.storage import MirroredDirectory

log = logging.getLogger("t5x_lite")


def infer(run: RunConfig) -> None:
    """Writes a prediction for each line of INFER_INPUT, or for each example of the tasks, as JSON lines."""
    _write_results(run, "infer")


def score(run: RunConfig) -> None:
    """Writes the log-likelihood of the targets of each line of INFER_INPUT, or of each example, as JSON lines."""
    _write_results(run, "score")


def _write_results(run: RunConfig, mode: Mode) -> None:
    partitioner = task_setup.partitioner(run, trains=False)
    predictor = task_setup.predictor(run, partitioner)
    predictor.check(mode, has_task=bool(run.mixture_or_task_name))
    start, at_step = task_setup.checkpoint_to_read(run)
    has_task = run.infer_input is None or (run.mixture_or_task_name and not run.train_files)
    name = task_setup.register_tasks(run) if has_task else task_setup.import_tasks(run)
    from t5x_lite.data import pipeline
    from tasks import readers, vocabulary

    lengths, count, size = run.task_feature_lengths, run.eval_examples, run.eval_batch_size
    features = pipeline.find_provider(name).output_features if name else vocabulary.output_features()
    if not name:
        pipeline.check_vocabulary("INFER_INPUT", run.model.vocab_size, features)
    tasks = pipeline.tasks_with_split(str(name), run.eval_split) if run.infer_input is None else []
    if run.infer_output is not None and run.infer_input is None and len(tasks) != 1:
        raise UserError(
            f"INFER_OUTPUT = {run.infer_output!r} is one file, but {len(tasks)} tasks have the split "
            f"{run.eval_split!r} ({', '.join(tasks)}): leave it unset, or choose one task"
        )
    if run.infer_input is not None:
        templates = {"inputs": run.files_inputs_template, "targets": run.files_targets_template}
        source = predictor.file_source(
            run.infer_input, features, lengths, mode, num_examples=count, templates=templates
        )
        file = Path(run.infer_input.removesuffix(readers.compression(run.infer_input)))
        sources = {file.stem if file.suffix in (".txt", ".jsonl") else file.name: source}
    else:
        options = {"split": run.eval_split, "num_examples": count, "use_cached": run.use_cached_tasks}
        sources = {task: predictor.task_source(task, lengths, seed=run.random_seed, **options) for task in tasks}
    params = task_setup.restore_params(
        task_setup.with_labels(run, name) if name else run, start, partitioner.abstract.params
    )
    about = _provenance(run, str(start.path), features) | predictor.settings(mode)
    folder = MirroredDirectory(run.model_dir)
    for task, source in sources.items():
        output = run.infer_output or folder.path / mode / f"{task}-{at_step}.jsonl"
        lines = predictor.write(mode, params, source, output, features, lengths=lengths, batch_size=size, about=about)
        log.info("%d lines in %s", lines, run.infer_output or f"{folder}/{mode}/{task}-{at_step}.jsonl")
    if jax.process_index() == 0:
        folder.publish()


def _provenance(run: RunConfig, path: str, features: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that the results depend on. An interrupted run resumes only if these are unchanged."""
    metadata = epath.Path(path) / "_CHECKPOINT_METADATA"
    saved = json.loads(metadata.read_text()).get("commit_timestamp_nsecs") if metadata.exists() else None
    return {
        "checkpoint": path,
        "checkpoint_saved_ns": saved,
        "model": str(run.model),
        **({"frozen_dtype": dtype} if (dtype := run.optimizer.frozen_dtype) != "float32" else {}),
        "vocabulary": {
            name: [
                type(feature.vocabulary).__name__,
                feature.vocabulary.vocab_size,
                getattr(feature.vocabulary, "sentencepiece_model_file", None),
            ]
            for name, feature in features.items()
        },
    }
