"""`--mode=inspect`: show what the model trains on."""

import numpy as np

from t5x_lite.cli import task_setup
from t5x_lite.run_config import RunConfig


def inspect(run: RunConfig) -> None:
    """Prints the beginning of a training batch, or the whole batch in the .npz file INFER_INPUT, decoded to text."""
    name = task_setup.register_tasks(run)
    from t5x_lite.data import inspection, pipeline

    if run.infer_input is not None:
        with np.load(run.infer_input, allow_pickle=False) as arrays:
            batch = dict(arrays)
        shown: dict[str, int] = {}
    else:
        batch = next(task_setup.build_train_batches(run, name))
        shown = {"rows": 4, "segments": 8}
    for note in task_setup.data_notes(run, name):
        print(note)
    print(inspection.describe_batch(batch, pipeline.text_vocabulary(name), **shown))
