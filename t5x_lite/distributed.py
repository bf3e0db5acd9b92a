"""Initialise JAX distributed, share values between processes, and exit cleanly when a process is lost.

On Cloud TPUs, under Slurm's srun, under Open MPI and in Kubernetes jobs no setting is needed: the launcher's variables
or JAX's cluster detection identify the processes. Elsewhere three flags do; the flags always take precedence. A process
that detects no others trains alone. If the environment implies several processes and they are not found, the process
stops, because several runs would otherwise write to one MODEL_DIR. Must not depend on models, data or runs.
"""

import dataclasses
import importlib.util
import logging
import os
import re
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from t5x_lite.errors import UserError

log = logging.getLogger("t5x_lite")

# A process without a heartbeat for so long counts as dead, and JAX then ends the others.
HEARTBEAT_SECONDS = 60
# Connection timeout and attempts, after which a server counts as absent. JAX's own requests wait for minutes.
SERVER_SECONDS, SERVER_ATTEMPTS = 3.0, 3
# Texts of JAX's errors if it detects no cluster, and if it is already initialised (for example in a notebook).
_NO_CLUSTER = "coordinator_address should be defined"
_INITIALIZED = "must be called before any JAX"
# Slurm's reserved step ids, from here on, are not steps of srun: the batch script, an interactive shell, ssh.
_FIRST_RESERVED_STEP = 0xFFFFFFF0
_VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_ALONE = "--process_count=1 trains in this process alone"


def connect(
    coordinator_address: str | None = None, process_count: int | None = None, process_index: int | None = None
) -> None:
    """Initialise JAX distributed if this run has several processes. Call it before JAX's first computation.

    Args:
      coordinator_address: HOST:PORT of process 0. The three arguments together replace cluster detection.
      process_count: number of processes; 1 without the other arguments ignores the environment and trains alone.
      process_index: index of this process, from 0.

    Raises:
      ValueError: only some of the three arguments are given, or they are inconsistent; or the environment implies
        several processes, and they are not found.
      JaxRuntimeError: the connection to the other processes fails. JAX itself ends a process that has waited for them
        for five minutes.
    """
    if process_count == 1 and process_index in (None, 0):
        return
    proxies = _bypass_proxies()
    if (coordinator_address, process_count, process_index) != (None, None, None):
        if coordinator_address is None or process_count is None or process_index is None:
            raise UserError(
                "--coordinator_address=HOST:PORT (of process 0), --process_count and --process_index go together; got "
                f"{coordinator_address}, {process_count}, {process_index}. {_ALONE}"
            )
        if ":" not in coordinator_address or not 0 <= process_index < process_count:
            raise UserError(
                f"--coordinator_address={coordinator_address} must be HOST:PORT, and --process_index={process_index} "
                f"at least 0 and below --process_count={process_count}"
            )
        step = _slurm_step()
        # Only a step that agrees with the flags determines this process's GPUs.
        agrees = step is not None and (step.tasks, step.index) == (process_count, process_index)
        gpus = step.gpus if step and agrees else None
        if (_number("OMPI_COMM_WORLD_SIZE"), _number("OMPI_COMM_WORLD_RANK")) == (process_count, process_index):
            gpus = _gpus(_number("OMPI_COMM_WORLD_LOCAL_RANK"), _number("OMPI_COMM_WORLD_LOCAL_SIZE"))
        _initialize(coordinator_address, process_count, process_index, gpus)
    elif _number("OMPI_COMM_WORLD_SIZE") > 1:
        # Checked before Slurm: there srun starts only Open MPI's daemons, and its variables count those.
        _detect("ompi", _gpus(_number("OMPI_COMM_WORLD_LOCAL_RANK"), _number("OMPI_COMM_WORLD_LOCAL_SIZE")))
    elif "OMPI_COMM_WORLD_SIZE" in os.environ:
        return  # JAX would give a single process only one GPU
    elif step := _slurm_step():
        if step.tasks > 1:
            _initialize(step.coordinator_address, step.tasks, step.index, step.gpus)
    elif "SLURM_JOB_ID" in os.environ:
        _check_srun_is_not_needed()
    else:
        _detect()
    if proxies and jax.distributed.is_initialized() and is_first():
        log.warning("The processes connect to one another directly, not through %s.", ", ".join(proxies))


def _initialize(address: str, count: int, index: int, gpus: list[int] | None) -> None:
    """Initialise without JAX's cluster detection, which would give each Slurm task one GPU, whatever the node has."""
    jax.distributed.initialize(
        address,
        count,
        index,
        local_device_ids=gpus,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _detect(method: str | None = None, gpus: list[int] | None = None) -> None:
    """Initialise with JAX's cluster detection: with `method`, or with the first that fits the environment.

    Raises ValueError if the environment implies several processes and JAX does not find them.
    """
    try:
        if method is None:
            _check_servers()
        with warnings.catch_warnings():
            # JAX prints six lines on every pod without the package; the error below covers the case that matters.
            warnings.filterwarnings("ignore", r"\s*Kubernetes environment detected", UserWarning)
            jax.distributed.initialize(
                local_device_ids=gpus,
                cluster_detection_method=method,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        if method is not None and gpus is None and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            for platform in ("cuda", "rocm"):  # JAX has selected one, by the process's local index
                jax.config.update(f"jax_{platform}_visible_devices", "all")
        return
    except Exception as error:  # each cluster's library has its own error classes
        if isinstance(error, jax.errors.JaxRuntimeError) or jax.distributed.is_initialized():
            raise  # the processes were found but not reached
        failure = error
    reason = " ".join(str(failure).split())[:300] or type(failure).__name__
    if _NO_CLUSTER in reason:
        reason = "JAX detects no cluster from these variables"
    if evidence := _evidence_of_several():
        sign, cure = evidence
        raise UserError(f"{sign}, but the other processes are not found: {reason}. {cure}; {_ALONE}") from failure
    if _NO_CLUSTER not in str(failure) and _INITIALIZED not in str(failure):
        log.warning(
            "No other processes are found, so this one trains alone (%s: %s). If the run has several, %s.",
            type(failure).__name__,
            reason,
            _flags_cure("N", "I").replace("Give", "give"),
        )


def _evidence_of_several() -> tuple[str, str] | None:
    """Return which variable implies several processes and the cure to suggest; None if no variable does."""
    for count, index in (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")):
        if _number(count) > 1:
            return f"{count}={os.environ[count]}", _flags_cure(f"${count}", f"${index}")
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if "," in os.environ.get(name, ""):
            hosts = len(os.environ[name].split(","))
            return f"{name} has {hosts} hosts", _flags_cure(str(hosts), "$TPU_WORKER_ID")
    if _number("MEGASCALE_NUM_SLICES") > 1:
        return f"MEGASCALE_NUM_SLICES={os.environ['MEGASCALE_NUM_SLICES']}", _flags_cure("N", "I")
    if _has_tpu_workers():
        return None  # a slice with one host, possibly in a Kubernetes job
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        return "JAX_COORDINATOR_ADDRESS is set", _flags_cure("N", "I")
    if "JOB_COMPLETION_INDEX" in os.environ:
        rights = "Install the kubernetes package and let the pod's service account read pods, jobs and services; or "
        return "JOB_COMPLETION_INDEX is set (an indexed Kubernetes job)", rights + _flags_cure(
            "N", "$JOB_COMPLETION_INDEX"
        ).replace("Give", "give")
    return None


def _flags_cure(count: str, index: str) -> str:
    return f"Give each process --coordinator_address=HOST:PORT --process_count={count} --process_index={index}"


def _number(name: str, default: int = 0) -> int:
    """Return the environment variable `name` as an integer; `default` if it is unset or not a number."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


# Slurm


@dataclasses.dataclass(frozen=True)
class _SlurmStep:
    """srun's settings for one of its tasks."""

    tasks: int
    index: int
    coordinator_address: str
    gpus: list[int] | None


def _slurm_step() -> _SlurmStep | None:
    """Return the srun step that started this process, or None if srun did not.

    SLURM_NTASKS, which JAX reads, is the number that sbatch requested; the step's own number counts the tasks that srun
    has started. An interactive shell also has a step's variables, but is one process, whatever number they give.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in os.environ for name in names) or _number("SLURM_STEP_ID") >= _FIRST_RESERVED_STEP:
        return None
    tasks = _number("SLURM_STEP_NUM_TASKS")
    if tasks == 1 and _number("SLURM_NTASKS") > 1:
        return None  # the variables of a shell started with srun's --preserve-env
    # In "gpu[03-05,9],login1" or "rack[0-1]n[2-3]", the first host has the first number in each bracket.
    first = re.sub(r"\[([^],-]+)[^]]*]", r"\1", os.environ["SLURM_STEP_NODELIST"]).split(",")[0]
    # One port for each job, as JAX chooses it: the highest 4096 are the least likely to be in use.
    port = os.environ.get("JAX_COORDINATOR_PORT") or 65535 - 2**12 + 1 + _number("SLURM_JOB_ID") % 2**12
    return _SlurmStep(
        tasks=tasks,
        index=_number("SLURM_PROCID"),
        coordinator_address=f"{first}:{port}",
        gpus=_gpus(_number("SLURM_LOCALID"), _tasks_on_this_node()),
    )


def _tasks_on_this_node() -> int:
    """Return the step's tasks on this node. "2(x3),1" means two tasks on each of three nodes, then one on a fourth."""
    counts: list[int] = []
    for tasks, _, nodes in re.findall(r"(\d+)(\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(nodes or 1)
    node = _number("SLURM_NODEID")
    return counts[node] if node < len(counts) else 1


def _gpus(index: int, count: int) -> list[int] | None:
    """Choose the GPUs of process `index` of `count` on one node.

    Returns indices among the visible GPUs. None means all of them: the node has one process, or the launcher makes only
    its own GPUs visible to each.
    """
    if count <= 1 or "JAX_LOCAL_DEVICE_IDS" in os.environ:  # JAX reads the latter itself
        return None
    on_node = _number("SLURM_GPUS_ON_NODE")
    visible = next((os.environ[name] for name in _VISIBLE_GPUS if os.environ.get(name)), "")
    visible_count = len(visible.split(",")) if visible else on_node
    if visible and (visible_count * count <= on_node or (not on_node and visible_count < count)):
        return None
    each = max(visible_count // count, 1)
    return list(range(index * each, (index + 1) * each))


def _check_srun_is_not_needed() -> None:
    """Raise ValueError in a Slurm job of several tasks or nodes, because srun did not start this process."""
    tasks = max(_number("SLURM_NTASKS"), _number("SLURM_NPROCS"))
    nodes = max(_number("SLURM_JOB_NUM_NODES"), _number("SLURM_NNODES"))
    if tasks > 1 or nodes > 1:
        count = f"{tasks} tasks" if tasks > 1 else f"{nodes} nodes"
        raise UserError(
            f"this Slurm job has {count}, but srun did not start this process, and nothing starts the others: "
            f"put srun before python, or request one task (sbatch --nodes=1 --ntasks=1); {_ALONE}"
        )


# Servers and proxies


def _has_tpu_workers() -> bool:
    return any(name in os.environ for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"))


def _metadata_server() -> str:
    return os.environ.get("GCE_METADATA_IP", "metadata.google.internal")  # the variable that JAX reads


def _check_servers() -> None:
    """Raise ConnectionError if a server that JAX would query for the other processes does not accept connections."""
    if _has_tpu_workers():
        slices = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
        needs_metadata = any(name not in os.environ for name in slices)
    else:
        needs_metadata = "TPU_SKIP_MDS_QUERY" not in os.environ  # JAX sets it on machines without TPUs
    if needs_metadata:
        _check_server("the metadata server", _metadata_server(), 80)
    elif (
        not _has_tpu_workers()
        and (host := os.environ.get("KUBERNETES_SERVICE_HOST"))
        and importlib.util.find_spec("kubernetes")
    ):
        _check_server("the Kubernetes API", host, _number("KUBERNETES_SERVICE_PORT", 443))


def _check_server(name: str, host: str, port: int) -> None:
    host, _, own_port = host.partition(":") if host.count(":") == 1 else (host, "", "")  # an IPv6 address has no port
    failure: OSError | None = None
    for _ in range(SERVER_ATTEMPTS):
        try:
            socket.create_connection((host, int(own_port or port)), timeout=SERVER_SECONDS).close()
            return
        except OSError as error:
            failure = error
    raise ConnectionError(f"{name} {host} does not answer: {failure}") from failure


def _bypass_proxies() -> list[str]:
    """Exempt connections inside the run's own network from proxies; return the names of the proxy variables.

    gRPC, which the processes use, applies http_proxy and https_proxy to all hosts. An empty grpc_proxy disables that
    and nothing else: data and buckets are still read through the proxy.
    """
    proxies = sorted(
        name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy") and os.environ[name]
    )
    if not proxies or os.environ.get("grpc_proxy"):  # a user-set grpc_proxy applies
        return []
    os.environ["grpc_proxy"] = ""
    direct = [_metadata_server().split(":")[0], os.environ.get("KUBERNETES_SERVICE_HOST")]
    for name, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy")):
        hosts = [host.strip() for host in (os.environ.get(name) or os.environ.get(other) or "").split(",")]
        if "*" not in hosts:
            hosts += [host for host in direct if host and host not in hosts]
            os.environ[name] = ",".join(filter(None, hosts))
    jax.config.update("jax_check_proxy_envs", False)  # suppresses JAX's advice to unset these variables
    return proxies


# Values shared by the processes


def is_first() -> bool:
    """Return whether this is the process that logs and writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def coordination_client() -> Any:
    """Return JAX's client of the coordination service, whose key-value store all processes of a run share.

    No other code may use `jax._src`. Up to JAX 0.12 no public API reads or writes the store, and the public
    `multihost_utils` computes on the devices, so it cannot be used during tracing or in a thread.
    tests/core/test_hosts.py calls every method that the project uses: `key_value_set`, `key_value_dir_get` and
    `blocking_key_value_get`.

    Raises RuntimeError if JAX distributed is not initialised.
    """
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("a run of one process has no coordination service")
    return client


_values: dict[str, str] = {}  # results of `broadcast`, by key


def largest(number: int) -> int:
    """Return the largest of all processes' numbers. All must call it."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


def broadcast(key: str, make: Callable[[], str], timeout_s: float = 600) -> str:
    """Return on all processes the value of `make()` on process 0, which alone calls it.

    It does not compute on the devices, so it may be called during tracing. A key has one value for the whole run: later
    calls return the same value. In a run of one process, every call returns `make()`.

    Args:
      key: name of the value, the same on all processes.
      make: if it raises, process 0 raises the same error, and the others raise RuntimeError.
      timeout_s: how long the others wait for process 0, in seconds.

    Raises:
      TimeoutError: process 0 did not call this in time.
      RuntimeError: `make` failed on process 0.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return make()
    if key not in _values:
        name = f"t5x_lite/{key}"
        if jax.process_index() == 0:
            _values[key] = _publish(name, make)
        else:
            _values[key] = _receive(name, timeout_s)
    return _values[key]


def _publish(name: str, make: Callable[[], str]) -> str:
    try:
        value = make()
    except BaseException as error:
        coordination_client().key_value_set(name, f"error {type(error).__name__}: {error}", allow_overwrite=True)
        raise
    coordination_client().key_value_set(name, f"value {value}", allow_overwrite=True)
    return value


def _receive(name: str, timeout_s: float) -> str:
    try:
        answer = coordination_client().blocking_key_value_get(name, int(timeout_s * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise TimeoutError(f"process 0 has not given {name} within {timeout_s:g} s") from error
    kind, _, value = answer.partition(" ")
    if kind == "error":
        raise RuntimeError(f"{name} failed on process 0: {value}")
    return value


def abort_all_processes(code: int, error: BaseException | None = None) -> None:
    """Exit at once if the run has several processes, so that all of them end; print `error` and the cure.

    An ordinary exit would wait for the other processes, which wait for this one.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    if error is not None:
        traceback.print_exception(error)
        print(
            f"\nrun.py: process {jax.process_index()} of {jax.process_count()} stops because of the error above. If it "
            "mentions a connection or another task, another process was lost first: see its log. All processes stop "
            f"within {HEARTBEAT_SECONDS} s: start the same command again on all hosts to resume from the last "
            "checkpoint.",
            file=sys.stderr,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
