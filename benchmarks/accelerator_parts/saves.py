"""Part 7: saves and restores of the large model's state, and how long a save holds the step up."""

import gc
import shutil
from pathlib import Path
from typing import Any

import jax

from benchmarks import checkpoints
from benchmarks.accelerator_parts.child import Item, Settings
from benchmarks.accelerator_parts.shapes import shapes
from benchmarks.accelerator_parts.train import Variant, default_rows
from benchmarks.train_step import CompiledStep, Shape
from t5x_lite.training.step import TrainState


def items(settings: Settings) -> list[Item]:
    size = shapes(settings.toy).large
    return [
        Item(f"{size}, state", lambda: measure_state(settings, size)),
        Item(f"{size}, steps during a save", lambda: measure_steps(settings, size)),
    ]


def empty_folder(settings: Settings) -> Path:
    folder = (settings.out / "checkpoints").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def compiled_step(settings: Settings, size: str) -> CompiledStep:
    """The step of part 3, which JAX's cache of compiled programs has."""
    shape, rows = shapes(settings.toy), default_rows(settings, size)
    return CompiledStep(Variant(size).config(), Shape(rows, shape.inputs, shape.targets, packed=True))


def measure_state(settings: Settings, size: str) -> dict[str, Any]:
    train_step, folder = compiled_step(settings, size), empty_folder(settings)
    gc.collect()
    try:
        state = jax.block_until_ready(train_step.init_state())
        return {"size": size} | checkpoints.measure(state, train_step.abstract, folder, saves=2)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure_steps(settings: Settings, size: str) -> dict[str, Any]:
    train_step, folder = compiled_step(settings, size), empty_folder(settings)
    gc.collect()

    def advance(state: TrainState) -> TrainState:
        return train_step(state)[0]

    try:
        fields = checkpoints.steps_during_a_save(train_step.init_state(), advance, folder)
        return {"size": size, "batch_size": train_step.shape.batch_size} | fields
    finally:
        shutil.rmtree(folder, ignore_errors=True)
