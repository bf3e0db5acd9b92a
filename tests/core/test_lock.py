"""One run in a MODEL_DIR: the second is refused."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest

from t5x_lite.cli import run_lock

HOLDS = """
import os, signal, sys
from t5x_lite.cli import run_lock
with run_lock.exclusive(sys.argv[1]):
    print("held", flush=True)
    signal.pause()
"""


def test_a_second_run_is_refused_until_the_first_has_ended_in_whatever_way(tmp_path):
    model_dir = str(tmp_path / "new" / "run")
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, model_dir], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    said = rf"in use: process {holder.pid} on {re.escape(socket.gethostname())} .* since \d{{4}}-"
    for _ in range(2):
        with pytest.raises(ValueError, match=said), run_lock.exclusive(model_dir):
            pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    for _ in range(2):
        with run_lock.exclusive(model_dir):
            assert json.loads((tmp_path / "new/run/lock").read_text())["pid"] == os.getpid()
            with pytest.raises(ValueError, match="in use"), run_lock.exclusive(model_dir):
                pass


def test_a_model_dir_that_cannot_be_made_is_refused_and_a_bucket_is_not_locked(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"MODEL_DIR = '.*/file/run' cannot be written"),
        run_lock.exclusive(f"{tmp_path}/file/run"),
    ):
        pass
    with run_lock.exclusive("gs://bucket/run"), run_lock.exclusive("gs://bucket/run"):
        pass
