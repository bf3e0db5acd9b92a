"""The processes of one run: how they find one another, share a value, and stop when one of them is lost.

On Cloud TPUs, under Slurm's srun, under Open MPI and in Kubernetes jobs nothing has to be set: the launcher's variables
or JAX's own search say who the others are. Elsewhere three flags do. The flags always win. A process that finds no
others trains alone; one that should have others and cannot find them stops, because several runs would then write to
one MODEL_DIR. Must not know: models, data, runs.
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

from t5x_lite.errors import UserError

log = logging.getLogger("t5x_lite")

# A process that is not heard of for so long is taken for dead, and JAX then ends the others.
HEARTBEAT_SECONDS = 60
# A server that does not accept a connection within so long, so many times, is taken for absent. JAX's own requests wait
# for minutes.
SERVER_SECONDS, SERVER_ATTEMPTS = 3.0, 3
# What JAX says where it finds no cluster, and where it has been started already (in a notebook, say).
_NO_CLUSTER = "coordinator_address should be defined"
_STARTED = "must be called before any JAX"
# Slurm's step ids from here on are not steps of srun: the batch script, an interactive shell, ssh into a job.
_FIRST_RESERVED_STEP = 0xFFFFFFF0
_VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_ALONE = "--process_count=1 trains in this process alone"


def connect(
    coordinator_address: str | None = None, process_count: int | None = None, process_index: int | None = None
) -> None:
    """Joins the processes of this run; does nothing where there is one. To be called before JAX's first computation.

    Args:
      coordinator_address: HOST:PORT of process 0. With the two others it replaces every search.
      process_count: number of processes; 1 alone means that there are no others, whatever the environment says.
      process_index: of this process, from 0.

    Raises:
      ValueError: only some of the three are given, or they make no sense; or the environment says that there are
        several processes, and they cannot find one another.
      JaxRuntimeError: the others are known, and the connection to them fails. JAX itself ends a process that has waited
        for them for five minutes.
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
        # Only a step that agrees with the flags says which GPUs are this process's.
        agrees = step is not None and (step.tasks, step.index) == (process_count, process_index)
        gpus = step.gpus if step and agrees else None
        if (_number("OMPI_COMM_WORLD_SIZE"), _number("OMPI_COMM_WORLD_RANK")) == (process_count, process_index):
            gpus = _gpus(_number("OMPI_COMM_WORLD_LOCAL_RANK"), _number("OMPI_COMM_WORLD_LOCAL_SIZE"))
        _initialize(coordinator_address, process_count, process_index, gpus)
    elif _number("OMPI_COMM_WORLD_SIZE") > 1:
        # Before Slurm, which starts only Open MPI's daemons: its variables count them.
        _search("ompi", _gpus(_number("OMPI_COMM_WORLD_LOCAL_RANK"), _number("OMPI_COMM_WORLD_LOCAL_SIZE")))
    elif "OMPI_COMM_WORLD_SIZE" in os.environ:
        return  # JAX would leave a single process one GPU
    elif step := _slurm_step():
        if step.tasks > 1:
            _initialize(step.coordinator_address, step.tasks, step.index, step.gpus)
    elif "SLURM_JOB_ID" in os.environ:
        _check_srun_is_not_needed()
    else:
        _search()
    if proxies and jax.distributed.is_initialized() and is_first():
        log.warning("The processes connect to one another directly, not through %s.", ", ".join(proxies))


def _initialize(address: str, count: int, index: int, gpus: list[int] | None) -> None:
    """Joins without any search of JAX's, which would leave each task of Slurm one GPU, whatever the node has."""
    jax.distributed.initialize(
        address,
        count,
        index,
        local_device_ids=gpus,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _search(method: str | None = None, gpus: list[int] | None = None) -> None:
    """Joins the processes that JAX finds: by `method`, or by the first of its methods that fits the environment.

    Raises ValueError: the environment says that there are several processes, and JAX does not find them.
    """
    try:
        if method is None:
            _check_servers()
        with warnings.catch_warnings():
            # Six lines on every pod without the package; said below where it matters.
            warnings.filterwarnings("ignore", r"\s*Kubernetes environment detected", UserWarning)
            jax.distributed.initialize(
                local_device_ids=gpus,
                cluster_detection_method=method,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        if method is not None and gpus is None and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            for platform in ("cuda", "rocm"):  # JAX has taken one, by the process's index on its node
                jax.config.update(f"jax_{platform}_visible_devices", "all")
        return
    except Exception as error:  # each cluster's library has errors of its own
        if isinstance(error, jax.errors.JaxRuntimeError) or jax.distributed.is_initialized():
            raise  # the others were found, and are not reached
        failure = error
    reason = " ".join(str(failure).split())[:300] or type(failure).__name__
    if _NO_CLUSTER in reason:
        reason = "JAX knows no cluster with these variables"
    if several := _signs_of_several():
        sign, cure = several
        raise UserError(f"{sign}, but the other processes are not found: {reason}. {cure}; {_ALONE}") from failure
    if _NO_CLUSTER not in str(failure) and _STARTED not in str(failure):
        log.warning(
            "No other processes are found, and this one trains alone (%s: %s). If several are meant, %s.",
            type(failure).__name__,
            reason,
            _give("N", "I").replace("Give", "give"),
        )


def _signs_of_several() -> tuple[str, str] | None:
    """Returns what in the environment says that there are several processes, and what to do; None if nothing does."""
    for count, index in (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")):
        if _number(count) > 1:
            return f"{count}={os.environ[count]}", _give(f"${count}", f"${index}")
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if "," in os.environ.get(name, ""):
            hosts = len(os.environ[name].split(","))
            return f"{name} has {hosts} hosts", _give(str(hosts), "$TPU_WORKER_ID")
    if _number("MEGASCALE_NUM_SLICES") > 1:
        return f"MEGASCALE_NUM_SLICES={os.environ['MEGASCALE_NUM_SLICES']}", _give("N", "I")
    if _has_tpu_workers():
        return None  # one host of one slice, also in a Kubernetes job
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        return "JAX_COORDINATOR_ADDRESS is set", _give("N", "I")
    if "JOB_COMPLETION_INDEX" in os.environ:
        rights = "Install the kubernetes package and let the pod's service account read pods, jobs and services; or "
        return "JOB_COMPLETION_INDEX is set (an indexed Kubernetes job)", rights + _give(
            "N", "$JOB_COMPLETION_INDEX"
        ).replace("Give", "give")
    return None


def _give(count: str, index: str) -> str:
    return f"Give each process --coordinator_address=HOST:PORT --process_count={count} --process_index={index}"


def _number(name: str, default: int = 0) -> int:
    """The whole number that the environment variable `name` has; `default` if it is unset or anything else."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


# Slurm


@dataclasses.dataclass(frozen=True)
class _SlurmStep:
    """What srun says to one of its tasks."""

    tasks: int
    index: int
    coordinator_address: str
    gpus: list[int] | None


def _slurm_step() -> _SlurmStep | None:
    """Reads the step of srun that started this process; None if srun did not.

    SLURM_NTASKS, which JAX reads, is what sbatch was asked for; the step's own number is what srun has started. An
    interactive shell has variables of a step, too, but is one process, whatever number they give.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in os.environ for name in names) or _number("SLURM_STEP_ID") >= _FIRST_RESERVED_STEP:
        return None
    tasks = _number("SLURM_STEP_NUM_TASKS")
    if tasks == 1 and _number("SLURM_NTASKS") > 1:
        return None  # of a shell that was started with srun's --preserve-env
    # "gpu[03-05,9],login1" and "rack[0-1]n[2-3]": the first name takes the first number in each bracket.
    first = re.sub(r"\[([^],-]+)[^]]*]", r"\1", os.environ["SLURM_STEP_NODELIST"]).split(",")[0]
    # One port a job, as JAX chooses it: the highest 4096 are the least likely to be taken.
    port = os.environ.get("JAX_COORDINATOR_PORT") or 65535 - 2**12 + 1 + _number("SLURM_JOB_ID") % 2**12
    return _SlurmStep(
        tasks=tasks,
        index=_number("SLURM_PROCID"),
        coordinator_address=f"{first}:{port}",
        gpus=_gpus(_number("SLURM_LOCALID"), _tasks_on_this_node()),
    )


def _tasks_on_this_node() -> int:
    """Of the step; "2(x3),1" means three nodes with two tasks each, and one with one."""
    counts: list[int] = []
    for tasks, _, nodes in re.findall(r"(\d+)(\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(nodes or 1)
    node = _number("SLURM_NODEID")
    return counts[node] if node < len(counts) else 1


def _gpus(index: int, count: int) -> list[int] | None:
    """Chooses the GPUs of process `index` of `count` on one node.

    Returns positions among the GPUs that the process sees; None means all of them: there is one process on the node, or
    the launcher lets each see only its own.
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
    """Raises ValueError: a Slurm job of several tasks or nodes, in which srun did not start this process."""
    tasks = max(_number("SLURM_NTASKS"), _number("SLURM_NPROCS"))
    nodes = max(_number("SLURM_JOB_NUM_NODES"), _number("SLURM_NNODES"))
    if tasks > 1 or nodes > 1:
        count = f"{tasks} tasks" if tasks > 1 else f"{nodes} nodes"
        raise UserError(
            f"this Slurm job has {count}, but srun did not start this process, and nothing starts the others: "
            f"put srun before python, or ask for one task (sbatch --nodes=1 --ntasks=1); {_ALONE}"
        )


# Servers and proxies


def _has_tpu_workers() -> bool:
    return any(name in os.environ for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"))


def _metadata_server() -> str:
    return os.environ.get("GCE_METADATA_IP", "metadata.google.internal")  # the variable that JAX reads


def _check_servers() -> None:
    """Raises ConnectionError: a server that JAX would ask for the other processes does not accept connections."""
    if _has_tpu_workers():
        slices = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
        asks_metadata = any(name not in os.environ for name in slices)
    else:
        asks_metadata = "TPU_SKIP_MDS_QUERY" not in os.environ  # JAX sets it on machines without TPUs
    if asks_metadata:
        _check_server("the metadata server", _metadata_server(), 80)
    elif (
        not _has_tpu_workers()
        and (host := os.environ.get("KUBERNETES_SERVICE_HOST"))
        and importlib.util.find_spec("kubernetes")
    ):
        _check_server("the Kubernetes API", host, _number("KUBERNETES_SERVICE_PORT", 443))


def _check_server(name: str, host: str, port: int) -> None:
    host, _, own_port = host.partition(":") if host.count(":") == 1 else (host, "", "")  # not of an IPv6 address
    failure: OSError | None = None
    for _ in range(SERVER_ATTEMPTS):
        try:
            socket.create_connection((host, int(own_port or port)), timeout=SERVER_SECONDS).close()
            return
        except OSError as error:
            failure = error
    raise ConnectionError(f"{name} {host} does not answer: {failure}") from failure


def _bypass_proxies() -> list[str]:
    """Keeps what JAX asks of this run's own network off proxies, which do not know it; returns their variables' names.

    gRPC, through which the processes talk, takes http_proxy and https_proxy for all hosts. An empty grpc_proxy turns
    that off, and nothing else: data and buckets are still read through the proxy.
    """
    proxies = sorted(
        name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy") and os.environ[name]
    )
    if not proxies or os.environ.get("grpc_proxy"):  # one of gRPC's own is meant for it
        return []
    os.environ["grpc_proxy"] = ""
    direct = [_metadata_server().split(":")[0], os.environ.get("KUBERNETES_SERVICE_HOST")]
    for name, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy")):
        hosts = [host.strip() for host in (os.environ.get(name) or os.environ.get(other) or "").split(",")]
        if "*" not in hosts:
            hosts += [host for host in direct if host and host not in hosts]
            os.environ[name] = ",".join(filter(None, hosts))
    jax.config.update("jax_check_proxy_envs", False)  # a warning that these variables may have to be unset
    return proxies


# What the processes share


def is_first() -> bool:
    """Whether this is the process that logs and writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def coordination_client() -> Any:
    """Returns JAX's client of the coordination service, whose key-value store all processes of a run share.

    The only place that may import from `jax._src`: up to JAX 0.12 nothing public reads or writes the store, and what is
    public in its place (`multihost_utils`) computes on the devices, so that it can be used neither while a program is
    traced nor by a thread. tests/core/test_hosts.py calls every method that the project uses: `key_value_set`,
    `key_value_dir_get` and `blocking_key_value_get`.

    Raises RuntimeError: there is one process.
    """
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("there is one process, which has no coordination service")
    return client


_values: dict[str, str] = {}  # of `broadcast`, by key


def broadcast(key: str, make: Callable[[], str], timeout_s: float = 600) -> str:
    """Returns what `make()` returns on process 0, on all processes; only process 0 calls it.

    It does not compute on the devices, and may be called while a program is traced. A key has one value for the length
    of a run: later calls return the same. Where there is one process, every call is `make()`.

    Args:
      key: names the value; the same on all processes.
      make: may raise: process 0 then raises the same, and the others RuntimeError as soon as they ask.
      timeout_s: how long the others wait for process 0.

    Raises:
      TimeoutError: process 0 has not come here in time.
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
    """Ends this process at once, if there are others, which then end too; of an error, says what to do.

    An ordinary exit would wait for the others, which wait for this one.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    if error is not None:
        traceback.print_exception(error)
        print(
            f"\nrun.py: process {jax.process_index()} of {jax.process_count()} stops for the error above. If it speaks "
            "of a connection or of another task, another process was lost first: its own log says why. All processes "
            f"stop within {HEARTBEAT_SECONDS} s; start the same command again on all hosts, and the run goes on from "
            "its last checkpoint.",
            file=sys.stderr,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
