"""Part 6: the same decoding in Hugging Face's torch T5, all in bfloat16."""

import functools
from typing import Any

from benchmarks import decode
from benchmarks.accelerator_parts.child import Item, Settings
from benchmarks.accelerator_parts.decode_calls import cases, inputs_of, key, summary_of
from benchmarks.accelerator_parts.shapes import Shapes, model_sizes, shapes
from benchmarks.accelerator_parts.torch_train import import_torch, make_model

ON_DEVICE = False  # JAX's stays away, whose memory this needs


def items(settings: Settings) -> list[Item]:
    torch, shape = import_torch(settings), shapes(settings.toy)
    load = functools.cache(lambda size: load_random(torch, size))  # once for all batches
    return [
        Item(key(size, method, rows), lambda s=size, m=method, rows=rows: measure(load(s), s, m, rows, shape))
        for size, method, rows in cases(shape)
    ]


def load_random(torch: Any, size: str) -> tuple[Any, str]:
    """Returns a model of random weights in which neither padding nor the end token ever wins, and its attention."""
    model, attention = make_model(torch, size)
    with torch.no_grad():
        model.lm_head.weight[:2] = 0.0
    return model.to(torch.bfloat16).eval(), attention


def measure(loaded: tuple[Any, str], size: str, method: str, rows: int, shape: Shapes) -> dict[str, Any]:
    model, attention = loaded
    generate = decode.torch_generator(model, inputs_of(rows, shape, model_sizes(size)["vocab_size"]))
    calls = decode.time_calls(generate, method, shape.decode_tokens, calls=1 if rows > 8 else 2)
    return summary_of(calls, size, method, rows, shape) | {"attention": attention}
