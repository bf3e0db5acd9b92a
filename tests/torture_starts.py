"""Starts the command on a folder of `torture.prepare`, as a user does or as a fork. What XLA compiles is kept there."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import forks
import torture_faults

REPO = Path(__file__).resolve().parents[1]
TOLD = 75  # the exit code of a run that SIGTERM has told to stop
RANDOM = "random"  # a fault that is no point of torture_faults: SIGKILL after so many milliseconds
ENVIRONMENT = {
    "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


class Fault(NamedTuple):
    """A point of torture_faults and at which time that it is met; or RANDOM and milliseconds."""

    point: str = "never"
    count: int = 1


NO_FAULT = Fault()


class End(NamedTuple):
    """How a start ended.

    code: 0, TOLD, or minus the signal that ended it.
    met: whether it came to its fault.
    """

    code: int
    met: bool


def _started(arguments: list[str], folder: Path, log: Path, devices: int, cold: bool) -> "subprocess.Popen[bytes]":
    environment = ENVIRONMENT | forks.devices(devices) | {"JAX_COMPILATION_CACHE_DIR": str(folder / "jax")}
    command = [*([sys.executable] if cold else forks.python()), torture_faults.__file__, *arguments]
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=file, stderr=file)


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run(
    folder: Path, name: str, fault: Fault = NO_FAULT, processes: int = 1, victim: int = 0, cold: bool = False
) -> End:
    """Runs the training command on MODEL_DIR=folder/name.

    Args:
      victim: the process that meets the fault; if it is killed, the others are killed, too.
      cold: the real command, in a new interpreter; else a fork.

    Raises AssertionError, with the log, if it ended in any other way than `End` says.
    """
    flags, port = ["--gin_file=torture.gin", f"--gin.MODEL_DIR='{name}'"], _free_port()
    commands = []
    for index in range(processes):
        meets = fault if index == victim and fault.point != RANDOM else NO_FAULT
        hosts = [f"--coordinator_address=localhost:{port}", f"--process_count={processes}", f"--process_index={index}"]
        commands.append([meets.point, str(meets.count), *flags, *(hosts if processes > 1 else [])])
    return _watched(commands, folder, folder / f"{name}.log", fault, 2 // processes, cold)


def convert(folder: Path, name: str, dest: str, fault: Fault = NO_FAULT) -> End:
    """Runs the conversion of MODEL_DIR=folder/name to Hugging Face's format, at folder/dest."""
    command = [fault.point, str(fault.count), "convert", name, dest, "--to=huggingface"]
    return _watched([command], folder, folder / f"{name}.log", fault, 1, cold=False)


def _watched(commands: list[list[str]], folder: Path, log: Path, fault: Fault, devices: int, cold: bool) -> End:
    at_random = fault.point == RANDOM
    with log.open("a") as file:
        print(f"==== {fault}", file=file)
    begun, killed_by_us = log.stat().st_size, False
    started = [_started(command, folder, log, devices, cold) for command in commands]
    deadline = time.monotonic() + (fault.count / 1000 if at_random else 900)
    while time.monotonic() < deadline and all(process.poll() is None for process in started):
        time.sleep(0.02)
    if at_random or any(process.poll() not in (0, TOLD, None) for process in started):
        killed_by_us = any(process.poll() is None for process in started)
        for process in started:
            process.kill()
    codes = {process.wait(timeout=600) for process in started}
    text = log.read_bytes()[begun:].decode(errors="replace")
    met = torture_faults.MET in text or (at_random and killed_by_us)
    if -signal.SIGKILL in codes and met:
        return End(-signal.SIGKILL, met)
    expected = {0, TOLD, *([-signal.SIGTERM] if fault.point in torture_faults.ENDED_BY_SIGTERM else [])}
    assert len(codes) == 1 and codes <= expected, f"{fault} -> {codes}:\n{text[-6000:]}"
    return End(codes.pop(), met)
