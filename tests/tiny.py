"""One tiny T5 1.1 and batches of a committed text, which tests share."""

import dataclasses
import functools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import traverse_util

from t5x_lite import sharding
from t5x_lite.data import packing
from t5x_lite.model import quantization
from t5x_lite.model.config import ModelConfig, T5Config
from t5x_lite.training import optim, step

FOLDER = Path(__file__).parent / "loss_curve"

# Every axis has a size of its own but for those that must agree; 4 heads and 96 MLP units divide over small meshes.
CONFIG = T5Config(
    d_model=48, d_ff=96, num_heads=4, head_dim=8, num_encoder_layers=2, num_decoder_layers=3, vocab_size=264
)
# A decoder alone with plain descent, for what every step does: it compiles in a third of the time.
SMALL = T5Config(
    d_model=24, d_ff=32, num_heads=2, head_dim=8, num_encoder_layers=0, num_decoder_layers=2, vocab_size=136
)
DESCENT = optim.make_optimizer(optax.scale(-1.0), optim.constant(0.1))
SENTINEL, END, FIRST_BYTE = 263, 1, 3
ROWS, INPUTS, TARGETS = 16, 40, 8


def losses() -> list[float]:
    """The committed loss of each of 30 steps."""
    return json.loads((FOLDER / "losses.json").read_text())["losses"]


def example(random: np.random.Generator, text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A window of the text without a few bytes, and these bytes: span corruption by hand."""
    length, cut = int(random.integers(16, INPUTS - 2)), int(random.integers(2, TARGETS - 2))
    start, gap = int(random.integers(len(text) - length)), int(random.integers(length - cut))
    window = np.frombuffer(text[start : start + length], np.uint8).astype(np.int32) + FIRST_BYTE
    inputs = [*window[:gap], SENTINEL, *window[gap + cut :], END]
    return np.array(inputs, np.int32), np.array([SENTINEL, *window[gap : gap + cut], END], np.int32)


def batch(step: int, *, packed: bool = False) -> dict[str, np.ndarray]:
    """The 16 examples of a step in rows of their own, or two to a row twice as long."""
    random = np.random.default_rng([7, step])
    text = (FOLDER / "text.txt").read_bytes()
    examples = [example(random, text) for _ in range(ROWS)]
    per_row = 2 if packed else 1
    inputs, targets = (np.zeros((ROWS // per_row, n * per_row), np.int32) for n in (INPUTS, TARGETS))
    segments = {"encoder": np.zeros_like(inputs), "decoder": np.zeros_like(targets)}
    starts = np.zeros_like(targets)
    for row in range(ROWS // per_row):
        at_input = at_target = 0
        for segment in range(per_row):
            x, y = examples[row * per_row + segment]
            inputs[row, at_input : at_input + len(x)] = x
            targets[row, at_target : at_target + len(y)] = y
            segments["encoder"][row, at_input : at_input + len(x)] = segment + 1
            segments["decoder"][row, at_target : at_target + len(y)] = segment + 1
            starts[row, at_target] = 1
            at_input, at_target = at_input + len(x), at_target + len(y)
    arrays = packing.unpacked(inputs, targets)
    if packed:
        arrays["decoder_input_tokens"] = np.where(starts, 0, arrays["decoder_input_tokens"])
        arrays |= {f"{side}_segment_ids": ids for side, ids in segments.items()}
    return arrays


def random_state(optimizer: optim.Optimizer, abstract: step.TrainState, seed: int = 0) -> step.TrainState:
    """A state at random without compiling anything: what `step.init_state` makes but for the numbers."""
    zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract)
    return dataclasses.replace(zeros, params=_random(abstract.params, seed))


def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """The parameters of `random_state`, on the first device."""
    return _random(step.abstract_params(config, sharding.make_mesh(1, devices=jax.devices()[:1])), seed)


def _random(abstract_params: Any, seed: int) -> Any:
    def values(name: str, leaf: Any) -> jax.Array:
        x = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=leaf.shape)
        x = x / (leaf.shape[-2] ** 0.5 if name.endswith("kernel") else 1.0)
        x = 1.0 + 0.1 * x if name.endswith("scale") else x
        return jax.device_put(x.astype(leaf.dtype), leaf.sharding)

    leaves = traverse_util.flatten_dict(abstract_params, sep="/")
    made: dict[str, Any] = {}
    for name, leaf in quantization.plain(leaves).items():
        array = values(name, leaf)
        made |= {name: array} if name in leaves else quantization.placed(name, array, abstract_params)
    return traverse_util.unflatten_dict(made, sep="/")


@functools.cache
def _initial_params(config: T5Config, seed: int) -> Any:
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    optimizer = optim.make_optimizer(optax.identity(), optim.constant(1.0))
    abstract = step.abstract_state(config, optimizer, mesh)
    return jax.device_get(step.init_state(config, optimizer, jax.random.key(seed), abstract).params)


def initial_state(
    config: T5Config, optimizer: optim.Optimizer, abstract: step.TrainState, seed: int = 0
) -> step.TrainState:
    """`step.init_state`, whose parameters are computed once for all meshes and settings that do not change them."""
    same = {"dropout_rate": 0.0, "dtype": "float32", "remat": "none", "scan_layers": True, "attention": None}
    params = jax.tree.map(
        lambda x, leaf: jax.device_put(x, leaf.sharding),
        _initial_params(dataclasses.replace(config, **same), seed),
        abstract.params,
    )
    return step.init_state(config, optimizer, jax.random.key(seed), abstract, params)


@dataclasses.dataclass
class Batches(Iterator[dict[str, np.ndarray]]):
    """`batch` for step after step, with a position that a checkpoint can hold."""

    packed: bool = False
    position: int = 0

    def __next__(self) -> dict[str, np.ndarray]:
        self.position += 1
        return batch(self.position - 1, packed=self.packed)

    def save(self, folder: str) -> None:
        Path(folder, "position").write_text(str(self.position))

    def restore(self, folder: str) -> None:
        self.position = int(Path(folder, "position").read_text())


class Losses:
    """A logger of the training loop that keeps each step's loss."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def train(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        self.losses[step] = metrics["loss"]

    def evaluation(self, step: int, scores: Any) -> None: ...
