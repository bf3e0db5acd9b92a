"""`--mode=eval`: evaluate a checkpoint, and add its scores to MODEL_DIR/metrics.jsonl."""

import json

import jax

from t5x_lite.cli import task_setup
from t5x_lite.metrics import metric_logger
from t5x_lite.metrics.metric_logger import MetricLogger
from t5x_lite.run_config import RunConfig
from t5x_lite.storage import MirroredDirectory


def evaluate(run: RunConfig) -> None:
    """Evaluates a checkpoint on every task that has EVAL_SPLIT; adds the scores to MODEL_DIR/metrics.jsonl."""
    start, at_step = task_setup.checkpoint_to_read(run)
    partitioner = task_setup.partitioner(run, trains=False)
    name = task_setup.register_tasks(run)
    folder = MirroredDirectory(run.model_dir, bring=(metric_logger.METRICS_FILE,))
    predictor = task_setup.predictor(run, partitioner)
    evaluation = task_setup.build_evaluator(run, name, partitioner, predictor, folder)
    run = task_setup.with_labels(run, name)
    scores = evaluation(task_setup.restore_params(run, start, partitioner.abstract.params), at_step)
    logger = MetricLogger(folder.path, at_step, publish=folder.publish)
    logger.evaluation(at_step, scores)
    logger.flush()
    logger.close()
    if jax.process_index() == 0 and not (report := task_setup.tool("report")):
        print(json.dumps(scores, indent=1))
    elif jax.process_index() == 0:
        about = task_setup.describe_run(run, name)
        print(report.table(scores, about.baselines))
        if confusions := report.confusions(folder.path, at_step):
            print(f"\n{confusions}\n")
        if scores:
            page = report.write_page(folder.path, about)
            folder.publish()
            print(f"predictions: {folder}/predictions/*-{at_step}.jsonl\nfor a browser: {folder}/{page.name}")
