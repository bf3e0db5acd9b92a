"""Models and batches to measure: published sizes, or with --toy tiny ones. Imports neither JAX nor torch."""

import dataclasses
import math
from typing import Any, Literal

from benchmarks.sizes import gin_values

TOY_SIZES = {
    "d_model": 32,
    "d_ff": 64,
    "num_heads": 2,
    "head_dim": 16,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "vocab_size": 128,
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """sizes: names of models in the order in which they are measured. large: the one to save and to trace.

    memory: {remat: {size: (rows, GiB)}}, what a step of so many rows needs.
    """

    sizes: tuple[str, ...]
    large: str
    memory: dict[str, dict[str, tuple[int, float]]]
    inputs: int
    targets: int
    decode_sizes: tuple[str, ...]
    decode_batches: tuple[int, ...]
    decode_inputs: int
    decode_tokens: int


# By `--mode=plan` for h100:1, inputs 512, targets 114, packed, bfloat16, scanned, cuDNN's attention.
PUBLISHED = Shapes(
    sizes=("base", "large", "small", "xl"),
    large="large",
    memory={
        "none": {"small": (512, 108.6), "base": (128, 68.0), "large": (32, 49.0), "xl": (8, 41.6)},
        "minimal": {"small": (512, 42.0), "base": (256, 47.1), "large": (64, 33.0), "xl": (32, 46.9)},
    },
    inputs=512,
    targets=114,
    decode_sizes=("base", "small"),
    decode_batches=(32, 8, 128, 1),
    decode_inputs=128,
    decode_tokens=128,
)
TOY = Shapes(
    sizes=("toy",),
    large="toy",
    memory={"none": {"toy": (4, 1.0)}, "minimal": {"toy": (8, 1.0)}},
    inputs=32,
    targets=16,
    decode_sizes=("toy",),
    decode_batches=(2,),
    decode_inputs=16,
    decode_tokens=8,
)


# Parameters and their gradients, which a step holds whatever its batch, in GiB.
STATE_GIB = {"toy": 0.0, "small": 0.6, "base": 1.9, "large": 5.8, "xl": 21.2}
MAX_ROWS = 1024


def first_rows(shape: Shapes, size: str, remat: str, limit_gib: float | None) -> int:
    """Returns the largest power of two of rows that should need no more than `limit_gib`, to begin with.

    None, a limit that is not known: as many as `shape.memory` is of.
    """
    table_rows, table_gib = shape.memory[remat][size]
    if limit_gib is None:
        return table_rows
    gib_a_row = (table_gib - STATE_GIB[size]) / table_rows
    fitting = max((limit_gib - STATE_GIB[size]) / gib_a_row, 1.0)
    return min(2 ** int(math.log2(fitting)), MAX_ROWS)


def shapes(toy: bool) -> Shapes:
    return TOY if toy else PUBLISHED


def dtype_of(size: str) -> Literal["float32", "bfloat16"]:
    """Returns the dtype of activations; a CPU takes twice as long to compile for bfloat16."""
    return "float32" if size == "toy" else "bfloat16"


def model_sizes(size: str) -> dict[str, Any]:
    """Returns the fields of t5x_lite's T5Config that say how large a model is."""
    return dict(TOY_SIZES) if size == "toy" else gin_values(f"models/t5_1_1/{size}")
