"""Saves that fail, on one host or all, on a disk or in a bucket: said, given up, and nothing else is harmed."""

import asyncio
import contextlib
import errno
import os
import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import forks
import jax
import jax.numpy as jnp
import pytest
from core.test_checkpoint import Position, State, make_state
from etils import epath
from orbax.checkpoint._src.serialization import serialization
from repeats import fast

from t5x_lite import checkpoint
from t5x_lite.checkpoint import checksums, saving
from t5x_lite.errors import UserFileError


def bad_disk(monkeypatch, failing: set[int], where: str) -> None:
    """Makes the saves of some steps fail: when they begin, when they write, or just before they are committed."""
    if where == "begin":
        save = saving.ocp.CheckpointManager.save
        monkeypatch.setattr(
            saving.ocp.CheckpointManager,
            "save",
            lambda self, step, **args: full(step in failing) or save(self, step, **args),
        )
    elif where == "write":
        paths = type(epath.Path(""))
        write = paths.write_bytes
        monkeypatch.setattr(paths, "write_bytes", lambda self, x: full(x == b"x") or write(self, x))
        save = Position.save
        monkeypatch.setattr(
            Position,
            "save",
            lambda self, path: Path(path, "x").write_text("x") if self.at in failing else save(self, path),
        )
    else:
        write = checksums.write
        monkeypatch.setattr(checksums, "write", lambda f: full(int(f.name.split(".")[0]) in failing) or write(f))


def full(is_full: bool) -> None:
    if is_full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", fast(["begin", "write", "commit"], "write"))
def test_a_failed_save_is_logged_and_harms_nothing(tmp_path, monkeypatch, caplog, where):
    bad_disk(monkeypatch, {20, 30, 50}, where)
    with saving.Checkpointer(tmp_path, keep_last=1) as checkpointer:
        for step, newest in ((10, 10), (20, 10), (30, 10), (40, 40), (50, 40), (60, 60)):
            checkpointer.save(step, make_state(), Position(step))
            with contextlib.suppress(OSError):
                checkpointer.wait()
            assert checkpointer.all_steps() == [newest]
            names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
            assert {name for name in names if name.isdecimal()} == {str(newest)}
    assert os.listdir(tmp_path / "checkpoints") == ["60"], "nothing is left of those that failed"
    said = [record.message for record in caplog.records if "could not be saved" in record.message]
    assert [line.split()[1] for line in said] == ["20", "30", "50"]
    assert "No space left" in said[0] and not any(record.exc_info for record in caplog.records)
    assert checkpoint.choose_start(tmp_path, strict=True).step == 60


def test_saves_that_go_on_failing_end_the_run_and_so_does_the_last(tmp_path, monkeypatch):
    bad_disk(monkeypatch, {20, 30, 40, 50}, "commit")
    with (
        pytest.raises(OSError, match=r"3 saves in a row .* Step 40 could .* No space left .* newest .* is of step 10"),
        saving.Checkpointer(tmp_path, keep_last=1) as checkpointer,
    ):
        for step in (10, 20, 30, 40, 50):
            checkpointer.save(step, make_state(), Position(step))
    with (
        pytest.raises(UserFileError, match=r"^Step 20 could not be saved .* start the same command again"),
        saving.Checkpointer(tmp_path, keep_last=1) as checkpointer,
    ):
        checkpointer.save(20, make_state(), Position(20))
    with pytest.raises(KeyError), saving.Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(20, make_state(), Position(20))
        raise KeyError("what happened first is what is said")
    assert checkpoint.choose_start(tmp_path, strict=True).step == 10


@pytest.mark.slow
def test_parts_still_being_written_when_another_has_failed_leave_nothing(tmp_path, monkeypatch):
    """Orbax says so at once; TensorStore would make the folder anew."""
    write = serialization.async_serialize_from_host

    async def slowly(*args, **options):
        await asyncio.sleep(0.3)
        return await write(*args, **options)

    monkeypatch.setattr(serialization, "async_serialize_from_host", slowly)
    bad_disk(monkeypatch, {20}, "write")
    with saving.Checkpointer(tmp_path) as checkpointer:
        for step in (10, 20):
            checkpointer.save(step, make_state(), Position(step))
        with pytest.raises(OSError, match="Step 20 could not be saved"):
            checkpointer.wait()
        time.sleep(0.5)
        assert os.listdir(tmp_path / "checkpoints") == ["10"]
        checkpointer.save(30, make_state(), Position(30))


def test_what_must_be_there_before_a_checkpoint_is_or_the_save_has_failed(tmp_path, caplog):
    before = []

    def publish():
        before.append((tmp_path / "checkpoints" / str(10 * len(before) + 10)).exists())
        full(len(before) == 2)

    with saving.Checkpointer(tmp_path, keep_last=None, before_commit=publish) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(step, make_state(), Position(step))
        checkpointer.wait()
        assert checkpointer.all_steps() == [10, 30]
    assert before == [False] * 3
    assert "Step 20 could not be saved" in caplog.text and "No space left" in caplog.text


def test_files_that_the_system_refuses_to_write(tmp_path, caplog):
    """The kernel's own refusal, in TensorStore's words. By a limit, which stands for a full disk."""
    state = State(jnp.int32(1), {"w": jax.random.normal(jax.random.key(0), (100_000,))}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with saving.Checkpointer(tmp_path, keep_last=1) as checkpointer:
        for step, limit in ((10, limits[0]), (20, 100_000), (30, limits[0])):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            try:
                checkpointer.save(step, state)
                with contextlib.suppress(OSError):
                    checkpointer.wait()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert checkpointer.all_steps() == [10 if step == 20 else step]
    assert "Step 20 could not be saved" in caplog.text and "File too large" in caplog.text


ONE_OF_TWO = """
import contextlib, errno, logging, os, sys, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
folder, port, here = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, here)
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from t5x_lite.checkpoint import saving
logging.basicConfig(level=logging.WARNING)
rows = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
one = NamedSharding(rows.mesh, PartitionSpec())
class State:
    step, w = jax.jit(lambda: (jnp.int32(2), jnp.ones((4, 3))), out_shardings=(one, rows))()
    params, opt_state = {"w": w}, {}
class Position:
    def save(self, path):
        full(step == 30 and here == 1)
        content = "bad" if step == 20 and here == 1 else "good"
        open(f"{path}/{here}", "w").write(content)
def full(is_full):
    if is_full:
        raise OSError(errno.ENOSPC, "full")
paths = type(epath.Path(""))
write = paths.write_bytes
paths.write_bytes = lambda self, content: full(content == b"bad") or write(self, content)
with saving.Checkpointer(folder, keep_last=None, before_commit=lambda: full(step == 50)) as checkpointer:
    for step in (10, 20, 30, 40, 50, 60):
        checkpointer.save(step, State(), Position())
        with contextlib.suppress(OSError):
            checkpointer.wait()
    print(checkpointer.all_steps())
"""


@pytest.mark.slow
def test_where_one_of_two_processes_cannot_write_both_skip_the_save_or_the_position(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, str(tmp_path), port, str(here)],
            env=os.environ | forks.devices(1) | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for here in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert [process.returncode for process in started] == [0, 0], said
    for here, (out, log) in enumerate(said):
        assert out.splitlines()[-1] == "[10, 30, 40, 60]", log
        failed = re.findall(r"Step (\d+) could not be saved; training continues \((.*)\)\.", log)
        assert [step for step, _ in failed] == ["20", "50"], log
        failed += re.findall(r"Step (30) is saved without its position in the data \((.*)\)", log)
        assert all(("full" if here == of else f"process {of} could not write") in why
                   for of, (_, why) in zip((1, 0, 1), failed, strict=True)), failed  # fmt: skip
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["10", "30", "40", "60"]


def test_what_a_bucket_needs_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(ValueError, match=r"gs://bucket/run/checkpoints: .*pip install google-cloud-storage"):
        checkpoint.choose_start("gs://bucket/run")
