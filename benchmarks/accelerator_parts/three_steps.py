"""Three optimizer steps of a small T5 1.1 against values that a CPU computed, which `cpu_values.json` holds.

Parameters and batch come from numpy's generator, so that they are the same with every version of JAX. In float32 the
values are losses, norms of gradients, the norm of every parameter, and how far each has moved; in bfloat16, with the
attention that training takes on this device, losses only. `write` makes the file.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.accelerator_parts.child import Item
from benchmarks.train_step import CompiledStep, Shape
from t5x_lite.model.t5 import T5Config
from t5x_lite.training.step import TrainState

FILE = Path(__file__).with_name("cpu_values.json")
STEPS = 3
# The largest relative difference to the CPU's value. Adafactor divides a gradient by its own size, so what is hardly
# moved at all depends on rounding.
TOLERANCE = {"loss": 1e-5, "grad_norm": 1e-4, "norm": 1e-5, "moved": 1e-3}
BFLOAT16_TOLERANCE = {"loss": 1e-2}


def items(toy: bool) -> list[Item]:
    tolerances = {"float32": TOLERANCE} | ({} if toy else {"bfloat16": BFLOAT16_TOLERANCE})
    return [Item(f"three steps, {dtype}", lambda d=dtype: compare(d, tolerances[d])) for dtype in tolerances]


def train(dtype: Any) -> dict[str, Any]:
    config = T5Config(
        d_model=128,  # large enough for Adafactor to factor its second moments
        d_ff=160,
        num_heads=4,
        head_dim=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        vocab_size=256,
        dtype=dtype,
    )
    with jax.default_matmul_precision("highest"):
        train_step = CompiledStep(config, Shape(4, inputs=32, targets=16, packed=True))
        # Adafactor's state is zeros at first, as is the number of steps.
        zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), train_step.abstract)
        params = seeded(train_step.abstract.params)
        before = jax.device_get(params)
        state, metrics = TrainState(zeros.step, params, zeros.opt_state), []
        for _ in range(STEPS):
            state, values = train_step(state)
            metrics.append(jax.device_get(values))
    after = jax.device_get(state.params)
    return {
        "loss": [float(values["loss"]) for values in metrics],
        "grad_norm": [float(values["grad_norm"]) for values in metrics],
        "norm": norms(after),
        "moved": norms(jax.tree.map(np.subtract, after, before)),
    }


def seeded(params: Any) -> Any:
    """Returns random parameters with the shapes and shardings of `params`; scales of norms are near 1."""
    random = np.random.default_rng(0)

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        values = random.standard_normal(x.shape)
        name = jax.tree_util.keystr(path)
        fan_in = x.shape[-2] if "kernel" in name else 1
        values = 1 + 0.1 * values if "scale" in name else values * fan_in**-0.5
        if "query" in name:
            values *= 32**-0.5
        return jax.device_put(values.astype(np.float32), x.sharding)

    return jax.tree_util.tree_map_with_path(leaf, params)


def norms(params: Any) -> dict[str, float]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path): float(np.linalg.norm(np.asarray(x, np.float64))) for path, x in leaves}


def compare(dtype: str, tolerance: dict[str, float]) -> dict[str, Any]:
    expected, values = json.loads(FILE.read_text())["values"], train(dtype)
    errors = {}
    for name in tolerance:
        pairs = zip(jax.tree.leaves(values[name]), jax.tree.leaves(expected[name]), strict=True)
        errors[name] = max(abs(x - y) / abs(y) for x, y in pairs)
    ok = all(errors[name] <= tolerance[name] for name in tolerance)
    return {"tolerance": tolerance, "errors": errors, "loss": values["loss"], "cpu_loss": expected["loss"], "ok": ok}


def write() -> None:
    """Computes the values on this machine's CPU and replaces the file."""
    if jax.default_backend() != "cpu":
        raise ValueError("the values to compare with are a CPU's: set JAX_PLATFORMS=cpu")
    about = "python benchmarks/accelerator.py --write_cpu_values, float32, precision 'highest'"
    content = {"made_by": about, "jax": jax.__version__, "values": train("float32")}
    FILE.write_text(json.dumps(content, indent=1) + "\n")
