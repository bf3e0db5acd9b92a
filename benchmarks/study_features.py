"""Transfer without training the model, for `make study`: a linear head on the features of the pre-trained encoder.

    python benchmarks/study_features.py MODEL VOCABULARY OUT.json

See t5x_lite/linear_probe.py. A task's score is the mean of its metrics, as in the other rows of the study's table.
"""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tasks  # noqa: E402
from benchmarks import study_tasks  # noqa: E402
from t5x_lite import linear_probe  # noqa: E402


def main(model: str, vocabulary: str, out: str) -> None:
    tasks.vocabulary.set_default(vocabulary)
    scores = {}
    for task in study_tasks.GLUE:
        metrics = linear_probe.transfer(model, task, pathlib.Path(model, "features"))
        scores[task] = sum(metrics.values()) / len(metrics)
        print(f"{task} feature_based {scores[task]:.1f}", flush=True)
    pathlib.Path(out).write_text(json.dumps({"feature_based": scores}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
