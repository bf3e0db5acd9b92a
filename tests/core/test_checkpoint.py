"""Checkpoints: bit for bit, whole or not there, kept by age and by score, and clear about what does not fit."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.serialization import serialization

from t5x_lite import checkpoint
from t5x_lite.checkpoint import saving


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any


class Moments(NamedTuple):
    count: Any
    v_row: Any
    v: Any


class Position:
    """A data iterator that is nothing but its position."""

    def __init__(self, at: int = 0):
        self.at = at

    def save(self, path: str) -> None:
        with open(os.path.join(path, "at"), "w") as file:
            file.write(str(self.at))

    def restore(self, path: str) -> None:
        self.at = int((epath.Path(path) / "at").read_text())


def make_state(seed: int = 0, vocab: int = 7) -> State:
    """All that a real state has: nested dicts, tuples, NamedTuples, empty nodes, None, leaves of size 0, bfloat16."""
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    params = {
        "decoder": {"layers": {"out": {"kernel": jax.random.normal(next(keys), (2, 3, 5))}}},
        "token_embedder": {"embedding": jax.random.normal(next(keys), (vocab, 5)).astype(jnp.bfloat16)},
    }
    rows = jax.tree.map(
        lambda p: jnp.zeros((0,)) if p.ndim == 2 else jax.random.normal(next(keys), p.shape[:-1]), params
    )
    v = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
    return State(jnp.int32(seed + 3), params, (optax.EmptyState(), Moments(jnp.int32(4), rows, v), None))


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def identical(a: Any, b: Any) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A MODEL_DIR with one checkpoint, of step 3; tests only read it."""
    model_dir = tmp_path_factory.mktemp("model")
    checkpointer = saving.Checkpointer(model_dir, info={"model": {"vocab_size": 7, "mlp_activations": ("relu",)}})
    checkpointer.save(3, make_state(), Position(42))
    checkpointer.close()
    return model_dir


def test_state_and_data_position_come_back_bit_for_bit(saved):
    checkpointer = saving.Checkpointer(saved)
    position = Position()
    other = make_state(seed=1)
    restored = checkpointer.restore(checkpointer.latest_step(), abstract(other), position)
    assert identical(restored, make_state())
    assert not identical(restored, other)
    assert position.at == 42
    assert isinstance(restored.opt_state[1], Moments)
    checkpointer.close()


def test_saved_state_is_that_of_the_call_though_donated_and_the_position_moves_on(tmp_path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 2 + 1, state), donate_argnums=0)
    checkpointer = saving.Checkpointer(tmp_path)
    state, position = make_state(), Position(1)
    assert checkpointer.save(5, state, position)
    state = overwrite(state)
    position.at = 2
    restored = checkpointer.restore(5, abstract(state), position)
    assert identical(restored, make_state())
    assert not identical(restored, state)
    assert position.at == 1
    assert not checkpointer.save(5, state, position), "a step is saved once"
    checkpointer.close()


def test_restores_onto_another_mesh(tmp_path):
    """On as many devices as there are, from columns spread over them to rows spread over them."""
    count = len(jax.devices())
    mesh = jax.make_mesh((count,), ("fsdp",), axis_types=(AxisType.Auto,))
    columns, rows = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P("fsdp"))
    kernel = jnp.arange(6.0 * count**2).reshape(2 * count, 3 * count)
    state = State(jnp.int32(1), {"kernel": jax.device_put(kernel, columns)}, {})
    checkpointer = saving.Checkpointer(tmp_path)
    checkpointer.save(1, state)
    wanted = abstract(state).replace(params={"kernel": jax.ShapeDtypeStruct(kernel.shape, jnp.float32, sharding=rows)})
    restored = checkpointer.restore(1, wanted)
    assert restored.params["kernel"].sharding == rows != columns
    assert identical(restored, state)
    assert checkpoint.restore_params(tmp_path, wanted.params)["kernel"].sharding == rows
    checkpointer.close()


SCORES = {10: 0.5, 20: 0.9, 30: 0.7, 40: float("nan"), 50: None, 60: 0.6}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 1}, [60]),
        pytest.param({"keep_last": 2}, [50, 60], marks=pytest.mark.slow),
        pytest.param({"keep_last": None}, [10, 20, 30, 40, 50, 60], marks=pytest.mark.slow),
        pytest.param({"keep_last": 1, "keep_best_metric": "squad/f1"}, [20, 60], marks=pytest.mark.slow),
        pytest.param(
            {"keep_last": 1, "keep_best_metric": "squad/f1", "keep_best": 2}, [20, 30, 60], marks=pytest.mark.slow
        ),
        ({"keep_last": 1, "keep_best_metric": ["squad/f1", "squad/em"]}, [20, 40, 60]),
        ({"keep_last": 2, "keep_best_metric": "squad/f1", "best_mode": "min"}, [10, 50, 60]),
    ],
)
def test_keeps_the_last_and_the_best_on_disk_also_over_a_restart(tmp_path, options, kept):
    state = State(jnp.int32(0), {"w": jnp.ones(3)}, {})
    for steps in ((10, 20, 30), (40, 50, 60)):
        checkpointer = saving.Checkpointer(tmp_path, **options)
        for step in steps:
            scores = {"squad/f1": SCORES[step], "squad/em": -abs(step - 40)}  # of which 40 is the best
            checkpointer.save(step, state, metrics=None if SCORES[step] is None else scores)
        checkpointer.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == kept


def test_a_state_is_saved_although_its_keep_best_metric_is_missing(tmp_path, caplog):
    with saving.Checkpointer(tmp_path, keep_best_metric="squad/F1") as checkpointer:
        assert checkpointer.save(1, make_state(), metrics={"squad/f1": 1.0})
    assert re.search("step 1 has no squad/F1, only squad/f1", caplog.text)


def test_a_step_evaluated_after_its_save_counts_among_the_best(tmp_path):
    with saving.Checkpointer(tmp_path, keep_best_metric="a/f1") as checkpointer:
        checkpointer.save(1, make_state(), metrics=None)
        checkpointer.wait()
        checkpointer.add_scores(1, {"a/f1": 0.9})
    with saving.Checkpointer(tmp_path, keep_best_metric="a/f1") as checkpointer:
        for step, score in ((2, 0.5), (3, 0.7), (4, 0.1)):
            checkpointer.save(step, make_state(), metrics={"a/f1": score})
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 4]


KILLED = """
import os, sys, jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
from t5x_lite.checkpoint import saving
from t5x_lite.checkpoint import data_state
class State:
    step, params, opt_state = jnp.int32(2), {"w": jnp.ones(3)}, {}
class Position:
    def save(self, path): open(path + "/at", "w").write("1")
checkpointer = saving.Checkpointer(sys.argv[1])
data_state.DataPositionHandler.finalize = lambda self, directory: os._exit(9)  # all written, nothing committed
checkpointer.save(2, State(), Position())
checkpointer.wait()
"""


def test_a_save_killed_before_its_commit_is_as_if_it_had_never_begun(tmp_path):
    checkpointer = saving.Checkpointer(tmp_path)
    checkpointer.save(1, make_state(), Position(7))
    checkpointer.close()
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == 9
    left = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert any(name.startswith("2.") for name in left), left
    assert checkpoint.choose_start(tmp_path).step == 1
    checkpointer = saving.Checkpointer(tmp_path)
    assert checkpointer.latest_step() == 1
    assert identical(checkpointer.restore(1, abstract(make_state()), Position()), make_state())
    checkpointer.save(2, make_state(), Position(8))
    checkpointer.close()
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2"}


def test_parameters_alone_from_every_kind_of_path(saved, monkeypatch):
    params = make_state().params
    monkeypatch.chdir(saved.parent)
    for path in (saved, saved / "checkpoints", saved / "checkpoints" / "3", saved.name, f"{saved.name}/checkpoints/3"):
        raw = checkpoint.restore_params(path)
        assert identical(raw, params)
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(raw))
        assert identical(checkpoint.restore_params(path, abstract(make_state()).params), params)


def test_parameters_alone_take_the_dtype_asked_for_and_the_whole_state_refuses_to(saved):
    wanted = make_state()
    wanted.params["token_embedder"]["embedding"] = wanted.params["token_embedder"]["embedding"].astype(jnp.float32)
    restored = checkpoint.restore_params(saved, abstract(wanted).params)
    assert identical(restored, wanted.params)
    checkpointer = saving.Checkpointer(saved)
    with pytest.raises(ValueError, match=r"embedding: checkpoint \[7, 5\] bfloat16, this run \[7, 5\] float32"):
        checkpointer.restore(3, abstract(wanted))
    checkpointer.close()


def test_a_mismatch_lists_missing_extra_and_other_shapes_and_the_config_behind_it(saved):
    wanted = make_state(vocab=9).params
    wanted["decoder"]["layers"] = {"wi": {"kernel": jnp.ones((2, 5))}}
    with pytest.raises(ValueError, match="do not fit this run") as error:
        checkpoint.restore_params(saved, wanted, info={"model": {"vocab_size": 9, "mlp_activations": ("relu",)}})
    assert str(error.value).splitlines()[1:-1] == [
        "  missing (in this run, not in the checkpoint): 1",
        "    decoder/layers/wi/kernel [2, 5]",
        "  extra (in the checkpoint, not in this run): 1",
        "    decoder/layers/out/kernel [2, 3, 5]",
        "  different: 1",
        "    token_embedder/embedding: checkpoint [7, 5], this run [9, 5]",
        "  model.vocab_size: checkpoint 7, this run 9",
    ]


def test_another_optimizer_is_named_as_such(saved):
    checkpointer = saving.Checkpointer(saved)
    wanted = abstract(make_state())
    with pytest.raises(ValueError, match=r"(?s)optimizer state .* opt_state/1/v/decoder.*fresh optimizer"):
        checkpointer.restore(3, wanted.replace(opt_state={"mu": wanted.params}))
    checkpointer.close()


def test_a_data_iterator_is_told_that_there_is_no_position(tmp_path):
    with saving.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state())
        with pytest.raises(FileNotFoundError, match="data/at"):  # what this iterator does then
            checkpointer.restore(1, abstract(make_state()), Position())


def test_a_state_is_saved_although_its_data_position_cannot_be(tmp_path, caplog):
    class Broken(Position):
        def save(self, path: str) -> None:
            raise OSError("no room")

    with saving.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(1, make_state(), Broken())
        checkpointer.wait()
        assert checkpointer.all_steps() == [1]
    assert re.search("Step 1 is saved without its position.*no room", caplog.text)


def test_which_checkpoint_and_why(saved, tmp_path):
    fresh = checkpoint.choose_start(tmp_path / "new")
    assert (fresh.kind, fresh.path, fresh.step) == ("fresh", None, None)
    initial = checkpoint.choose_start(tmp_path / "new", saved)
    assert (initial.kind, initial.step) == ("initial", None)
    assert initial.path == str(saved / "checkpoints" / "3")
    assert initial.path in initial.reason
    assert "fresh optimizer" in initial.reason
    resumed = checkpoint.choose_start(saved, tmp_path / "elsewhere")
    assert (resumed.kind, resumed.step) == ("resume", 3)
    assert "MODEL_DIR already holds this run" in resumed.reason
    assert f"INITIAL_CHECKPOINT_PATH='{tmp_path / 'elsewhere'}' is not read" in resumed.reason
    assert not (tmp_path / "new").exists(), "choosing writes nothing"


def test_a_path_without_a_checkpoint_says_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"INITIAL_CHECKPOINT_PATH .*does not exist"):
        checkpoint.choose_start(tmp_path, tmp_path / "none")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"holds no finished checkpoint\. It holds: checkpoints, config\.json\. Give"
    ):
        checkpoint.choose_start(tmp_path / "new", tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        checkpoint.restore_params(tmp_path)


def test_info_explains_a_checkpoint(saved):
    assert checkpoint.read_info(saved) == {
        "model": {"vocab_size": 7, "mlp_activations": ["relu"]},
        "step": 3,
        "processes": 1,
        "evaluated": False,
        "checksums": True,
    }
    assert json.loads((saved / "checkpoints/3/info/metadata").read_text())["step"] == 3


def test_orbax_is_quiet_and_others_are_not(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")  # which absl sets when flags are parsed, as the command does
    checkpointer = saving.Checkpointer(tmp_path, keep_best_metric="a/b")
    checkpointer.save(1, make_state(), Position())
    checkpointer.close()
    logging.getLogger("absl").info("of somebody else")
    assert [record.message for record in caplog.records if record.name == "absl"] == ["of somebody else"]


def test_what_asyncio_says_of_orbax_is_left_out_and_what_it_says_of_others_is_not(caplog):
    """On a full disk it logs a traceback for each array whose writing Orbax has left alone."""
    for raises in (lambda: serialization.estimate_write_memory_footprint(None), lambda: 1 / 0):
        try:
            raises()
        except Exception:
            logging.getLogger("asyncio").exception("exception was never retrieved")
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


def test_bad_settings_are_refused(tmp_path, unchecked_types):
    for options in ({"keep_last": 0}, {"keep_best": 0}, {"best_mode": "most"}):
        with pytest.raises(ValueError, match="must be"):
            saving.Checkpointer(tmp_path, **options)


# Damage


def harmed(model_dir, to, name: str, how: str) -> None:
    """A copy of a MODEL_DIR with one file deleted, cut in half, or with one bit other than it was."""
    shutil.copytree(model_dir, to)
    file = to / name
    content = bytearray(file.read_bytes())
    if how == "deleted":
        file.unlink()
        return
    if how == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["deleted", "cut", "flipped"])
def test_damage_to_any_file_is_found_and_named(saved, tmp_path, how):
    folder = saved / "checkpoints" / "3"
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert {name.split("/")[0] for name in files} >= {"params", "optimizer", "data", "info", "checksums.json"}
    for number, name in enumerate(files):
        if name == "commit_success.txt":  # only a bucket needs it: there a checkpoint without it does not count
            continue
        harmed(folder, tmp_path / str(number), name, how)
        found = checkpoint.damage(epath.Path(tmp_path / str(number)))
        assert found, (name, how)
        assert name in found[0] or name == "checksums.json", found
    assert checkpoint.damage(epath.Path(folder)) == []


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A MODEL_DIR with checkpoints of steps 10 and 20; tests only read it."""
    model_dir = tmp_path_factory.mktemp("two")
    with saving.Checkpointer(model_dir, keep_last=2) as checkpointer:
        for step in (10, 20):
            checkpointer.save(step, make_state(seed=step), Position(step))
    return model_dir


def test_the_newest_sound_checkpoint_is_used_and_the_damaged_one_put_aside(two, tmp_path, caplog):
    run = tmp_path / "run"
    name = next(str(path.relative_to(two)) for path in (two / "checkpoints/20/params").rglob("ocdbt.process_0/d/*"))
    harmed(two, run, name, "flipped")
    with pytest.raises(ValueError, match=rf"checkpoints/20 is damaged: {name[15:]}: other content.*--strict"):
        checkpoint.choose_start(run, strict=True)
    start = checkpoint.choose_start(run)
    assert (start.step, start.damaged) == (10, (20,))
    assert f"checkpoints/20 is damaged: {name[15:]}: other content" in caplog.text
    assert (run / "checkpoints/20").exists(), "choosing writes nothing"
    for again in ("damaged/20", "damaged/20-2"):
        with saving.Checkpointer(run, keep_last=2, damaged=start.damaged) as checkpointer:
            position = Position()
            assert identical(checkpointer.restore(10, abstract(make_state()), position), make_state(seed=10))
            assert position.at == 10
            assert checkpointer.save(20, make_state(seed=20), Position(20))
        assert (run / again / "params").exists()
        assert checkpoint.choose_start(run, strict=True).step == 20


def test_what_cannot_be_read_is_not_read(two, tmp_path):
    harmed(two, tmp_path / "run", "checkpoints/20/params/manifest.ocdbt", "cut")
    with pytest.raises(ValueError, match=r"damaged: params/manifest.ocdbt: \d+ bytes of \d+.* Give an earlier"):
        checkpoint.restore_params(tmp_path / "run")
    assert identical(checkpoint.restore_params(tmp_path / "run/checkpoints/10"), make_state(seed=10).params)
    assert checkpoint.choose_start(tmp_path / "run", parts=("optimizer",)).step == 20
    shutil.rmtree(tmp_path / "run/checkpoints/10/params")
    with pytest.raises(ValueError, match=r"All checkpoints .* are damaged: 20, 10.* and 8 more"):
        checkpoint.choose_start(tmp_path / "run")


def test_damaged_scores_of_an_earlier_checkpoint_do_not_stop_a_run(tmp_path):
    options: dict[str, Any] = {"keep_last": 2, "keep_best_metric": "a/b"}
    with saving.Checkpointer(tmp_path, **options) as checkpointer:
        for step in (10, 20):
            checkpointer.save(step, make_state(), metrics={"a/b": 1.0})
    (tmp_path / "checkpoints/10/metrics/metrics").write_text('{"a/b')
    start = checkpoint.choose_start(tmp_path)
    assert (start.step, start.damaged) == (20, (10,))
    with saving.Checkpointer(tmp_path, damaged=start.damaged, **options) as checkpointer:
        assert checkpointer.all_steps() == [20]


def test_a_checkpoint_from_before_there_were_checksums_is_taken_as_it_is(two, tmp_path):
    harmed(two, tmp_path / "run", "checkpoints/20/checksums.json", "deleted")
    assert checkpoint.choose_start(tmp_path / "run").damaged == (20,)
    info = tmp_path / "run/checkpoints/20/info/metadata"
    info.write_text(json.dumps({"step": 20}))
    assert checkpoint.choose_start(tmp_path / "run").step == 20
    info.unlink()
    assert checkpoint.choose_start(tmp_path / "run").step == 10
