"""Linear probing: cache the features of a frozen encoder and train a linear head on them.

    python -m t5x_lite.linear_probe MODEL TASK [--cache=FOLDER] [--length=128] [--vocabulary=FILE]

MODEL is any argument of `t5x_lite.load`. An example's features are the mean of the encoder's outputs over its tokens.
The head is a softmax over the distinct targets of the training split or, if these are numbers (STS-B), a linear
regression. It predicts target texts, so the task's own metrics apply. Features are cached in FOLDER (default:
MODEL/features) and reused while model, task and length are the same.

Must not depend on runs or gin.
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

BATCH_SIZE = 64  # rows per call of the encoder
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear function of standardised features. `answers` are the classes; None for regression."""

    mean_D: np.ndarray
    scale_D: np.ndarray
    kernel_DN: np.ndarray
    bias_N: np.ndarray
    answers: tuple[str, ...] | None

    def __call__(self, features_MD: Float[np.ndarray, "M D"]) -> list[str]:
        outputs_MN = (features_MD - self.mean_D) / self.scale_D @ self.kernel_DN + self.bias_N
        if self.answers is None:
            return [f"{value:.2f}" for value in outputs_MN[:, 0]]
        return [self.answers[i] for i in outputs_MN.argmax(axis=1)]


def fit(features_MD: Float[np.ndarray, "M D"], targets: Sequence[str], l2: float = 0.01) -> Head:
    """Fit the head that minimises mean loss + l2 / 2 |kernel|^2 on M examples, by L-BFGS.

    Raises UserError if all targets are equal.
    """
    classes = tuple(sorted(set(targets)))
    if len(classes) < 2:
        raise UserError(f"all {len(targets)} targets are {classes}: a head needs at least two classes")
    numbers = all(map(_is_number, classes))
    answers = None if numbers else classes
    y_M = np.array([float(t) if numbers else classes.index(t) for t in targets], np.float32 if numbers else np.int32)
    mean_D, scale_D = features_MD.mean(axis=0), features_MD.std(axis=0) + 1e-6
    x_MD = jnp.asarray((features_MD - mean_D) / scale_D)
    D, N = x_MD.shape[1], 1 if numbers else len(classes)

    @jax.jit
    @jax.value_and_grad
    def loss(flat: Float[Array, " weights"]) -> Float[Array, ""]:
        kernel_DN, bias_N = flat[: D * N].reshape(D, N), flat[D * N :]
        outputs_MN = x_MD @ kernel_DN + bias_N
        if numbers:
            losses_M = jnp.square(outputs_MN[:, 0] - y_M) / 2
        else:
            losses_M = optax.softmax_cross_entropy_with_integer_labels(outputs_MN, jnp.asarray(y_M))
        return jnp.mean(losses_M) + l2 / 2 * jnp.sum(jnp.square(kernel_DN))

    def in_float64(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = loss(jnp.asarray(flat, jnp.float32))
        return float(value), np.asarray(gradient, np.float64)

    optimum = scipy.optimize.minimize(in_float64, np.zeros((D + 1) * N), jac=True, method="L-BFGS-B")
    flat = optimum.x.astype(np.float32)
    return Head(mean_D, scale_D, flat[: D * N].reshape(D, N), flat[D * N :], answers)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def features(model: LoadedModel, inputs: Sequence[np.ndarray], length: int) -> Float[np.ndarray, "M D"]:
    """Return the mean of the encoder's outputs over the tokens of each of M rows, truncated to `length`."""
    features_MD = np.zeros((len(inputs), model.config.d_model), np.float32)
    inputs = [tokens[:length] for tokens in inputs]
    for rows in packing.by_length(list(map(len, inputs)), BATCH_SIZE):
        width = -(-len(inputs[rows[0]]) // 32) * 32
        tokens_BS = batch_prediction.padded([inputs[i] for i in rows], width, BATCH_SIZE)
        mask_BS1 = (tokens_BS > 0)[..., None]
        encoded_BSD = np.asarray(model.encode(tokens_BS))
        sums_BD = np.sum(encoded_BSD, axis=1, where=mask_BS1)
        features_MD[rows] = (sums_BD / np.maximum(mask_BS1.sum(axis=1), 1))[: len(rows)]
    return features_MD


def transfer(path: str, task_name: str, cache: Path, length: int = 128) -> dict[str, float]:
    """Train a head for the task on features of the model at `path`; return the task's metrics on `validation`.

    Also writes inputs, targets and predictions to `<task>.jsonl` in `cache`.

    Raises:
      UserError: `task_name` is a mixture, or the task lacks metrics or a split; also the errors of `t5x_lite.load`.
    """
    task = pipeline.find_provider(task_name)
    if not isinstance(task, seqio.Task) or not task.predict_metric_fns:
        raise UserError(f"{task_name} is not a task with metrics of predictions: give a single task")
    if missing := set(SPLITS) - set(task.splits):
        raise UserError(f"{task_name} has no split {missing.pop()!r}; it has {', '.join(task.splits)}")
    examples = {split: _examples(task, split, length) for split in SPLITS}
    rows = {split: len(group) for split, group in examples.items()}
    about = json.dumps({"model": path, "checkpoint": _checkpoint_name(path), "length": length, "rows": rows})
    file = cache / f"{task_name}.npz"
    arrays = _cached(file, about)
    if arrays is None:
        model = load(path)
        if not isinstance(model, LoadedModel) or model.config.decoder_only:
            raise UserError(f"{path} has no T5 encoder")
        pipeline.check_vocabulary(task_name, model.config.vocab_size)
        arrays = {s: features(model, [example["inputs"] for example in examples[s]], length) for s in SPLITS}
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, about=np.array(about), train=arrays["train"], validation=arrays["validation"])
    head = fit(arrays["train"], [_text(task, example, "targets") for example in examples["train"]])
    predictions = head(arrays["validation"])
    with (cache / f"{task_name}.jsonl").open("w") as file:
        for example, prediction in zip(examples["validation"], predictions, strict=True):
            row = {name: _text(task, example, name) for name in ("inputs", "targets")} | {"prediction": prediction}
            file.write(json_line(row))
    return metrics(task, examples["validation"], predictions)


def metrics(task: seqio.Task, examples: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> dict[str, float]:
    """Return the task's metrics for predicted texts."""
    targets = [task.postprocess_fn(_text(task, e, "targets"), example=e, is_target=True) for e in examples]
    answers = [
        task.postprocess_fn(text, example=e, is_target=False) for text, e in zip(predictions, examples, strict=True)
    ]
    scores: dict[str, Any] = {name: x for fn in task.predict_metric_fns for name, x in fn(targets, answers).items()}
    return {name: float(x) for name, x in scores.items()}


def _examples(task: seqio.Task, split: str, length: int) -> list[dict[str, Any]]:
    lengths = {"inputs": length, "targets": length}
    dataset = task.get_dataset(lengths, split, shuffle=False, num_epochs=1)
    return list(dataset.as_numpy_iterator())


def _text(task: seqio.Task, example: Mapping[str, Any], feature: str) -> str:
    return text_of(example, feature, task.output_features[feature])


def _cached(file: Path, about: str) -> dict[str, np.ndarray] | None:
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        return {split: arrays[split] for split in SPLITS} if str(arrays["about"]) == about else None


def _checkpoint_name(path: str) -> str | None:
    """Return the newest checkpoint, so that a later one in the same MODEL_DIR invalidates the cache."""
    newest = find_checkpoint(path)
    return None if newest is None else str(newest)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m t5x_lite.linear_probe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="MODEL_DIR, checkpoint, Hugging Face T5 directory or T5X checkpoint")
    parser.add_argument("task", help="a SeqIO task with text targets, such as glue_sst2_v002")
    parser.add_argument("--cache", type=Path, help="folder of cached features; default: MODEL/features")
    parser.add_argument("--length", type=int, default=128, help="tokens of an input; longer inputs are truncated")
    parser.add_argument("--vocabulary", help="SentencePiece model that the model was trained with, if not T5's")
    args = parser.parse_args(arguments)
    try:
        if args.vocabulary:
            tasks.vocabulary.set_default(args.vocabulary)
        cache = args.cache or Path(args.model) / "features"
        scores = transfer(args.model, args.task, cache, args.length)
    except (UserError, TaskError, OSError) as error:
        print(f"t5x_lite.linear_probe: {error}", file=sys.stderr)
        return 2
    for name, value in scores.items():
        print(f"{args.task}  {name}  {value:.2f}")
    print(f"features and predictions: {cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
