"""What the scores of `make study` have to beat: the majority class, and a bag-of-words logistic regression.

    python benchmarks/study_baselines.py OUT.json

Features are words and pairs of neighbouring words (tf-idf) of each sentence, and, for two sentences, of what they have
in common. STS-B, a number, is predicted by its mean and by ridge regression. Nothing is tuned on the dev sets.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np
import scipy.sparse
import seqio
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import study_tasks  # noqa: E402
from tasks import glue  # noqa: E402


def rows(task: str, split: str, names: list[str]) -> tuple[list[list[str]], np.ndarray]:
    """The sentences [rows][1 or 2] and the labels of a split."""
    source = seqio.TaskRegistry.get(task).source.get_dataset(split, shuffle=False, num_epochs=1)
    found = list(source.as_numpy_iterator())
    return [[row[name].decode() for name in names] for row in found], np.array([row["label"] for row in found])


def features(train: list[list[str]], dev: list[list[str]]) -> list[Any]:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\b\w+\b")
    words.fit([text for row in train for text in row])

    def of(texts: list[list[str]]) -> Any:
        sides = [words.transform(side) for side in zip(*texts, strict=True)]
        if len(sides) == 2:
            common = sides[0].multiply(sides[1])
            sides += [common, scipy.sparse.csr_matrix(common.sum(axis=1))]  # and how much they have in common
        return scipy.sparse.hstack(sides, format="csr")

    return [of(train), of(dev)]


def main(path: pathlib.Path) -> None:
    scores: dict[str, dict[str, float]] = {"majority": {}, "bag_of_words": {}}
    configs = {f"glue_{config.name}_v002": config for config in glue.CONFIGS}
    for task in study_tasks.GLUE:
        config = configs[task]
        (train, labels), (dev, truth) = (rows(task, split, list(config.text)) for split in ("train", "validation"))
        x, x_dev = features(train, dev)
        if config.labels:
            common = np.full(len(dev), np.bincount(labels).argmax())
            model = LogisticRegression(max_iter=2000)
        else:
            common = np.full(len(dev), labels.mean())
            model = Ridge()
        for name, predictions in (("majority", common), ("bag_of_words", model.fit(x, labels).predict(x_dev))):
            values = [value for metric in config.metric_fns for value in metric(truth, predictions).values()]
            scores[name][task] = float(np.mean(values))
            print(f"{task} {name} {scores[name][task]:.1f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
