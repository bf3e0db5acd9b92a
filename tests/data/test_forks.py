"""tests/forks.py: who starts a fork sees what a new interpreter would show."""

import os
import subprocess
import sys

import forks
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("end", ["sys.exit(3)", "sys.exit('said')", "1 / 0", "os.kill(os.getpid(), 9)"])
def test_arguments_folder_variables_streams_and_exit_code(end, tmp_path):
    code = f"import os, sys; print(sys.argv, os.getcwd(), os.environ['ONE'], sys.stdin.read(), flush=True); {end}"
    options = {"cwd": tmp_path, "env": os.environ | {"ONE": "1"}, "input": "two", "capture_output": True, "text": True}
    ours, theirs = (
        subprocess.run([*python, "-c", code, "a b"], **options) for python in (forks.python(), [sys.executable])
    )
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


@pytest.mark.slow
def test_who_kills_it_kills_the_fork():
    command = [*forks.python(), "-c", "import time; print('begun', flush=True); time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        process.kill()
        assert process.stdout.read() == ""  # which the fork holds open while it lives
