"""Part 4: Hugging Face's torch T5 (SDPA, torch.compile, bfloat16) on the shapes of part 3; rows are not packed.

By default parameters are float32 and activations bfloat16 (autocast), as in t5x_lite; once all is bfloat16.
"""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

from benchmarks.accelerator_parts.child import Item, Settings, Unavailable, describe
from benchmarks.accelerator_parts.shapes import first_rows, model_sizes, shapes

ON_DEVICE = False  # JAX's stays away, whose memory this needs


@dataclasses.dataclass(frozen=True)
class Variant:
    """precision: "autocast" or "bfloat16". compiled: by torch.compile."""

    size: str
    precision: str = "autocast"
    compiled: bool = True

    @property
    def key(self) -> str:
        return f"{self.size}, {self.precision}, {'compiled' if self.compiled else 'not compiled'}"


def items(settings: Settings) -> list[Item]:
    torch = import_torch(settings)
    sizes = shapes(settings.toy).sizes
    # First what is sure to be done in seconds: compiling may take all the time there is.
    variants = [Variant(sizes[0], compiled=False), *map(Variant, sizes), Variant(sizes[0], precision="bfloat16")]
    return [Item(v.key, lambda v=v: measure(torch, settings, v), v.size) for v in variants]


def import_torch(settings: Settings) -> Any:
    """Raises Unavailable: torch or transformers is not installed, or torch sees no GPU."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise Unavailable(str(error)) from None
    if not torch.cuda.is_available() and not settings.toy:
        raise Unavailable("torch sees no GPU")
    return torch


def make_model(torch: Any, size: str) -> tuple[Any, str]:
    """Returns the model on the device, and which attention it got: releases without SDPA for T5 refuse it."""
    from benchmarks import torch_t5

    try:
        model, attention = torch_t5.make_model(model_sizes(size), "sdpa"), "sdpa"
    except (ValueError, ImportError):
        model, attention = torch_t5.make_model(model_sizes(size)), "eager"
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), attention


def measure(torch: Any, settings: Settings, variant: Variant) -> dict[str, Any]:
    shape = shapes(settings.toy)

    def at(rows: int, backend: str | None) -> dict[str, Any]:
        from benchmarks import torch_t5

        gc.collect()
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model, attention = make_model(torch, variant.size)
        if variant.precision == "bfloat16":
            model = model.to(torch.bfloat16)
        fields = torch_t5.measure(
            model,
            batch_size=rows,
            inputs=shape.inputs,
            targets=shape.targets,
            steps=3,
            steps_a_round=1 if settings.toy else 5,
            autocast=torch.bfloat16 if variant.precision == "autocast" else None,
            backend=backend,
        )
        return fields | dataclasses.asdict(variant) | {"attention": attention, "compiled": backend is not None}

    rows = rows_of_default(settings, variant.size)
    note = {}
    if variant.compiled:
        backend = "aot_eager" if settings.toy else "inductor"  # a toy is not worth minutes of a C++ compiler
        try:
            return halving(torch, lambda rows: at(rows, backend), rows)
        except Exception as error:  # such as a compiler that is not installed
            note = {"note": f"not compiled: {describe(error)}"}
    return halving(torch, lambda rows: at(rows, None), rows) | note


def rows_of_default(settings: Settings, size: str) -> int:
    """Returns the batch of t5x_lite's default step, as it was measured, or as it should fit."""
    lines = settings.results.measured("train").values()
    rows = [line["batch_size"] for line in lines if line["size"] == size]
    return rows[0] if rows else first_rows(shapes(settings.toy), size, "minimal", None)


def halving(torch: Any, measure_rows: Callable[[int], dict[str, Any]], rows: int) -> dict[str, Any]:
    """Halves the batch like `train.largest_that_fits`, for torch's error.

    Raises torch.OutOfMemoryError: not even one row fits.
    """
    too_large = []
    while True:
        try:
            return {"batch_size": rows, "too_large": too_large} | measure_rows(rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        too_large.append(rows)
        rows //= 2
