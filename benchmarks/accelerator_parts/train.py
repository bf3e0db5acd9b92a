"""Part 3: the training step in bfloat16 on one device, at the largest batch that fits.

First every size as it is trained by default (layers scanned, attention by platform and shape, remat minimal), then what
else there is to choose.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax

from benchmarks.accelerator_parts.child import Item, Settings
from benchmarks.accelerator_parts.shapes import Shapes, dtype_of, first_rows, model_sizes, shapes
from benchmarks.train_step import CompiledStep, DoesNotFit, Shape, measure
from t5x_lite.model.attention import PLATFORM_KERNELS, Implementation
from t5x_lite.model.config import Remat
from t5x_lite.model.t5 import T5Config


@dataclasses.dataclass(frozen=True)
class Variant:
    """The choices in a training step. attention: None leaves it to platform and shape."""

    size: str
    remat: Remat = "minimal"
    attention: Implementation | None = None
    scan_layers: bool = True

    @property
    def key(self) -> str:
        layers = "scanned" if self.scan_layers else "unrolled"
        return f"{self.size}, {layers}, attention {self.attention or 'default'}, remat {self.remat}"

    def config(self) -> T5Config:
        return T5Config(
            **model_sizes(self.size),
            dtype=dtype_of(self.size),
            remat=self.remat,
            attention=self.attention,
            scan_layers=self.scan_layers,
        )


def variants(shape: Shapes, fused: Implementation | None) -> Iterator[Variant]:
    """Yields what is worth the most first; unrolled layers take the longest to start. fused: the device's kernel."""
    sizes = shape.sizes
    yield from (Variant(size) for size in sizes)
    yield from (Variant(size, remat="none") for size in sizes)
    if fused is not None:  # which is the default only where a check on the device finds it right and quick
        yield Variant(sizes[0], attention=fused)
    yield from (Variant(size, attention="batch") for size in sizes)
    yield from (Variant(size, scan_layers=False) for size in reversed(sizes))
    yield from (Variant(size, attention="blocks") for size in sizes)


def items(settings: Settings) -> list[Item]:
    shape = shapes(settings.toy)
    fused = PLATFORM_KERNELS.get(jax.default_backend())

    def item(variant: Variant) -> Item:
        # A process of its own for every size's default, so that its peak of memory is known.
        process = variant.key if variant == Variant(variant.size) else variant.size
        return Item(variant.key, lambda: measure_variant(variant, settings), process)

    return [item(v) for v in variants(shape, fused) if not settings.toy or v.attention is None]


def measure_variant(variant: Variant, settings: Settings) -> dict[str, Any]:
    shape = shapes(settings.toy)

    def at(rows: int) -> dict[str, Any]:
        train_step = CompiledStep(variant.config(), Shape(rows, shape.inputs, shape.targets, packed=True))
        return measure(train_step, steps=3, seconds_a_round=0.0 if settings.toy else 0.5)

    rows = first_rows(shape, variant.size, variant.remat, limit_gib())
    fields = {"inputs": shape.inputs, "targets": shape.targets} | largest_that_fits(at, rows)
    return dataclasses.asdict(variant) | fields


def limit_gib() -> float | None:
    """Returns the memory that JAX may have of the device, as far as it tells."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit and limit / 2**30


def largest_that_fits(measure_rows: Callable[[int], dict[str, Any]], rows: int) -> dict[str, Any]:
    """Halves `rows` until they fit and returns what was measured, with `batch_size` and the sizes that did not fit.

    Raises DoesNotFit: not even one row fits.
    """
    too_large = []
    while rows:
        try:
            return {"batch_size": rows, "too_large": too_large} | measure_rows(rows)
        except Exception as error:
            if not (isinstance(error, DoesNotFit) or "RESOURCE_EXHAUSTED" in str(error)):
                raise
        too_large.append(rows)  # outside of the handler, whose traceback holds the arrays
        gc.collect()
        jax.clear_caches()
        rows //= 2
    raise DoesNotFit(f"{too_large} rows need more memory than there is")


def default_rows(settings: Settings, size: str) -> int:
    """Returns the batch size of a size's default step, as measured, or fewer rows than should fit."""
    line = settings.results.measured("train").get(Variant(size).key)
    if line is not None:
        return line["batch_size"]
    return max(first_rows(shapes(settings.toy), size, Variant(size).remat, limit_gib()) // 2, 1)
