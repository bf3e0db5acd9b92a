"""The calls that both libraries decode, and their lines. This module imports neither JAX nor torch."""

import statistics
from typing import Any

import numpy as np

from benchmarks import decode
from benchmarks.accelerator_parts.shapes import Shapes


def cases(shape: Shapes) -> list[tuple[str, str, int]]:
    """Returns (size, method, batch) of every call."""
    return [(s, m, rows) for rows in shape.decode_batches for s in shape.decode_sizes for m in ("beam", "greedy")]


def key(size: str, method: str, rows: int) -> str:
    return f"{size}, {method}, batch {rows}"


def inputs_of(rows: int, shape: Shapes, vocab_size: int) -> np.ndarray:
    return 2 + decode.input_rows(rows, shape.decode_inputs) % (vocab_size - 2)


def summary_of(times: dict[str, Any], size: str, method: str, rows: int, shape: Shapes) -> dict[str, Any]:
    """`tokens_per_second` counts the best result of each row. complete: no row has ended early."""
    seconds = statistics.median(times["seconds"])
    return {
        "size": size,
        "method": method,
        "batch_size": rows,
        "inputs": shape.decode_inputs,
        "tokens": shape.decode_tokens,
        "call_seconds": round(seconds, 5),
        "tokens_per_second": round(rows * shape.decode_tokens / seconds, 1),
        "complete": bool((times["tokens"] != 0).all()) and times["tokens"].shape[1] == shape.decode_tokens,
    }
