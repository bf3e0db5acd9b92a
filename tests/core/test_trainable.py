"""Which parameters train: what is frozen stays as it is, bit for bit, and costs nothing but its memory."""

import dataclasses
import functools
import itertools
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from core.test_step import CONFIG, make_batch, program, run
from flax import traverse_util
from repeats import fast

import t5x_lite
from t5x_lite import checkpoint, convert, sharding
from t5x_lite.checkpoint import saving
from t5x_lite.errors import UserError
from t5x_lite.model.config import ADAPTER_PARAMS
from t5x_lite.model.t5 import T5, T5Config, forward
from t5x_lite.training import optim, step
from t5x_lite.training.freezing import ParameterFilter, gradual_unfreezing

slow = pytest.mark.slow
ADAPTERS = (("/adapter/|norm/scale", True),)
LORA = (("_lora/", True),)
FROZEN_ENCODER = (("^encoder/|^token_embedder/", False), ("", True))
BASE = T5Config(768, 3072, 12, 64, 12, 12, ("relu",), tie_embeddings=True)


def trained_by(trainable, transform=None):
    return optim.make_optimizer(transform or optim.adafactor(), optim.constant(1e-2), trainable=trainable)


def flat(tree) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


logits = jax.jit(forward, static_argnums=0)


def changed(before, after):
    return {name: bool(np.any(np.asarray(x) != flat(after)[name])) for name, x in flat(before).items()}


@pytest.mark.parametrize(
    ("change", "rules", "transform", "mesh"),
    [
        pytest.param(vars(tiny.SMALL), (("/mlp/", False), ("", True)), optim.adafactor, (1, 1, 1), id="frozen_mlp"),
        pytest.param({}, FROZEN_ENCODER, optim.adafactor, (1, 1, 1), id="frozen_encoder", marks=slow),
        pytest.param({"adapter_size": 24}, ADAPTERS, optim.adafactor, (1, 2, 1), id="adapters", marks=slow),
        pytest.param({"lora_rank": 2}, LORA, optim.adamw, (1, 1, 1), id="lora", marks=slow),
        pytest.param({}, (("norm/scale$", True),), optim.adamw, (1, 1, 1), id="norms", marks=slow),
    ],
)
def test_frozen_parameters_stay_bit_for_bit_and_have_no_optimizer_state(change, rules, transform, mesh):
    config, optimizer = dataclasses.replace(CONFIG, **change), trained_by(rules, transform())
    before = tiny.random_state(optimizer, program(config, mesh, optimizer, step.T5_LOSS, 1)[1])
    after, metrics, compilations = run(config, mesh=mesh, steps=2, optimizer=optimizer)
    trained, frozen = (set(flat(part)) for part in optimizer.trainable.partition(before.params))
    assert trained and frozen and compilations == 1
    # Of two matrices, of which the second is 0 at first, the first moves in the second step only.
    assert changed(before.params, after.params) == {n: n in trained for n in trained | frozen}
    held = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(after.opt_state)]
    assert not [leaf for leaf in held if any(leaf.endswith(f"/{name}") for name in frozen)]
    assert all(any(leaf.endswith(f"/{name}") for leaf in held) for name in trained)
    assert metrics[0]["trainable_params"] == sum(flat(before.params)[name].size for name in trained)


def test_frozen_parameters_are_stored_in_fewer_bits():
    config = dataclasses.replace(CONFIG, **vars(tiny.SMALL) | {"lora_rank": 2})
    states, losses = [], []
    for dtype in ("float32", "bfloat16", "int8"):
        optimizer = optim.make_optimizer(optim.adafactor(), optim.constant(1e-2), trainable=LORA, frozen_dtype=dtype)
        after, metrics, _ = run(config, mesh=(1, 1, 1), steps=2, optimizer=optimizer)
        states.append(after.params)
        losses.append([float(step_metrics["loss"]) for step_metrics in metrics])
    dtypes = {name: str(leaf.dtype) for name, leaf in flat(states[1]).items()}
    assert dtypes == {name: "float32" if "_lora/" in name else "bfloat16" for name in flat(states[0])}
    kernels = {name for name in flat(states[0]) if name.endswith("kernel") and "_lora/" not in name}
    dtypes |= dict.fromkeys(kernels, "int8") | {f"{name}/scale": "float32" for name in kernels}
    got = {name.removesuffix("/int8"): str(leaf.dtype) for name, leaf in flat(states[2]).items()}
    assert kernels and got == dtypes
    for other in losses[1:]:
        np.testing.assert_allclose(losses[0], other, rtol=2e-2)
        assert losses[0] != other
    whole = optim.make_optimizer(optim.adafactor(), optim.constant(1e-2), frozen_dtype="bfloat16")
    with pytest.raises(UserError, match="all parameters train"):
        step.abstract_state(config, whole, sharding.make_mesh(1, devices=jax.devices()[:1]))


@slow
def test_a_part_of_the_parameters_trains_as_it_would_if_only_the_rest_had_no_step():
    """Same gradients and same moments as when all is trained: after one step of Adafactor, the same numbers."""
    whole, _, _ = run(steps=1, optimizer=trained_by(None))
    part, _, _ = run(steps=1, optimizer=trained_by(FROZEN_ENCODER), num_microbatches=2)
    for name, x in flat(part.params).items():
        same = np.allclose(x, flat(whole.params)[name], rtol=1e-4, atol=1e-5)
        assert same == (not name.startswith(("encoder/", "token_embedder/"))), name


def flops(rules):
    """Of one layer each, unrolled: XLA counts one round of a loop, after what nothing uses has been dropped."""
    config = dataclasses.replace(CONFIG, scan_layers=False, num_encoder_layers=1, num_decoder_layers=1)
    optimizer = optim.make_optimizer(optax.scale(-1.0), optim.constant(1e-2), trainable=rules)
    abstract = step.abstract_state(config, optimizer, sharding.make_mesh(1, devices=jax.devices()[:1]))
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in make_batch().items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    train_step = functools.partial(step.train_step, config=config, optimizer=optimizer)
    return jax.jit(train_step).lower(abstract, batch, key).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_frozen_parameters_have_no_gradient_computed():
    whole, norms, encoder = flops(None), flops((("norm/scale", True),)), flops(FROZEN_ENCODER)
    assert norms < 0.8 * whole  # a third of the products are kernels' gradients
    assert encoder < 0.8 * whole  # there is no backward pass through the encoder


def test_rules_that_mean_nothing_are_refused_with_the_nearest_names():
    params = tiny.random_params(CONFIG)
    for rules, said in [
        ((("encoder/layer/mlp", True),), "encoder/layer/mlp.* nearest: encoder/layers/mlp"),
        ((("encoder/", False),), "trains nothing"),
        ((("", False), ("decoder", True)), "trains nothing"),
    ]:
        with pytest.raises(ValueError, match=said):
            ParameterFilter(rules).partition(params)
    with pytest.raises(ValueError, match="not a regular expression"):
        optim.make_optimizer(optim.adafactor(), optim.constant(1e-3), trainable=(("(", True),))
    trained, frozen = ParameterFilter((("mlp/wo", False), ("decoder/layers/mlp", True))).partition(params)
    assert set(flat(trained)) == {"decoder/layers/mlp/wi_0/kernel", "decoder/layers/mlp/wi_1/kernel"}  # the first wins
    assert len(flat(trained)) + len(flat(frozen)) == len(flat(params))


def test_gradual_unfreezing_is_that_of_the_paper(golden_json):
    said = golden_json("training")["gradual_unfreezing"]
    layers = gradual_unfreezing(said["fine_tune_steps"], said["episodes"]).layers
    assert layers is not None
    for at, _, blocks in said["examples"]:
        assert np.flatnonzero(layers(at, 12)).tolist() == blocks
    for k, first in enumerate(said["first_step_of_episode"]):
        assert int(layers(first, 12).sum()) == k + 1
        assert first == 0 or int(layers(first - 1, 12).sum()) == k
    assert [int(layers(n, 8).sum()) for n in (0, said["fine_tune_steps"] - 1)] == [1, 8]  # fewer blocks than episodes
    assert [int(layers(n, 24).sum()) for n in (0, 21846)] == [2, 4]
    with pytest.raises(ValueError, match="episodes = 12"):
        gradual_unfreezing(11)


@slow
def test_layers_thaw_from_the_top_in_one_program():
    optimizer = trained_by(gradual_unfreezing(total_steps=6, episodes=3))  # 2 layers of the encoder, 3 of the decoder
    states, programs = [tiny.random_state(optimizer, program(CONFIG, (1, 1, 1), optimizer, step.T5_LOSS, 1)[1])], 0
    for steps in (2, 4, 5):
        state, metrics, compilations = run(steps=steps, optimizer=optimizer)
        states.append(state)
        programs += compilations
    assert programs == 1
    counts = [int(m["trainable_params"]) for m in metrics]
    assert counts[0] == counts[1] < counts[2] == counts[3] < counts[4] == step.param_count(states[0].params)

    def moved(before, after, stack):
        kernels = [s.params[stack]["layers"]["mlp"]["wo"]["kernel"] for s in (before, after)]
        return [bool(np.any(np.asarray(a) != b)) for a, b in zip(*kernels, strict=True)]

    thawed = [(moved(a, b, "encoder"), moved(a, b, "decoder")) for a, b in itertools.pairwise(states)]
    assert thawed == [
        ([False, True], [False, False, True]),
        ([True, True], [False, True, True]),
        ([True, True], [True, True, True]),
    ]
    always = {name: x for name, x in changed(states[0].params, states[1].params).items() if "/layers/" not in name}
    assert len(always) == 6 and all(always.values())  # embedding, output, final norms, relative biases
    v = states[1].opt_state.v_row["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert np.all(np.asarray(v).sum(axis=1) > 0)  # moments of a layer that is still frozen are kept current


@pytest.mark.parametrize("d", fast([32, 128, 512, 2048], "512"))
def test_adapters_have_the_papers_parameter_counts(d):
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def shapes(config):
        return jax.eval_shape(lambda t: step.nn.unbox(T5(config).init(jax.random.key(0), t, t)["params"]), token)

    config = dataclasses.replace(BASE, adapter_size=d)
    adapters = {32: 1_179_648, 128: 4_718_592, 512: 18_874_368, 2048: 75_497_472}[d]
    assert step.param_count(shapes(config)) == 222_903_552 + adapters
    assert ParameterFilter(ADAPTERS).count(shapes(config)) == adapters + 47_616
    assert ParameterFilter((("norm/scale", True),)).count(shapes(BASE)) == 47_616


@pytest.mark.parametrize(
    ("plain", "change"),
    [
        pytest.param(tiny.SMALL, {"lora_rank": 3}),
        *(pytest.param(CONFIG, {way: 5}, marks=slow) for way in ("adapter_size", "lora_rank")),
    ],
)
def test_an_adapted_model_starts_as_its_base_and_does_not_stay_it(plain, change):
    config, mesh = dataclasses.replace(plain, **change), sharding.make_mesh(1, devices=jax.devices()[:1])
    base = tiny.random_params(plain)
    abstract = step.abstract_state(config, trained_by(None), mesh)
    names = set(flat(abstract.params)) - set(flat(base))
    new = step.init_params(config, jax.random.key(0), abstract, names)
    adapted = traverse_util.unflatten_dict(flat(base) | new, sep="/")
    added = set(new)
    assert added == names and len(added) > 1
    batch = make_batch(config=plain)
    np.testing.assert_array_equal(logits(config, adapted, batch), logits(plain, base, batch))
    moved = traverse_util.unflatten_dict(
        {name: x + 0.1 * (name in added) for name, x in flat(adapted).items()}, sep="/"
    )
    got = logits(config, moved, batch)
    assert got.shape == (*batch["decoder_target_tokens"].shape, plain.vocab_size)
    assert np.abs(np.asarray(got - logits(plain, base, batch))).max() > 0.1


def test_the_ways_to_adapt_are_a_gin_file_apart():
    from t5x_lite.cli import gin_files

    found = {}
    for file in sorted((gin_files.GIN_CONFIGS / "adapt").glob("*.gin")):
        files = ["models/t5_1_0/base.gin", "runs/finetune.gin", str(file)]
        way = gin_files.configure(files, ["INITIAL_CHECKPOINT_PATH = None"])
        trainable = way.optimizer.trainable
        mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
        params = step.abstract_state(way.model, way.optimizer, mesh).params
        found[file.stem] = [int(trainable.count(params, at)) for at in (0, way.train_steps - 1)]
    table = 32128 * 768
    assert found == {
        "full": [222_903_552] * 2,
        "adapters": [4_718_592 + 47_616] * 2,
        "lora": [36 * 2 * 2 * 768 * 8] * 2,  # 36 attentions, query and value, two matrices
        "bias_norm": [47_616 + 2 * 12 * 32] * 2,
        "frozen_encoder": [12 * (8 * 768 * 768 + 2 * 768 * 3072 + 3 * 768) + 768 + 12 * 32] * 2,
        "gradual_unfreezing": [
            pytest.approx(table + 12 * 768 * 768 + 4 * 768 * 3072 + 5 * 768 + 2 * (768 + 12 * 32), rel=1e-6),
            pytest.approx(222_903_552, rel=1e-6),
        ],
    }


# Checkpoints of what trains


@dataclasses.dataclass
class Saved:
    """A base, and two steps of adapters on it: their state, and where they are saved."""

    base: Any
    base_path: Any
    config: T5Config
    optimizer: optim.Optimizer
    state: Any
    model_dir: Any


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Saved:
    folder = tmp_path_factory.mktemp("adapted")
    base = tiny.random_params(CONFIG)
    saving.save_params(folder / "base", base, info={"model": dataclasses.asdict(CONFIG)})
    config = dataclasses.replace(CONFIG, lora_rank=2)
    optimizer = trained_by(LORA, optim.adafactor(multiply_by_parameter_scale=False))
    state, _, _ = run(config, steps=2, optimizer=optimizer)
    info = {"model": dataclasses.asdict(config), "base": checkpoint.base_of(folder / "base")}
    trained = flat(optimizer.trainable.partition(state.params)[0])
    with saving.Checkpointer(folder / "run", info=info, trained=trained) as saver:
        saver.save(2, state)
    return Saved(base, folder / "base", config, optimizer, state, folder / "run")


def bytes_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
def test_a_checkpoint_of_what_trains_comes_back_over_its_base(adapted, tmp_path):
    own, base = adapted.model_dir / "checkpoints" / "2" / "params", adapted.base_path / "params"
    assert bytes_of(own) < 0.2 * bytes_of(base)
    abstract = step.abstract_state(adapted.config, adapted.optimizer, sharding.make_mesh(1, devices=jax.devices()[:1]))
    with saving.Checkpointer(adapted.model_dir) as saver:
        resumed = saver.restore(2, abstract)
    jax.tree.map(np.testing.assert_array_equal, resumed, adapted.state)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore_params(adapted.model_dir), adapted.state.params)
    config, params = convert.read(adapted.model_dir)
    assert config == adapted.config
    jax.tree.map(np.testing.assert_array_equal, params, adapted.state.params)


@pytest.mark.slow
def test_hugging_face_gets_lora_within_its_kernels_and_no_adapters(adapted, tmp_path):
    convert.convert(adapted.model_dir, tmp_path / "hub", "huggingface")
    config, params = convert.read(tmp_path / "hub", tie_embeddings=False, dropout_rate=0.0)
    batch = {name: jnp.asarray(x) for name, x in make_batch().items()}
    merged, apart = (
        logits(config, params, batch),
        logits(adapted.config, adapted.state.params, batch),
    )
    np.testing.assert_allclose(merged, apart, atol=1e-4)
    assert np.abs(np.asarray(apart - logits(CONFIG, adapted.base, batch))).max() > 1e-2
    config = dataclasses.replace(CONFIG, adapter_size=3)
    saving.save_params(tmp_path / "own", tiny.random_params(config), info={"model": dataclasses.asdict(config)})
    with pytest.raises(ValueError, match=r"adapter_size=3.*encoder/layers/adapter"):
        convert.convert(tmp_path / "own", tmp_path / "hub2", "huggingface")


@pytest.mark.slow
def test_a_base_that_is_gone_or_another_is_said_so(adapted, tmp_path):
    away = tmp_path / "away"
    adapted.base_path.rename(away)
    try:
        with pytest.raises(FileNotFoundError, match=f"{adapted.base_path}, which does not exist"):
            checkpoint.restore_params(adapted.model_dir)
        other = jax.tree.map(lambda x: x + 1, adapted.base)
        saving.save_params(adapted.base_path, other, info={})
        with pytest.raises(ValueError, match="is another checkpoint: restore"):
            checkpoint.restore_params(adapted.model_dir)
        with checkpoint.base_at(away):
            restored = checkpoint.restore_params(adapted.model_dir)
            base = checkpoint.base_in_use(adapted.model_dir)
        assert base is not None and base["path"] == str(away)  # what the next checkpoint says
        loaded = t5x_lite.load(adapted.model_dir, base=away)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, restored)
        convert.convert(adapted.model_dir, tmp_path / "merged", "t5x_lite", str(away))
        assert convert.read(tmp_path / "merged")[0] == loaded.config
        jax.tree.map(np.testing.assert_array_equal, restored, adapted.state.params)
    finally:
        if adapted.base_path.exists():
            shutil.rmtree(adapted.base_path)
        away.rename(adapted.base_path)


@pytest.mark.slow
def test_what_is_in_the_base_may_have_another_dtype(adapted):
    folder = checkpoint.find_checkpoint(adapted.model_dir)
    own = checkpoint.own_parameter_names(folder)
    leaves = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat(adapted.state.params).items()}
    halves = {name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for name, x in leaves.items() if name not in own}
    checkpoint.check(folder, "params", leaves | halves, {}, same_dtype=True)
    other = {name: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for name, x in leaves.items()}
    with pytest.raises(UserError, match=r"different: \d+\n.* float32, this run .* bfloat16"):
        checkpoint.check(folder, "params", other, {}, same_dtype=True)
    assert halves and own


@pytest.mark.slow
def test_only_what_an_adaptation_adds_may_be_missing_where_a_run_begins(adapted):
    fresh = tiny.random_params(adapted.config)
    added = {name: leaf for name, leaf in flat(fresh).items() if re.search(ADAPTER_PARAMS, name)}
    got = flat(checkpoint.restore_params(adapted.base_path, fresh, fresh=added))
    assert got.keys() == flat(fresh).keys() and added
    for name, leaf in got.items():
        np.testing.assert_array_equal(leaf, added[name] if name in added else flat(adapted.base)[name])
    more = dataclasses.replace(adapted.config, relative_bias="per_layer")
    with pytest.raises(ValueError, match=r"(?s)missing.*layers/relpos_bias"):
        checkpoint.restore_params(adapted.base_path, tiny.random_params(more), fresh=added)
