"""Features of a frozen encoder, computed once and kept, and a light head on them: transfer without training the model.

    python -m t5x_lite.linear_probe MODEL TASK [--cache=FOLDER] [--length=128] [--vocabulary=FILE]

MODEL is whatever `t5x_lite.load` takes. An example's features are the mean of the encoder's outputs over its tokens.
The head is linear: a softmax over the different targets of the training split or, where these are numbers (STS-B), a
regression. Its answers are texts, and so it has the task's own metrics. Features are kept in FOLDER
(MODEL/features, if MODEL is ours) and used again for as long as model, task and length stay the same.

Knows SeqIO's tasks and `load`. It must not know runs or gin.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import seqio
from jaxtyping import Array, Float

import tasks
from t5x_lite.checkpoint import find_checkpoint
from t5x_lite.data import packing, pipeline
from t5x_lite.errors import UserError
from t5x_lite.inference import batch_prediction
from t5x_lite.inference.evaluator import text_of
from t5x_lite.inference.jsonl import json_line
from t5x_lite.inference.pretrained import LoadedModel, load
from tasks.errors import UserError as TaskError

BATCH_SIZE = 64  # rows of one call of the encoder
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear function of standardised features; `answers` are the texts it chooses from, None: it says a number."""

    mean_D: np.ndarray
    scale_D: np.ndarray
    kernel_DN: np.ndarray
    bias_N: np.ndarray
    answers: tuple[str, ...] | None

    def __call__(self, features_MD: Float[np.ndarray, "M D"]) -> list[str]:
        said_MN = (features_MD - self.mean_D) / self.scale_D @ self.kernel_DN + self.bias_N
        if self.answers is None:
            return [f"{said:.2f}" for said in said_MN[:, 0]]
        return [self.answers[i] for i in said_MN.argmax(axis=1)]


def fit(features_MD: Float[np.ndarray, "M D"], targets: Sequence[str], l2: float = 0.01) -> Head:
    """The head that minimises mean loss + l2 / 2 |kernel|^2 on M examples, by L-BFGS.

    Raises ValueError: the targets are all alike.
    """
    different = tuple(sorted(set(targets)))
    if len(different) < 2:
        raise UserError(f"all {len(targets)} targets are {different}: there is nothing to tell apart")
    numbers = all(map(_is_number, different))
    answers = None if numbers else different
    y_M = np.array([float(t) if numbers else different.index(t) for t in targets], np.float32 if numbers else np.int32)
    mean_D, scale_D = features_MD.mean(axis=0), features_MD.std(axis=0) + 1e-6
    x_MD = jnp.asarray((features_MD - mean_D) / scale_D)
    D, N = x_MD.shape[1], 1 if numbers else len(different)

    @jax.jit
    @jax.value_and_grad
    def loss(flat: Float[Array, " weights"]) -> Float[Array, ""]:
        kernel_DN, bias_N = flat[: D * N].reshape(D, N), flat[D * N :]
        said_MN = x_MD @ kernel_DN + bias_N
        if numbers:
            losses_M = jnp.square(said_MN[:, 0] - y_M) / 2
        else:
            losses_M = optax.softmax_cross_entropy_with_integer_labels(said_MN, jnp.asarray(y_M))
        return jnp.mean(losses_M) + l2 / 2 * jnp.sum(jnp.square(kernel_DN))

    def in_float64(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = loss(jnp.asarray(flat, jnp.float32))
        return float(value), np.asarray(gradient, np.float64)

    found = scipy.optimize.minimize(in_float64, np.zeros((D + 1) * N), jac=True, method="L-BFGS-B")
    flat = found.x.astype(np.float32)
    return Head(mean_D, scale_D, flat[: D * N].reshape(D, N), flat[D * N :], answers)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def features(model: LoadedModel, inputs: Sequence[np.ndarray], length: int) -> Float[np.ndarray, "M D"]:
    """The mean of the encoder's outputs over the tokens of each of M rows, cut to `length`."""
    found_MD = np.zeros((len(inputs), model.config.d_model), np.float32)
    inputs = [tokens[:length] for tokens in inputs]
    for rows in packing.by_length(list(map(len, inputs)), BATCH_SIZE):
        width = -(-len(inputs[rows[0]]) // 32) * 32
        tokens_BS = batch_prediction.padded([inputs[i] for i in rows], width, BATCH_SIZE)
        seen_BS1 = (tokens_BS > 0)[..., None]
        encoded_BSD = np.asarray(model.encode(tokens_BS))
        sums_BD = np.sum(encoded_BSD, axis=1, where=seen_BS1)
        found_MD[rows] = (sums_BD / np.maximum(seen_BS1.sum(axis=1), 1))[: len(rows)]
    return found_MD


def transfer(path: str, task_name: str, cache: Path, length: int = 128) -> dict[str, float]:
    """Trains a head for the task on features of the model at `path`; returns the task's metrics on `validation`.

    Also writes `<task>.jsonl` to `cache`: inputs, targets and predictions.

    Raises:
      ValueError, FileNotFoundError: see `t5x_lite.load`; a mixture, or a task without metrics or one of the splits.
    """
    task = pipeline.find_provider(task_name)
    if not isinstance(task, seqio.Task) or not task.predict_metric_fns:
        raise UserError(f"{task_name} is no task with metrics of predictions: name one task")
    if missing := set(SPLITS) - set(task.splits):
        raise UserError(f"{task_name} has no split {missing.pop()!r}; it has {', '.join(task.splits)}")
    examples = {split: _examples(task, split, length) for split in SPLITS}
    rows = {split: len(found) for split, found in examples.items()}
    about = json.dumps({"model": path, "checkpoint": _written(path), "length": length, "rows": rows})
    file = cache / f"{task_name}.npz"
    found = _kept(file, about)
    if found is None:
        model = load(path)
        if not isinstance(model, LoadedModel) or model.config.decoder_only:
            raise UserError(f"{path} has no encoder of T5's kind")
        pipeline.check_vocabulary(task_name, model.config.vocab_size)
        found = {s: features(model, [example["inputs"] for example in examples[s]], length) for s in SPLITS}
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, about=np.array(about), train=found["train"], validation=found["validation"])
    head = fit(found["train"], [_text(task, example, "targets") for example in examples["train"]])
    predictions = head(found["validation"])
    with (cache / f"{task_name}.jsonl").open("w") as file:
        for example, prediction in zip(examples["validation"], predictions, strict=True):
            row = {name: _text(task, example, name) for name in ("inputs", "targets")} | {"prediction": prediction}
            file.write(json_line(row))
    return metrics(task, examples["validation"], predictions)


def metrics(task: seqio.Task, examples: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> dict[str, float]:
    """The task's metrics of predicted texts."""
    targets = [task.postprocess_fn(_text(task, e, "targets"), example=e, is_target=True) for e in examples]
    answers = [
        task.postprocess_fn(text, example=e, is_target=False) for text, e in zip(predictions, examples, strict=True)
    ]
    found: dict[str, Any] = {name: x for fn in task.predict_metric_fns for name, x in fn(targets, answers).items()}
    return {name: float(x) for name, x in found.items()}


def _examples(task: seqio.Task, split: str, length: int) -> list[dict[str, Any]]:
    lengths = {"inputs": length, "targets": length}
    dataset = task.get_dataset(lengths, split, shuffle=False, num_epochs=1)
    return list(dataset.as_numpy_iterator())


def _text(task: seqio.Task, example: Mapping[str, Any], feature: str) -> str:
    return text_of(example, feature, task.output_features[feature])


def _kept(file: Path, about: str) -> dict[str, np.ndarray] | None:
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        return {split: arrays[split] for split in SPLITS} if str(arrays["about"]) == about else None


def _written(path: str) -> str | None:
    """What tells a checkpoint of ours from a later one in the same MODEL_DIR."""
    found = find_checkpoint(path)
    return None if found is None else str(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m t5x_lite.linear_probe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a MODEL_DIR, one of its checkpoints, a Hugging Face T5 directory, T5X's")
    parser.add_argument("task", help="a SeqIO task with text targets, such as glue_sst2_v002")
    parser.add_argument("--cache", type=Path, help="folder of the features; default: MODEL/features")
    parser.add_argument("--length", type=int, default=128, help="tokens of an input; longer ones are cut")
    parser.add_argument("--vocabulary", help="SentencePiece model that the model was trained with, if not T5's")
    asked = parser.parse_args(arguments)
    try:
        if asked.vocabulary:
            tasks.vocabulary.set_default(asked.vocabulary)
        cache = asked.cache or Path(asked.model) / "features"
        scores = transfer(asked.model, asked.task, cache, asked.length)
    except (UserError, TaskError, OSError) as error:
        print(f"t5x_lite.linear_probe: {error}", file=sys.stderr)
        return 2
    for name, value in scores.items():
        print(f"{asked.task}  {name}  {value:.2f}")
    print(f"features and predictions: {cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
