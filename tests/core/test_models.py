"""What every model must hold to (`interface.Model`), whatever its family."""

import ast
import dataclasses
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from models import CONFIGS, batch, lengths
from repeats import fast

import t5x_lite
from t5x_lite import checkpoint, convert, plan, sharding
from t5x_lite.checkpoint import saving
from t5x_lite.errors import UserError
from t5x_lite.inference.decode import Decoding
from t5x_lite.model import interface
from t5x_lite.model.families import model_of
from t5x_lite.training import optim, step
from t5x_lite.training.partitioner import Partitioner

REPO = pathlib.Path(__file__).resolve().parents[2]
OPTIMIZER = optim.make_optimizer(optim.adafactor(), optim.constant(0.01))

every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
a_model_of_each_family = pytest.mark.parametrize("config", fast(CONFIGS, "encoder-decoder", "BERT"))


def partitioner(config, **mesh) -> Partitioner:
    return Partitioner(config, OPTIMIZER, mesh=mesh or {"fsdp": 8}, batch_rows={"BATCH_SIZE": 8})


def train_step(config, of: Partitioner):
    return of.train_step(config=config, optimizer=OPTIMIZER)


def key():
    return jax.eval_shape(lambda: jax.random.key(0))


@every_model
def test_the_interface_is_implemented(config):
    model = model_of(config)
    assert isinstance(model, interface.Model)
    members = [name for name in vars(interface.Model) if not name.startswith("_")]
    assert len(members) + len(interface.Model.__annotations__) <= 8


@pytest.mark.parametrize("config", fast(CONFIGS, "decoder", "BERT"))
def test_the_abstract_state_is_that_of_the_real_one(config):
    of = partitioner(config)
    state = step.init_state(config, OPTIMIZER, jax.random.key(0), of.abstract)

    def described(tree):
        return [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(tree)]

    assert jax.tree.structure(state) == jax.tree.structure(of.abstract)
    assert described(state) == described(of.abstract)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))


@a_model_of_each_family
@pytest.mark.parametrize("pack", fast([True, False], "True"))
def test_the_step_takes_what_the_converter_makes(config, pack):
    of, rows = partitioner(config), batch(config, pack=pack)
    said = model_of(config).feature_converter(pack).batch(lengths(config), 8)
    assert {name: (x.shape[1:], x.dtype) for name, x in rows.items()} == {n: (s[1:], d) for n, (s, d) in said.items()}
    shapes = {name: jax.ShapeDtypeStruct(*x, sharding=of.batch_sharding) for name, x in said.items()}
    state, metrics = jax.eval_shape(train_step(config, of), of.abstract, shapes, key())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), of.abstract)
    assert {"loss", "grad_norm", "target_tokens", "skipped"} <= metrics.keys()


@a_model_of_each_family
def test_flops_are_those_of_the_traced_step(config):
    config = dataclasses.replace(config, remat="none")
    of = partitioner(config)
    shapes = {
        name: jax.ShapeDtypeStruct(*x, sharding=of.batch_sharding)
        for name, x in model_of(config).feature_converter(True).batch(lengths(config), 8).items()
    }
    traced = plan.matmul_flops(train_step(config, of).trace(of.abstract, shapes, key()).jaxpr)
    assert traced == model_of(config).flops(8, lengths(config))


@every_model
def test_a_model_comes_back_from_a_checkpoint_and_from_hugging_face(config, tmp_path):
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), convert.abstract_params(config))
    saving.save_params(tmp_path / "ours", params, info=convert.info(config))
    again, restored = convert.read(tmp_path / "ours")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    loaded = {"BertConfig": "LoadedBert", "T5EncoderConfig": "LoadedEncoder"}.get(type(config).__name__, "LoadedModel")
    assert type(t5x_lite.load(tmp_path / "ours")).__name__ == loaded

    if getattr(config, "decoder_only", False):
        with pytest.raises(UserError, match="Hugging Face has no decoder-only T5"):
            convert.convert(tmp_path / "ours", tmp_path / "theirs", "huggingface")
        return
    convert.convert(tmp_path / "ours", tmp_path / "theirs", "huggingface")
    again, restored = convert.read(tmp_path / "theirs")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, restored, params)


@every_model
def test_a_checkpoint_without_a_model_type_loads(config, tmp_path):
    params = {"token_embedder": {"embedding": np.zeros((2, 3), np.float32)}}
    saving.save_params(tmp_path / "old", params, info={"model": dataclasses.asdict(config)})
    assert convert._own_config(tmp_path / "old") == config
    saving.save_params(tmp_path / "other", params, info={**convert.info(config), "model_type": "OtherConfig"})
    with pytest.raises(UserError, match=r"OtherConfig.*none of these types: T5Config, BertConfig"):
        convert._own_config(tmp_path / "other")


@a_model_of_each_family
def test_what_a_model_predicts_compiles_for_a_batch(config):
    of = partitioner(config)
    predictor = model_of(config).predictor(of, Decoding(), 5, seed=0)
    words, commands = predictor.next_steps("python run.py", "--gin.INITIAL_CHECKPOINT_PATH=''")
    assert words and all(command.startswith("python run.py ") for command in commands)
    if "mlm" in getattr(config, "heads", ()):
        with pytest.raises(UserError, match="cannot decode"):
            predictor.lower(8, lengths(config))
        for mode in ("infer", "score"):
            with pytest.raises(UserError, match=f"--mode={mode}.*makes no predictions"):
                predictor.check(mode, has_task=True)
    else:
        predictor.check("infer", has_task=True)
        assert "main" in predictor.lower(8, lengths(config)).as_text()


def test_head_params_are_names_of_parameters():
    for config in CONFIGS.values():
        names = checkpoint.flat(step.abstract_params(config, sharding.make_mesh()))
        heads = {name.split("/")[0] for name in names if re.search(model_of(config).head_params, name)}
        assert heads == set(getattr(config, "heads", [config.head] if hasattr(config, "head") else ()))


# What may be removed.

NOT_OF_THE_CORE = ["tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text", "t5", "gin"]
REMOVABLE = ["t5x_lite.bert", "t5x_lite.t5_encoder", "t5x_lite.plan", "t5x_lite.report", "t5x_lite.export"]
REMOVABLE += ["t5x_lite.linear_probe", "t5x_lite.t5gemma"]


def imported_by(file: pathlib.Path) -> set[str]:
    """Modules that are imported as soon as the file is."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("removed", REMOVABLE)
def test_nothing_else_imports_what_may_be_removed(removed):
    inside = REPO / removed.replace(".", "/")
    # The first two inside of functions, for the command that needs it; the third is the command.
    allowed = {
        "t5x_lite.plan": "cli/plan.py",
        "t5x_lite.report": "convert/push.py",
        "t5x_lite.linear_probe": "features.py",
    }
    for file in [REPO / "run.py", *(REPO / "t5x_lite").rglob("*.py"), *(REPO / "tasks").rglob("*.py")]:
        exception = file == REPO / "t5x_lite" / allowed.get(removed, "")
        if inside not in (file.parent, file.with_suffix("")) and not exception:
            found = {name for name in imported_by(file) if f"{name}.".startswith(f"{removed}.")}
            assert not found, f"{file} imports {found}"


STEP = """
import sys
from unittest import mock
for name in {removed!r}:
    sys.modules[name] = None
import t5x_lite
assert "jax" not in sys.modules  # importing the package loads nothing
import jax, numpy as np, optax
from t5x_lite import options, sharding
from t5x_lite.model import families
from t5x_lite import run_config
from t5x_lite.cli import evaluate, infer, inspect_batch, plan, task_setup, train
from t5x_lite.training import optim, step
from t5x_lite.model.config import T5Config
assert list(families.config_types()) == ["T5Config"], families.config_types()
assert "BertConfig" not in options.gin_defaults() and task_setup.tool("report") is None
config = T5Config(
    d_model=8, d_ff=12, num_heads=2, head_dim=4, num_encoder_layers=0, num_decoder_layers=1, vocab_size=32)
optimizer = optim.make_optimizer(optax.scale(-1.0), optim.constant(0.01))
mesh = sharding.make_mesh()
abstract = step.abstract_state(config, optimizer, mesh)
state = step.init_state(config, optimizer, jax.random.key(0), abstract)
batch = {{name: np.ones(shape, dtype) for name, (shape, dtype) in
          families.model_of(config).feature_converter(True).batch({{"inputs": 4, "targets": 3}}, 2).items()}}
state, metrics = jax.jit(step.train_step, static_argnames=("config", "optimizer"))(
    state, batch, jax.random.key(1), config=config, optimizer=optimizer)
assert np.isfinite(metrics["loss"]) and int(state.step) == 1
"""


@pytest.mark.slow
def test_a_step_trains_with_all_of_it_removed_and_without_tensorflow():
    done = subprocess.run(
        [sys.executable, "-c", STEP.format(removed=REMOVABLE + NOT_OF_THE_CORE)],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
