"""Check fused kernels on the device at hand before a run depends on them.

On its first use at a shape, each candidate is compiled, compared with the reference on random input and timed, forward
and backward. The fastest correct one is used. The choice is cached in memory and in a file next to JAX's compilation
cache, by device kind, shape, and the versions of JAX, driver and kernels. A candidate that does not compile, gives
other results or crashed an earlier process is dropped with a line in the log, and the run uses the reference.

This module handles functions on arrays; it must not depend on particular kernels, models or meshes.
"""

import concurrent.futures
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array

from t5x_lite import distributed

logger = logging.getLogger(__name__)

Kernel = Callable[..., Array]
Arguments = Sequence[np.ndarray | None]

# Programs are timed in turn: the fastest of 5 rounds counts, each of 5 calls without synchronisation in between.
ROUNDS, CALLS = 5, 5
# A fused kernel also saves memory: it is used unless the reference is faster by more than this factor.
FASTER = 1.05
# The largest allowed error of a candidate, relative to the norm of the exact values: this many times the error of the
# reference in the same dtype, or this many times the dtype's epsilon, whichever is larger.
ERRORS = 4
CRASHES = 2  # a kernel is dropped after two crashes in its check: a single one may have been a kill
EXACT = 1e-5  # error from the order of summation alone in float32
UNTUNED: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"}  # for a program that runs once

_choices: dict[str, str] = {}


def fastest(
    what: Mapping[str, Any], kernels: Mapping[str, Kernel], make_arguments: Callable[[], Arguments], version: str = ""
) -> str:
    """Return the name of the fastest correct kernel, or of the reference (the first) if no check is possible.

    It may be called during tracing. All processes of a run must call it with the same arguments: the first process
    runs the check on one of its devices, and the others take its result, since all must compile the same program.

    Args:
      what: shape and everything else that the choice depends on, as JSON types; names the choice in the log.
      kernels: name -> function; the first is correct by definition, the others have the same arguments and result.
      make_arguments: returns random arguments in the run's dtype. Gradients of all float arguments are compared.
      version: version of the kernels' code; a choice is valid for one version.
    """
    device = jax.local_devices()[0]
    name = ", ".join(f"{field} {value}" for field, value in what.items())
    identity = {"what": what, "kernels": list(kernels), "code": version}
    versions = {"device": device.device_kind, "platform": device.client.platform_version, "jax": jax.__version__}

    def check() -> str:
        try:
            # Use a new thread, because active traces, meshes and transfer guards are thread-local.
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                record = Record(_hash(identity | versions))
                return thread.submit(_check, record, name, kernels, make_arguments, device).result()
        except Exception as error:
            reference = next(iter(kernels))
            logger.warning("%s: using %s, since no kernel could be checked: %s", name, reference, _line(error))
            return reference

    key = _hash(identity)
    if key not in _choices:
        # Errors in the broadcast are not caught: a host that chose on its own could compile another program.
        _choices[key] = distributed.broadcast(f"kernels/{key}", check)
    return _choices[key]


def _hash(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


def _check(
    record: "Record",
    name: str,
    kernels: Mapping[str, Kernel],
    make_arguments: Callable[[], Arguments],
    device: Any,
) -> str:
    (reference, reference_kernel), *candidates = kernels.items()
    if record.choice is not None:
        logger.info("%s: using %s, as checked before (%s)", name, record.choice, record.file)
        return record.choice
    start = time.perf_counter()
    arguments = make_arguments()
    floats = {n: x for n, x in enumerate(arguments) if x is not None and jnp.issubdtype(x.dtype, jnp.floating)}
    eps = max(float(jnp.finfo(x.dtype).eps) for x in floats.values())
    cotangent = _random(jax.eval_shape(reference_kernel, *arguments))

    def exact_values() -> list[np.ndarray]:
        exact_arguments = [floats[n].astype(np.float32) if n in floats else x for n, x in enumerate(arguments)]
        with jax.default_matmul_precision("highest"):
            program = _Program(
                reference_kernel, [*floats], exact_arguments, cotangent.astype(np.float32), device, UNTUNED
            )
        return program.values()

    programs: dict[str, _Program] = {}
    cacheable = True
    # Nearly all of the time is spent compiling, so two programs compile in parallel.
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        exact_ready = threads.submit(exact_values)
        reference_ready = threads.submit(_Program, reference_kernel, [*floats], arguments, cotangent, device)
        compiled: dict[str, tuple[_Program, list[np.ndarray]]] = {}
        problems: dict[str, str] = {}
        for candidate, kernel in candidates:
            if problem := record.crashed(candidate):
                problems[candidate] = problem
                continue
            record.begin(candidate)
            try:
                program = _Program(kernel, [*floats], arguments, cotangent, device)
                compiled[candidate] = program, program.values()
            except Exception as error:
                problems[candidate] = f"it fails: {_line(error)}"
                cacheable &= "RESOURCE_EXHAUSTED" not in str(error)  # may succeed at another time
        exact, programs[reference] = exact_ready.result(), reference_ready.result()
    allowed = np.maximum(ERRORS * np.maximum(_errors(programs[reference].values(), exact), eps), EXACT)
    for candidate, (program, values) in compiled.items():
        errors = _errors(values, exact)
        if (errors <= allowed).all():
            programs[candidate] = program
        else:
            worst = int(np.argmax(np.where(np.isfinite(errors), errors / allowed, np.inf)))
            problems[candidate] = f"it differs from {reference} by {errors[worst]:.1%} ({allowed[worst]:.2%} allowed)"
    for candidate, problem in problems.items():
        logger.warning("%s: not using %s on %s, since %s", name, candidate, device.device_kind, problem)
    seconds = _time(programs)
    choice = min(seconds, key=lambda n: seconds[n] * (FASTER if n == reference else 1.0))
    times = ", ".join(f"{n} {s * 1e3:.3g} ms" for n, s in seconds.items())
    took = time.perf_counter() - start
    logger.info("%s: using %s on %s (%s; checked in %.0f s)", name, choice, device.device_kind, times, took)
    record.end(choice if cacheable else None, seconds)
    return choice


class _Program:
    """A kernel and its gradients, compiled for one device, with their arguments on it."""

    def __init__(
        self,
        kernel: Kernel,
        floats: Sequence[int],
        arguments: Arguments,
        cotangent: np.ndarray,
        device: Any,
        compiler_options: dict[str, str | bool] | None = None,
    ) -> None:
        def run(arguments: list[Any], cotangent: Array) -> tuple[Array, ...]:
            def call(*values: Array) -> Array:
                float_arguments = dict(zip(floats, values, strict=True))
                return kernel(*(float_arguments.get(n, x) for n, x in enumerate(arguments)))

            y, gradients = jax.vjp(call, *(arguments[n] for n in floats))
            return y, *gradients(cotangent.astype(y.dtype))

        self._arguments = jax.device_put((list(arguments), cotangent), device)
        self._run = jax.jit(run).lower(*self._arguments).compile(compiler_options=compiler_options)

    def values(self) -> list[np.ndarray]:
        return [np.asarray(x, np.float32) for x in self._run(*self._arguments)]

    def seconds(self) -> float:
        start = time.perf_counter()
        results = [self._run(*self._arguments) for _ in range(CALLS)]
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / CALLS


def _time(programs: Mapping[str, _Program]) -> dict[str, float]:
    rounds = [{name: program.seconds() for name, program in programs.items()} for _ in range(ROUNDS)]
    return {name: min(seconds[name] for seconds in rounds) for name in programs}


def _errors(values: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> np.ndarray:
    """Return the norms of the differences, relative to the norms of the exact values."""
    pairs = zip(values, exact, strict=True)
    return np.array([np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30) for a, b in pairs])


def _random(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape.shape, np.float32).astype(shape.dtype)


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def cache_folder() -> str | None:
    return jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]


class Record:
    """The record of one choice, in a JSON file next to the compilation cache; not saved if there is no cache.

    `trying` names the candidate and the process that is checking it. If that process no longer exists, it crashed in
    the check, for example in the compiler.
    """

    def __init__(self, key: str) -> None:
        folder, content = cache_folder(), {}
        self.file: epath.Path | None = None
        try:
            self.file = epath.Path(folder) / f"t5x_lite-kernels-{key}.json" if folder else None
            content = json.loads(self.file.read_text()) if self.file is not None else {}
        except Exception:  # a missing or damaged file, or an error of a storage library
            pass
        self.choice: str | None = content.get("choice")
        self._crashed: list[str] = content.get("crashed", [])
        if (trying := content.get("trying")) and _is_gone(trying["host"], trying["process"]):
            self._crashed.append(trying["candidate"])

    def crashed(self, candidate: str) -> str | None:
        if self._crashed.count(candidate) < CRASHES:
            return None
        return f"{CRASHES} processes ended while it was checked; remove {self.file} to check it again"

    def begin(self, candidate: str) -> None:
        process = {"candidate": candidate, "host": socket.gethostname(), "process": os.getpid()}
        self._write({"crashed": self._crashed, "trying": process})

    def end(self, choice: str | None, seconds: Mapping[str, float]) -> None:
        """Save the choice. None removes the `trying` entry, so that the next start checks again."""
        self._write({"choice": choice, "seconds": dict(seconds), "crashed": self._crashed})

    def _write(self, content: Mapping[str, Any]) -> None:
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(content))
        except Exception as error:  # storage libraries raise their own types
            logger.info("%s is not saved (%s): kernels are checked again at the next start", self.file, _line(error))
            self.file = None


def _is_gone(host: str, process: int) -> bool:
    """Return whether a process of this host has ended; False for other hosts, where this is unknown."""
    if host != socket.gethostname():
        return False
    if process == os.getpid():
        return True  # an earlier process with the same id, as in a restarted container
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False
