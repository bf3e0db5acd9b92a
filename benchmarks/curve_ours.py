"""This project's sides of `curve.py`, and what all sides start from; each a process that `curve.py` starts.

Without --side it writes what is not there yet: the folder of initial parameters, and the batches. With it, it trains by
the project's own step and loop.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from benchmarks import curve  # noqa: E402
from t5x_lite import convert, sharding  # noqa: E402
from t5x_lite.checkpoint import saving  # noqa: E402
from t5x_lite.convert import huggingface  # noqa: E402
from t5x_lite.training import loop, optim, step  # noqa: E402
from t5x_lite.training.losses import LossConfig  # noqa: E402


def write_start(folder: pathlib.Path, model: str) -> None:
    """Writes a model of gin_configs/models/ at random as a Hugging Face folder."""
    from benchmarks.train_step import model_config

    config, optimizer = model_config(model), optim.Optimizer(optax.identity(), optim.constant(1.0))
    abstract = step.abstract_state(config, optimizer, first_device())
    state = step.init_state(config, optimizer, jax.random.key(0), abstract)
    huggingface.write(folder, config, jax.device_get(state.params))


def write_batches(file: pathlib.Path, steps: int, batch_size: int) -> None:
    """Writes `steps` batches of the pipeline's rows, one example each, as arrays [steps, B, length]."""
    import tasks  # noqa: F401
    from t5x_lite.data import pipeline

    batches = pipeline.TrainBatches(
        curve.TASK, curve.LENGTHS, batch_size=batch_size, seed=0, converter=pipeline.UNPACKED
    )
    rows = [next(batches) for _ in range(steps)]
    arrays: dict[str, Any] = {name: np.stack([batch[name] for batch in rows]) for name in rows[0]}
    if file.exists() and not all(
        np.array_equal(old[name], arrays[name][step])
        for step, old in enumerate(curve.batches(file.parent, 0))
        for name in old
    ):
        raise ValueError(f"the data are others than those of {file}: name another --out")
    temporary = file.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(file)
    shares = {name: float(np.mean([batch[name] != 0 for batch in rows])) for name in rows[0]}
    print(f"{steps} batches of {batch_size} rows; not padding: {shares}", flush=True)


def prepare(out: pathlib.Path, start: pathlib.Path, model: str, steps: int, batch_size: int) -> None:
    """Writes the start and enough batches, where they are not there; more steps begin with the same batches."""
    if not (start / "model.safetensors").exists() and start == out / "start":
        write_start(start, model)
    file = out / "batches.npz"
    if not file.exists() or sum(1 for _ in curve.batches(out, 0)) < steps:
        write_batches(file, steps, batch_size)


def first_device() -> Any:
    return sharding.make_mesh(1, devices=jax.devices()[:1])


def make_optimizer(name: str) -> optim.Optimizer:
    """The optimizer that torch has too."""
    settings: dict[str, Any] = dict(curve.OPTIMIZERS[name])
    schedule = optim.constant(settings.pop("learning_rate"))
    if name == "adamw":
        transform = optim.adamw(rms_scaling=False, **settings)
    else:
        transform = optim.adafactor(min_dim_size_to_factor=1, **settings)
    return optim.make_optimizer(transform, schedule)


class Batches:
    """The batches of a folder after so many steps, as the loop takes them; the step is their position."""

    def __init__(self, out: pathlib.Path, done: int):
        self._rest = curve.batches(out, done)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._rest)

    def save(self, path: str) -> None:
        """The state's step says it all."""

    def restore(self, path: str) -> None:
        """As `save`."""


class Logger:
    def __init__(self, run: curve.Run):
        self._run = run

    def train(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        self._run.append(step, metrics["loss"], seconds)

    def evaluation(self, step: int, scores: loop.Scores) -> None:
        """There is none."""


def train(run: curve.Run, start: pathlib.Path, steps: int, save_every: int) -> None:
    """Trains one side to `steps`, from its newest saved state or from `start`, and logs each step's loss."""
    dtype = "bfloat16" if run.side == "bfloat16" else "float32"
    # Accelerators multiply float32 in less than float32 unless they are told.
    precision = "highest" if dtype == "float32" else None
    with jax.default_matmul_precision(precision), saving.Checkpointer(run.state) as saver:
        compiler, optimizer = step.Compiler(first_device()), make_optimizer(run.optimizer)
        config, params = convert.read(start, compiler.mesh, dtype=dtype, dropout_rate=0.0)
        abstract = step.abstract_state(config, optimizer, compiler.mesh)
        done = saver.latest_step() or 0
        run.rewind(done)
        if done:
            del params
            state = saver.restore(done, abstract)
        else:
            state = step.init_state(config, optimizer, jax.random.key(0), abstract, params)
        loss = LossConfig(z_loss=0.0, normalizing_factor="NUM_REAL_TARGET_TOKENS")
        rows = len(next(curve.batches(run.out, 0))["encoder_input_tokens"])
        train_step = compiler.train_step(
            abstract,
            config=config,
            optimizer=optimizer,
            loss=loss,
            num_microbatches=rows if run.side == "microbatches" else 1,
        )
        loop.train(
            state,
            train_step,
            Batches(run.out, done),
            jax.device_put(jax.random.key(1), compiler.replicated()),
            rows=sharding.batch_sharding(compiler.mesh),
            schedule=loop.Schedule(steps, log=1, save=save_every),
            logger=Logger(run),
            saver=saver,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--start", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save_every", type=int, required=True)
    parser.add_argument("--model")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--optimizer", choices=list(curve.OPTIMIZERS))
    parser.add_argument("--side", choices=[side for side in curve.SIDES if side not in curve.TORCH_SIDES])
    args = parser.parse_args()
    if args.side is None:
        prepare(args.out, args.start, args.model, args.steps, args.batch_size)
    else:
        train(curve.Run(args.out, args.optimizer, args.side), args.start, args.steps, args.save_every)


if __name__ == "__main__":
    main()
