"""Part 5: greedy and beam-4 decoding in bfloat16, every row to the last token."""

import functools
from typing import Any

from benchmarks import decode
from benchmarks.accelerator_parts.child import Item, Settings
from benchmarks.accelerator_parts.decode_calls import cases, inputs_of, key, summary_of
from benchmarks.accelerator_parts.shapes import Shapes, dtype_of, model_sizes, shapes
from t5x_lite.inference.pretrained import LoadedModel
from t5x_lite.model.t5 import T5Config


def items(settings: Settings) -> list[Item]:
    shape = shapes(settings.toy)
    load = functools.cache(load_random)  # once for all batches
    return [
        Item(key(size, method, rows), lambda s=size, m=method, rows=rows: measure(load(s), s, m, rows, shape))
        for size, method, rows in cases(shape)
    ]


def load_random(size: str) -> LoadedModel:
    config = T5Config(**model_sizes(size), dtype=dtype_of(size))
    return LoadedModel(config, decode.random_params(config, seed=0))


def measure(model: LoadedModel, size: str, method: str, rows: int, shape: Shapes) -> dict[str, Any]:
    generate = decode.generator(model, inputs_of(rows, shape, model.config.vocab_size))
    times = decode.time_calls(generate, method, shape.decode_tokens, calls=3)
    return summary_of(times, size, method, rows, shape)
