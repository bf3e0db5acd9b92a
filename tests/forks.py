"""A `python` that starts at once: it forks a process that has imported what the commands import, and nothing else.

    subprocess.run([*forks.python(), "run.py", "--gin_file=..."])

does what `[sys.executable, "run.py", ...]` does, with its own folder, variables, streams and exit code. Who kills it
kills the fork, too. Needs Linux.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
IMPORTED = (
    *("tasks", "seqio", "matplotlib.pyplot", "safetensors", "jax.export", "orbax.checkpoint._src.path.deleter"),
    *("t5x_lite.cli.dry_run", "t5x_lite.cli.evaluate", "t5x_lite.cli.infer", "t5x_lite.cli.inspect_batch"),
    *("t5x_lite.cli.main", "t5x_lite.cli.plan", "t5x_lite.cli.task_setup", "t5x_lite.cli.train"),
    *("t5x_lite.convert", "t5x_lite.data.pipeline", "t5x_lite.inference.evaluator", "t5x_lite.report"),
)
# Of the variables that JAX reads when it is imported those that tests set, and their types.
JAX_VARIABLES = {
    "JAX_PLATFORMS": str,
    "JAX_COMPILATION_CACHE_DIR": str,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": float,
}


@functools.cache
def python() -> list[str]:
    """What stands for `python` in a command, as long as this process lives."""
    name = f"t5x_lite-forks-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen(64)
        command = [sys.executable, __file__, str(listener.fileno())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        server = subprocess.Popen(command, pass_fds=[listener.fileno()], **pipes)
    atexit.register(server.__exit__, None, None, None)  # it ends when its input does
    return [sys.executable, "-IS", __file__, name]


def devices(count: int) -> dict[str, str]:
    """The variable for so many CPU devices; XLA's other flags stay, and of one that is there twice, the last counts."""
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"}


def _ask(name: str, arguments: list[str]) -> int:
    """Has the server run a command, and waits for it. Returns its exit code, or ends as it was ended."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f"\0{name}")
        socket.send_fds(server, [b"."], [0, 1, 2])
        with server.makefile("rw") as stream:
            print(json.dumps([arguments, os.getcwd(), dict(os.environ)]), file=stream, flush=True)
            code = int(stream.readline() or sys.exit("No fork: `python tests/forks.py 0` says why."))
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


def _serve(listener: socket.socket) -> list[str]:
    """Forks for each command, until its input ends. Returns in the forks only, with the command's arguments."""
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if 0 in ready:
            os._exit(0)
        asker, _ = listener.accept()
        if os.fork() == 0:
            break
        asker.close()
    listener.close()
    _, streams, _, _ = socket.recv_fds(asker, 1, 3)
    with asker.makefile() as stream:
        arguments, folder, environment = json.loads(stream.readline())
    if process := os.fork():
        _watch(process, asker)
    asker.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return arguments


def _watch(process: int, asker: socket.socket) -> None:
    """Tells who asks how a fork ends; ends it with who asks."""
    if asker in select.select([asker, os.pidfd_open(process)], [], [])[0]:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(BrokenPipeError):
        asker.send(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _import() -> None:
    from t5x_lite.data import tensorflow_start

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    tensorflow_start.import_tensorflow()  # without Keras, as the commands do
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks do not look through what is imported for garbage
    gc.set_threshold(200_000, 20, 100)  # tracing makes so many objects that looking for it takes a tenth of the time


def _run(arguments: list[str], packages: list[str]) -> None:
    """Runs a script, `-m MODULE` or `-c CODE` as a new interpreter does."""
    import jax

    for name in JAX_VARIABLES.keys() & os.environ.keys():
        jax.config.update(name.lower(), JAX_VARIABLES[name](os.environ[name]))
    what, *rest = arguments
    here = os.getcwd() if what in ("-m", "-c") else str(Path(what).resolve().parent)
    sys.path = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *packages]
    if what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if arguments:
        sys.exit(_ask(name, arguments))
    packages = [place for place in sys.path[1:] if place not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[0] = str(REPO)
    _import()
    _run(_serve(socket.socket(fileno=int(name))), packages)
