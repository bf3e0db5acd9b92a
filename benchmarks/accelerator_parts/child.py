"""Runs the measurements of one part, in a process that ends with its parent.

A part is a module with `items(settings)`, a list of `Item`. Each is measured once; what it returns, or its error, is a
line of the results. `ON_DEVICE = False` says that it leaves the accelerator alone. This module does not import torch,
nor JAX before the part has.
"""

import ctypes
import dataclasses
import importlib
import importlib.util
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.accelerator_parts.results import Results

MORE = 75  # the exit code that asks for another process, for what is still pending
PR_SET_PDEATHSIG = 1


class Unavailable(Exception):
    """This part cannot be measured here, such as torch's where torch is not installed."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One measurement. Those of one `process` share a process; peaks of memory are of a process."""

    key: str
    measure: Callable[[], dict[str, Any]]
    process: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Arguments of a part. toy: tiny sizes, for a CPU. results: what earlier parts have measured."""

    out: Path
    toy: bool
    results: Results


def run(part: str, module: str, settings: Settings) -> int:
    """Measures the pending items of the first process among them; returns the exit code."""
    results = settings.results
    logging.basicConfig()
    logging.getLogger("t5x_lite").setLevel(logging.INFO)  # such as which attention a check on the device has chosen
    try:
        imported = importlib.import_module(module)
        if getattr(imported, "ON_DEVICE", "jax" in sys.modules):
            check_device(settings)
        items = {item.key: item for item in imported.items(settings)}
        pending = results.pending(part, list(items))
    except Unavailable as reason:
        results.append(part, skipped=str(reason))
        return 0
    except Exception as error:
        traceback.print_exc()
        results.append(part, error=describe(error))
        return 0
    if not pending:
        return 0
    process = items[pending[0]].process
    for key in pending:
        if items[key].process != process:
            continue
        started = time.monotonic()
        results.append(part, key, started=time.time())
        try:
            fields = items[key].measure()
        except Exception as error:
            traceback.print_exc()
            fields = {"error": describe(error)}
        results.append(part, key, seconds=round(time.monotonic() - started, 1), **fields)
    return MORE if any(items[key].process != process for key in pending) else 0


def describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]


def check_device(settings: Settings) -> None:
    """Raises ValueError: JAX has no accelerator to measure, or DIR has results of another kind of device."""
    import jax

    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu" and not settings.toy:
        raise ValueError("JAX sees no accelerator (--toy measures tiny sizes on a CPU)")
    earlier = next(iter(settings.results.measured("device").values()), {"device": kind})["device"]
    if kind != earlier:
        raise ValueError(f"{settings.out} has results of {earlier}, and this is {kind}: use another --out")


def end_with_parent(parent: int) -> None:
    """A parent that is killed cannot end its child, which would keep the device's memory: Linux does."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # killed before the line above
        sys.exit("the parent has ended")


def use_stand_ins() -> None:
    """jaxtyping, which the package imports for its annotations alone, need not be installed."""
    if importlib.util.find_spec("jaxtyping") is None:
        sys.path.append(str(Path(__file__).resolve().parent / "stand_ins"))
