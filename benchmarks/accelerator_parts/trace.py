"""Part 8: a profiler trace of the large model's step, and its costliest operations as text.

The trace stays in DIR/trace, for TensorBoard or Perfetto. It is read with JAX's own reader.
"""

import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.profiler

from benchmarks.accelerator_parts.child import Item, Settings
from benchmarks.accelerator_parts.saves import compiled_step
from benchmarks.accelerator_parts.shapes import shapes

STEPS = 3
OPERATIONS = 10
# These last as long as what runs inside of them, which is listed by itself.
CONTAINERS = ("while", "call", "conditional", "jit_")


def items(settings: Settings) -> list[Item]:
    size = shapes(settings.toy).large
    return [Item(f"{size}, trace", lambda: measure(settings, size))]


def measure(settings: Settings, size: str) -> dict[str, Any]:
    train_step, folder = compiled_step(settings, size), settings.out / "trace"
    shutil.rmtree(folder, ignore_errors=True)
    state, metrics = train_step(train_step.init_state())
    jax.block_until_ready((state, metrics))
    with jax.profiler.trace(str(folder)):
        for _ in range(STEPS):
            state, metrics = train_step(state)
        jax.block_until_ready((state, metrics))
    file = next(folder.rglob("*.xplane.pb"))
    seconds, calls = totals(file)
    if not seconds:
        raise ValueError(f"{file} has no operations of the device")
    names = operation_names(train_step.compiled.as_text())
    return {
        "size": size,
        "batch_size": train_step.shape.batch_size,
        "device_ms_a_step": round(1000 * sum(seconds.values()) / STEPS, 3),
        "operations": table(seconds, calls, names),
        "trace": str(file.relative_to(settings.out)),
    }


def totals(file: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Returns seconds and calls of every operation in a trace, over all of its steps."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for name, duration in operations(jax.profiler.ProfileData.from_file(str(file))):
        if not name.startswith(CONTAINERS):
            seconds[name] += duration
            calls[name] += 1
    return seconds, calls


def operations(profile: Any) -> Iterator[tuple[str, float]]:
    """Yields name and seconds of what ran on the device: of a GPU its kernels, of a CPU XLA's own events."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
    for plane in devices or planes:
        lines = list(plane.lines)
        # A TPU's operations have a line of their own. A GPU's streams come before lines that repeat them by name.
        own = [line for line in lines if line.name == "XLA Ops"] if not has_streams(lines) else streams(lines)
        for line in own or ([] if devices else lines):
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is not None or devices:
                    yield str(operation or event.name), event.duration_ns / 1e9


def streams(lines: list[Any]) -> list[Any]:
    return [line for line in lines if line.name.startswith("Stream")]


def has_streams(lines: list[Any]) -> bool:
    return bool(streams(lines))


def operation_names(program: str) -> dict[str, str]:
    """Returns where in the model each instruction of a compiled program comes from, as far as the compiler kept it."""
    pattern = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name=\"([^\"]*)\"", re.MULTILINE)
    return dict(pattern.findall(program))


def table(seconds: dict[str, float], calls: dict[str, int], names: dict[str, str]) -> list[str]:
    """Returns a line of text for each of the costliest operations: time, share, calls a step, name and origin."""
    total = sum(seconds.values())
    costliest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:OPERATIONS]
    return [
        f"{1000 * seconds[name] / STEPS:9.3f} ms {seconds[name] / total:6.1%} x{calls[name] / STEPS:<5.0f} "
        f"{name}  {names.get(name, '')[-100:]}".rstrip()
        for name in costliest
    ]
