"""How processes find one another: by the environment variables that clusters set, and small stand-ins for servers."""

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forks
import jax
import pytest

from t5x_lite import distributed
from t5x_lite.cli import main as run

REPO = Path(run.__file__).parents[2]
CLUSTERS = ("SLURM_", "OMPI_", "PMI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_", "JAX_COORD", "JAX_LOCAL", "GCE_")
ONE_NODE = {
    "SLURM_JOB_ID": "70000",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu7",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_NTASKS": "1",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_GPUS_ON_NODE": "8",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}
TWO_NODES = ONE_NODE | {
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NTASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
}
SIXTEEN_TASKS = TWO_NODES | {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}
BATCH_STEP = {
    "SLURM_JOB_ID": "70000",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def plain(environment: dict[str, str]) -> dict[str, str]:
    """The environment without what this machine's own cluster or proxy sets in it."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith((*CLUSTERS, "CUDA_VIS", "ROCR_", "HIP_")) and "proxy" not in name.lower()
    }


@pytest.fixture
def environment(monkeypatch) -> Callable[[dict[str, str]], None]:
    """Sets variables in an environment that has none of a cluster's; JAX's own are put back afterwards."""
    base = plain(dict(os.environ))
    for name in os.environ.keys() - base.keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # as JAX sets it where there are no TPUs
    for name in ("grpc_proxy", "no_proxy", "NO_PROXY"):  # which `connect` may set: the fixture takes them back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()] and None


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The calls of `jax.distributed.initialize`: address, count, index, devices, method."""
    calls: list[tuple] = []

    def initialize(
        address=None, count=None, index=None, *, local_device_ids, cluster_detection_method, heartbeat_timeout_seconds
    ):
        calls.append((address, count, index, local_device_ids, cluster_detection_method))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return calls


# Slurm


def test_one_slurm_task_uses_all_gpus_of_its_node(environment, calls):
    environment(ONE_NODE)
    distributed.connect()
    assert calls == []  # JAX binds a task to one GPU only when it joins others


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-08]", "gpu07"),
        ("gpu7,gpu8", "gpu7"),
        ("gpu[001,007-015],login2", "gpu001"),
        ("rack[0-1]node[2-3]", "rack0node2"),
        ("gpu7.example.org", "gpu7.example.org"),
    ],
)
def test_one_slurm_task_on_each_node_uses_all_gpus(environment, calls, nodes, first):
    environment(TWO_NODES | {"SLURM_STEP_NODELIST": nodes})
    distributed.connect()
    assert calls == [(f"{first}:{61440 + 70000 % 4096}", 2, 1, None, "deactivate")]


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({}, [3]),
        ({"SLURM_GPUS_ON_NODE": ""}, [3]),
        ({"CUDA_VISIBLE_DEVICES": ""}, [3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x4)"}, [6, 7]),  # eight GPUs among four tasks
        ({"SLURM_STEP_TASKS_PER_NODE": "15,1"}, None),  # alone on the second node
        ({"CUDA_VISIBLE_DEVICES": "3"}, None),  # --gpus-per-task: each task sees its own
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": "3"}, None),
        ({"JAX_LOCAL_DEVICE_IDS": "5"}, None),  # which JAX reads itself
    ],
)
def test_slurm_tasks_on_one_node_share_its_gpus(environment, calls, variables, gpus):
    environment(SIXTEEN_TASKS | variables)
    distributed.connect()
    assert calls == [("gpu07:61808", 16, 11, gpus, "deactivate")]


@pytest.mark.parametrize(
    "variables",
    [
        BATCH_STEP,
        BATCH_STEP | {"SLURM_NTASKS": "", "SLURM_NPROCS": "", "SLURM_JOB_NUM_NODES": "2"},
        SIXTEEN_TASKS | {"SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_PROCID": "0"},  # salloc's interactive shell
        ONE_NODE | {"SLURM_NTASKS": "8"},
    ],
)
def test_a_slurm_job_of_several_tasks_without_srun_is_an_error(environment, calls, variables):
    environment(variables)
    with pytest.raises(ValueError, match=r"(8 tasks|16 tasks|2 nodes).* srun before python.*--process_count=1"):
        distributed.connect()
    distributed.connect(process_count=1)
    assert calls == []


def test_without_srun_the_command_says_one_line(environment, calls, capsys, monkeypatch):
    environment(BATCH_STEP)
    monkeypatch.setattr(run, "configure", lambda *_: None)
    for module in ("cli.train", "metrics.metric_logger"):  # slow to import, and not reached
        monkeypatch.setitem(sys.modules, f"t5x_lite.{module}", types.ModuleType(module))
    assert run.main(["run.py"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("run.py: this Slurm job has 8 tasks") and error.count("\n") == 1


def test_a_slurm_job_of_one_task_needs_no_srun(environment, calls):
    environment(BATCH_STEP | {"SLURM_NTASKS": "1", "SLURM_NPROCS": "1"})
    distributed.connect()
    assert calls == []


# Flags


@pytest.mark.parametrize("variables", [ONE_NODE, TWO_NODES, SIXTEEN_TASKS, BATCH_STEP])
def test_flags_win_over_slurm(environment, calls, variables):
    environment(variables)
    distributed.connect("head:1234", 4, 2)
    assert calls == [("head:1234", 4, 2, None, "deactivate")]


def test_flags_that_agree_with_slurm_keep_its_gpus(environment, calls):
    environment(SIXTEEN_TASKS)
    distributed.connect("head:1234", 16, 11)
    assert calls == [("head:1234", 16, 11, [3], "deactivate")]


def test_flags_that_agree_with_open_mpi_keep_each_process_its_gpus(environment, calls):
    environment({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"})
    environment({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    distributed.connect("head:1234", 4, 1)
    distributed.connect("head:1234", 4, 2)
    assert [call[3] is not None for call in calls] == [True, False]
    assert 1 in calls[0][3] and 0 not in calls[0][3]


@pytest.mark.parametrize("variables", [SIXTEEN_TASKS, {"OMPI_COMM_WORLD_SIZE": "2"}, {"JOB_COMPLETION_INDEX": "0"}, {}])
def test_a_process_count_of_one_trains_alone(environment, calls, variables):
    environment(variables)
    distributed.connect(process_count=1)
    assert calls == []


# Other launchers


def test_open_mpi_is_asked_before_slurm(environment, calls, monkeypatch):
    environment(SIXTEEN_TASKS | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"})
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")  # which Open MPI needs not
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    distributed.connect()
    assert calls == [(None, None, None, [4, 5, 6, 7], "ompi")]


def test_one_open_mpi_process_on_each_node_uses_all_gpus(environment, monkeypatch):
    environment({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    before = jax.config._read("jax_cuda_visible_devices")

    def initialize(**options):
        assert options["local_device_ids"] is None
        jax.config.update("jax_cuda_visible_devices", "0")  # as JAX does with what it finds

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    try:
        distributed.connect()
        assert jax.config._read("jax_cuda_visible_devices") == "all"
    finally:
        jax.config.update("jax_cuda_visible_devices", before)


def test_one_open_mpi_process_trains_alone(environment, calls):
    environment({"OMPI_COMM_WORLD_SIZE": "1"})
    distributed.connect()
    assert calls == []


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "--process_index=$OMPI_COMM_WORLD_RANK"),
        ({"PMI_SIZE": "2"}, "--process_index=$PMI_RANK"),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, "--process_count=4 --process_index=$TPU_WORKER_ID"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES=2"),
        ({"JOB_COMPLETION_INDEX": "0"}, "Install the kubernetes package"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS is set"),
    ],
)
def test_several_processes_that_are_not_found_are_an_error(environment, monkeypatch, variables, part):
    environment(variables | {"GCE_METADATA_IP": "127.0.0.1:9"})

    def initialize(**_):
        raise KeyError("some variable")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=re.escape(part)):
        distributed.connect()


def test_others_that_are_found_but_not_reached_are_an_error(environment, monkeypatch):
    environment({})

    def initialize(**_):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(jax.errors.JaxRuntimeError):
        distributed.connect()


# Real processes


def start(script: str, variables: dict[str, str], *paths: Path) -> subprocess.Popen:
    """A Python process that says what it has found as JSON; its warnings and JAX's are lines on stderr."""
    environment = {
        **plain(dict(os.environ)),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, (REPO, *paths))),
        **forks.devices(1),
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen) -> tuple[Any, str]:
    """What a process has printed as JSON, and what it has written to stderr."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out), err


CONNECT = """
import json, os, sys, jax
from t5x_lite import distributed
{}
error = None
try:
    distributed.connect()
except ValueError as e:
    error = str(e)
print(json.dumps([error, jax.distributed.is_initialized(), jax.config._read("jax_cuda_visible_devices")]))
sys.stdout.flush()
os._exit(0)
"""
ON_A_TPU = "os.environ.pop('TPU_SKIP_MDS_QUERY', None)"  # JAX sets it where it sees no chips


def test_a_plain_machine_trains_alone_in_silence():
    (error, joined, _), log = ended(start(CONNECT.format(""), {"KUBERNETES_SERVICE_HOST": "127.0.0.1"}))
    assert (error, joined, log) == (None, False, "")  # also in a pod without the kubernetes package


@pytest.fixture
def kubernetes(tmp_path) -> Path:
    """A folder with a `kubernetes` package whose API server denies everything."""
    package = tmp_path / "kubernetes"
    package.mkdir()
    (package / "__init__.py").write_text(
        "class ApiException(Exception):\n"
        "    status, reason = 403, 'Forbidden'\n"
        "class CoreV1Api:\n"
        "    def list_namespaced_pod(self, **_): raise ApiException()\n"
        "class exceptions: pass\n"
        "exceptions.ApiException = ApiException\n"
        "class client: pass\n"
        "client.CoreV1Api = client.BatchV1Api = CoreV1Api\n"
        "client.exceptions = exceptions\n"
        "class config:\n"
        "    def load_incluster_config(): pass\n"
    )
    return tmp_path


IN_A_POD = """
from jax._src.clusters.k8s_cluster import K8sCluster
K8sCluster._namespace = classmethod(lambda cls: "default")
"""


@pytest.fixture
def pod(servers) -> dict[str, str]:
    server = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(servers.port)}
    return server | {"HOSTNAME": "localhost"}


def test_a_pod_without_rights_trains_alone_and_says_so(kubernetes, pod):
    (error, joined, _), log = ended(start(CONNECT.format(IN_A_POD), pod, kubernetes))
    assert (error, joined, log.count("\n")) == (None, False, 1)
    for part in ("trains alone", "403 - Forbidden", "--coordinator_address=HOST:PORT"):
        assert part in log


def test_a_pod_of_an_indexed_job_without_rights_says_what_to_set(kubernetes, pod):
    indexed = pod | {"JOB_COMPLETION_INDEX": "0"}
    (error, joined, _), log = ended(start(CONNECT.format(IN_A_POD), indexed, kubernetes))
    assert not joined and log == ""
    for part in ("indexed Kubernetes job", "403 - Forbidden", "read pods", "--process_count=1"):
        assert part in error


def test_a_tpu_vm_without_metadata_server_trains_alone_and_says_so():
    (error, joined, _), log = ended(
        start(CONNECT.format(ON_A_TPU), {"JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": "127.0.0.1:9"})
    )
    assert (error, joined, log.count("\n")) == (None, False, 1)
    assert "the metadata server 127.0.0.1 does not answer" in log and "trains alone" in log


@pytest.mark.parametrize("server", ["GCE_METADATA_IP", "KUBERNETES_SERVICE_HOST"])
def test_a_server_that_does_not_answer_is_not_waited_for(environment, calls, caplog, monkeypatch, kubernetes, server):
    environment({server: "127.0.0.1", "KUBERNETES_SERVICE_PORT": "9"})
    monkeypatch.syspath_prepend(kubernetes)
    if server == "GCE_METADATA_IP":
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY")

    def absent(address, timeout):
        assert timeout is not None and timeout < 10
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", absent)
    distributed.connect()
    assert calls == [] and "does not answer: timed out" in caplog.text


METADATA = {"agent-worker-number": "0", "worker-network-endpoints": "localhost"}  # one host


class Servers:
    """An HTTP server that is a metadata server to those who ask it directly, and a proxy to the others."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.proxied: list[str] = []
        servers = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                (servers.asked if self.path.startswith("/") else servers.proxied).append(self.path)
                body = METADATA.get(self.path.rsplit("/", 1)[-1], "").encode()
                self.send_response(200 if self.path.startswith("/") else 503)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_CONNECT(self) -> None:
                servers.proxied.append(self.path)
                self.send_error(503)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.server.shutdown()
    servers.server.server_close()


def test_the_metadata_server_is_asked_past_the_proxy(servers):
    servers.asked.clear(), servers.proxied.clear()
    variables = {
        "JAX_FORCE_TPU_INIT": "1",
        "GCE_METADATA_IP": f"127.0.0.1:{servers.port}",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "http_proxy": f"http://127.0.0.1:{servers.port}",
    }
    (error, joined, _), log = ended(start(CONNECT.format(ON_A_TPU), variables))
    assert (error, joined) == (None, True)  # a Cloud TPU VM of one host
    assert servers.asked and not servers.proxied
    assert log.count("\n") == 1 and "not through http_proxy" in log


def test_what_must_not_go_through_a_proxy_is_added_to_what_others_keep_off(environment, calls):
    environment({"HTTPS_PROXY": "http://proxy:1", "no_proxy": "example.org", "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    distributed.connect("head:1234", 2, 1)
    assert os.environ["grpc_proxy"] == "" and os.environ["HTTPS_PROXY"] == "http://proxy:1"
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,metadata.google.internal,10.0.0.1"


@pytest.mark.parametrize("variables", [{}, {"http_proxy": "http://a:1", "grpc_proxy": "http://b:1"}])
def test_no_proxy_or_one_for_grpc_stays_as_it_is(environment, calls, variables):
    environment(variables)
    distributed.connect("head:1234", 2, 1)
    assert os.environ.get("grpc_proxy") == variables.get("grpc_proxy") and "no_proxy" not in os.environ


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


PAIR = """
import json, os, sys, jax
from t5x_lite import distributed
distributed.HEARTBEAT_SECONDS = 10
distributed.connect()
client, index = distributed.coordination_client(), jax.process_index()
report = {"count": jax.process_count(), "index": index, "gpus": jax.config._read("jax_cuda_visible_devices")}

# The fence: all that the project uses of JAX's client
client.key_value_set(f"fence/{index}", "first", allow_overwrite=True)
client.key_value_set(f"fence/{index}", f"of {index}", allow_overwrite=True)
client.key_value_set(f"done/{index}", "yes")
report["other"] = [client.blocking_key_value_get(f"done/{1 - index}", 60_000)]
report["folder"] = sorted(client.key_value_dir_get("fence/"))
try:
    client.blocking_key_value_get("never", 1)
except jax.errors.JaxRuntimeError as error:
    report["late"] = str(error).split(":")[0]

calls = []
def make():
    calls.append(index)
    return f"made on {index} \\u00e9"
def fail():
    raise OSError("no room")
report["broadcast"] = [distributed.broadcast("value", make), distributed.broadcast("value", make), calls]
try:
    distributed.broadcast("failure", fail)
except Exception as error:
    report["failure"] = [type(error).__name__, str(error)]
if index == 1:
    try:
        distributed.broadcast("unheard", make, timeout_s=0.01)
    except TimeoutError as error:
        report["timeout"] = str(error)
print(json.dumps(report))
sys.stdout.flush()
jax.distributed.shutdown()
"""


@pytest.fixture(scope="module")
def pair(servers) -> list[tuple[dict, str]]:
    """Two processes that Slurm has started on two nodes (here: one) behind a proxy; what they say, and their logs."""
    servers.proxied.clear()
    variables = TWO_NODES | {
        "SLURM_STEP_NODELIST": "localhost",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "http_proxy": f"http://127.0.0.1:{servers.port}",
    }
    places = [{"SLURM_PROCID": str(index), "SLURM_NODEID": str(index)} for index in (0, 1)]
    processes = [start(PAIR, variables | place) for place in places]
    return [ended(process) for process in processes]


def test_two_slurm_tasks_join_with_all_their_gpus(pair):
    assert [(report["count"], report["index"], report["gpus"]) for report, _ in pair] == [(2, 0, "all"), (2, 1, "all")]


def test_processes_join_past_the_proxy(pair, servers):
    assert servers.proxied == []
    first, second = ([line for line in log.splitlines() if "Gloo" not in line] for _, log in pair)
    assert len(first) == 1 and "not through http_proxy" in first[0] and second == []


def test_the_coordination_client_has_all_methods_that_are_used(pair):
    for report, _ in pair:
        assert report["other"] == ["yes"]
        assert report["folder"] == [["fence/0", "of 0"], ["fence/1", "of 1"]]
        assert report["late"] == "DEADLINE_EXCEEDED"


def test_broadcast_gives_all_processes_the_value_of_the_first(pair):
    first, second = (report["broadcast"] for report, _ in pair)
    assert first == ["made on 0 é", "made on 0 é", [0]]
    assert second == ["made on 0 é", "made on 0 é", []]


def test_a_broadcast_that_fails_fails_everywhere(pair):
    (first, _), (second, _) = pair
    assert first["failure"] == ["OSError", "no room"]
    assert second["failure"][0] == "RuntimeError" and "OSError: no room" in second["failure"][1]
    assert "unheard within 0.01 s" in second["timeout"]


def test_broadcast_in_one_process_only_calls_make():
    assert [distributed.broadcast("here", lambda value=value: value) for value in "ab"] == ["a", "b"]
    with pytest.raises(RuntimeError, match="one process"):
        distributed.coordination_client()


def test_private_parts_of_jax_are_used_in_one_place():
    files = [REPO / "run.py", *REPO.glob("t5x_lite/**/*.py"), *REPO.glob("tasks/**/*.py")]
    uses = [(file.name, line.strip()) for file in files for line in file.read_text().splitlines() if "jax._src" in line]
    code = [use for use in uses if "import" in use[1]]
    assert code == [("distributed.py", "from jax._src import distributed")]
    assert {name for name, _ in uses} == {"distributed.py"}
