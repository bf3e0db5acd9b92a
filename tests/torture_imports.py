"""Imports what the commands import. `torture_starts` forks runs from a process that has done nothing else."""

import gc
import importlib

from t5x_lite.data import tensorflow_start

tensorflow_start.import_tensorflow()  # without Keras, as the command does
for _name in (
    *("tasks", "seqio", "matplotlib.pyplot", "safetensors", "torture_faults"),
    *("t5x_lite.cli.dry_run", "t5x_lite.cli.evaluate", "t5x_lite.cli.infer", "t5x_lite.cli.inspect_batch"),
    *("t5x_lite.cli.main", "t5x_lite.cli.plan", "t5x_lite.cli.task_setup", "t5x_lite.cli.train"),
    *("t5x_lite.convert.__main__", "t5x_lite.data.pipeline", "t5x_lite.inference.evaluator", "t5x_lite.report"),
):
    importlib.import_module(_name)
gc.collect()
gc.freeze()  # forks do not look through what is imported for garbage
gc.set_threshold(200_000, 20, 100)  # tracing makes so many objects that looking for it takes a tenth of the time
