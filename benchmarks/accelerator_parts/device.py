"""Part 1: the device, its driver, the versions, its memory, and the rates that it reaches."""

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator_parts.child import Item, Settings
from t5x_lite.metrics import hardware

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers")


def items(settings: Settings) -> list[Item]:
    size = 256 if settings.toy else 8192
    return [Item("device", lambda: measure(size))]


def measure(size: int) -> dict[str, Any]:
    device = jax.devices()[0]
    chip = hardware.of_device(device)
    memory = device.memory_stats() or {}
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16) * size**-0.5
    multiply = jax.jit(lambda x: x @ matrix)
    copy = jax.jit(lambda x: x + jnp.bfloat16(1))
    flops = 2 * size**3 / seconds_a_call(multiply, matrix)
    bandwidth = 2 * matrix.nbytes / seconds_a_call(copy, matrix)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "platform_version": device.client.platform_version.splitlines()[0],
        "driver": driver(),
        "cpus": os.cpu_count(),
        "memory_limit_gb": round(memory["bytes_limit"] / 2**30, 2) if "bytes_limit" in memory else None,
        "memory_fraction": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"),
        "matrix": f"{size}^3, bfloat16",
        "matrix_flops": flops,
        "published_flops": chip.flops if chip else None,
        "share_of_published": round(flops / chip.flops, 4) if chip and chip.flops else None,
        "copy_bytes_per_second": bandwidth,
        "published_bandwidth": chip.memory_bandwidth if chip else None,
    }


def seconds_a_call(function: Callable[[jax.Array], jax.Array], x: jax.Array, calls: int = 20) -> float:
    """Returns the median over five rounds of `calls` calls, each of which takes what the last one gave."""
    jax.block_until_ready(function(x))
    rounds = []
    for _ in range(5):
        started, y = time.perf_counter(), x
        for _ in range(calls):
            y = function(y)
        jax.block_until_ready(y)
        rounds.append((time.perf_counter() - started) / calls)
    return statistics.median(rounds)


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """NVIDIA's driver, memory, power limit and clock, where its tool is installed."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,power.limit,clocks.max.sm", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or None
