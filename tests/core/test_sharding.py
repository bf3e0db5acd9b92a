"""Where arrays lie: meshes, rules, and the state of every published size on every preset mesh, without the devices."""

import contextlib
import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from core.test_model import PARAMETERS
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from repeats import fast

from benchmarks.train_step import model_config
from t5x_lite import sharding
from t5x_lite.checkpoint import saving
from t5x_lite.model import t5
from t5x_lite.model.layers import Embed
from t5x_lite.model.t5 import T5Config
from t5x_lite.plan import hlo
from t5x_lite.training import optim, step

ADAFACTOR = optim.make_optimizer(optim.adafactor(), optim.constant(1e-3))
ADAMW = optim.make_optimizer(optim.adamw(), optim.constant(1e-3))
SMALL = T5Config(d_model=8, d_ff=24, num_heads=4, head_dim=6, num_encoder_layers=2, num_decoder_layers=3, vocab_size=40)


def abstract_mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def leaves(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path): leaf for path, leaf in flat}


@pytest.mark.parametrize(
    "sizes, expected",
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 2, 4), (1, 2, 4))],
)
def test_mesh_takes_all_devices_with_auto_axes(sizes, expected):
    mesh = sharding.make_mesh(*sizes)
    assert mesh.devices.shape == expected and mesh.axis_names == sharding.MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 8), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_is_refused_with_its_sizes(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(ValueError, match=f"data={data}, fsdp={fsdp}, tensor={tensor}"):
        sharding.make_mesh(*sizes)


@pytest.mark.parametrize("size", fast(PARAMETERS.keys(), "t5_1_0/11B", "t5_1_1/small", "t5_1_1/xl"))
def test_every_size_lies_on_every_mesh_without_a_large_replicated_leaf(size):
    for mesh, optimizer in itertools.product([(8, 1, 1), (1, 64, 1), (2, 8, 2), (1, 8, 2)], [ADAFACTOR, ADAMW]):
        state = step.abstract_state(model_config(size), optimizer, abstract_mesh(*mesh))
        held = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params))
        # Norms and relative-position tables may be whole.
        assert held <= PARAMETERS[size] / (mesh[1] * mesh[2]) * 1.02 + 2**19, (mesh, optimizer)


def test_optimizer_moments_lie_as_their_parameters():
    state = step.abstract_state(SMALL, ADAMW, abstract_mesh(2, 2, 2))
    params = leaves(state.params)
    moments = {name: leaf for name, leaf in leaves(state.opt_state).items() if leaf.ndim > 1}
    assert len(moments) >= 2 * sum(leaf.ndim > 1 for leaf in params.values())
    for name, leaf in moments.items():
        parameter = next(p for p in params if name.endswith(p))
        assert leaf.sharding == params[parameter].sharding, name
    assert params["token_embedder/embedding"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert params["encoder/layers/mlp/wo/kernel"].sharding.spec == PartitionSpec(None, "tensor", "fsdp")


def test_an_axis_that_does_not_divide_is_refused_by_leaf_axis_and_cure():
    with pytest.raises(
        ValueError, match=r"kernel of shape \(3, 8, 24\): axis 'joined_kv' of size 24 .*tensor = 16.*1, 2, 3"
    ):
        step.abstract_state(SMALL, ADAFACTOR, abstract_mesh(1, 1, 16))
    with pytest.raises(ValueError, match=r"rel_embedding of shape \(4, 32\): axis 'heads' of size 4 .*tensor = 8"):
        step.abstract_state(SMALL, ADAFACTOR, abstract_mesh(1, 1, 8))


def test_a_large_leaf_that_no_rule_splits_is_refused_by_name():
    rules = tuple(rule for rule in sharding.RULES if rule[0] not in ("vocab", "embed"))
    with pytest.raises(ValueError, match=r"logits_dense/kernel .*replicated on every device.*\('embed', 'vocab'\)"):
        step.abstract_state(model_config("t5_1_1/small"), ADAFACTOR, abstract_mesh(1, 1, 2), rules)


@pytest.mark.slow
def test_the_state_is_made_where_the_decision_says():
    compiler = step.Compiler(sharding.make_mesh(2, 2, 2))
    abstract = step.abstract_state(SMALL, ADAFACTOR, compiler.mesh)
    state = step.init_state(SMALL, ADAFACTOR, jax.random.key(0), abstract)
    for name, leaf in leaves(state).items():
        wanted = leaves(abstract)[name].sharding
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name
    embedding = state.params["token_embedder"]["embedding"]
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(20, 4)}
    one = step.Compiler(sharding.make_mesh(devices=jax.devices()[:1]))
    alone = step.init_state(SMALL, ADAFACTOR, jax.random.key(0), step.abstract_state(SMALL, ADAFACTOR, one.mesh))
    jax.tree.map(np.testing.assert_array_equal, state, alone)  # the same numbers on every mesh


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_lookups_send_neither_the_table_nor_its_gradient(sizes):
    mesh, module = sharding.make_mesh(*sizes), Embed(96, 64, jnp.dtype("float32"))
    random = np.random.default_rng(0)
    table = jnp.asarray(random.standard_normal((96, 64)), jnp.float32)
    tokens = jnp.asarray(random.integers(0, 96, (8, 3)), jnp.int32)
    weights = jnp.asarray(random.standard_normal((8, 3, 64)), jnp.float32)
    lies = {"table": ("vocab", "embed"), "tokens": ("batch",), "weights": ("batch",)}
    at = {name: sharding.named_sharding(mesh, sharding.RULES, axes) for name, axes in lies.items()}

    def loss(table, tokens, weights):
        with sharding.use_mesh(mesh):
            return jnp.sum(module.apply({"params": {"embedding": table}}, tokens) * weights)

    gradient = jax.jit(jax.grad(loss), in_shardings=tuple(at.values()), out_shardings=at["table"])
    placed = [jax.device_put(x, of) for x, of in zip((table, tokens, weights), at.values(), strict=True)]
    np.testing.assert_allclose(gradient(*placed), jax.grad(loss)(table, tokens, weights), rtol=1e-5)
    program = hlo.Program(gradient.lower(*placed).compile().as_text())
    data, fsdp, tensor = sizes  # over data, each device's part of the gradient is summed
    of_gradient = 2 * (data - 1) / data * table.nbytes / (fsdp * tensor)
    assert sum(sent.bytes for sent in program.collectives(8).values()) < of_gradient + table.nbytes / 8


def test_activations_are_constrained_only_where_a_layout_is_in_force():
    x = jnp.zeros((8, 6))
    assert sharding.constrain(x, "batch", "mlp") is x
    mesh = sharding.make_mesh(2, 2, 2)
    with sharding.use_mesh(mesh):
        assert jax.jit(lambda x: sharding.constrain(x, "batch", "mlp"))(x).sharding.spec == PartitionSpec(
            ("data", "fsdp"), "tensor"
        )


def test_logical_axes_stand_beside_every_parameter():
    boxes = jax.tree.leaves(
        step._boxed_params(SMALL),
        is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
    )
    assert all(isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.unbox().ndim for box in boxes)


@pytest.mark.parametrize(
    "to", [(1, 4, 2), *(pytest.param(to, marks=pytest.mark.slow) for to in ((2, 1, 1), (1, 1, 2)))], ids=str
)
@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_read_on_any_other_scanned_or_not_with_the_same_logits(tmp_path, to):
    def abstract(config, mesh):
        return step.abstract_state(config, ADAFACTOR, mesh)

    here = sharding.make_mesh(1, 8, 1)
    state = tiny.random_state(ADAFACTOR, abstract(SMALL, here))
    with contextlib.closing(saving.Checkpointer(tmp_path)) as saver:
        saver.save(1, state)
    there = sharding.make_mesh(*to, devices=jax.devices()[: np.prod(to)])
    unrolled = dataclasses.replace(SMALL, scan_layers=not SMALL.scan_layers)
    with contextlib.closing(saving.Checkpointer(tmp_path)) as saver:
        found = saver.restore(1, abstract(unrolled, there))
    leaf = found.params["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert len(leaf.sharding.device_set) == np.prod(to) and leaf.sharding.mesh == there
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(state))

    tokens = np.array([[5, 6, 7, 1], [8, 9, 1, 0]])
    batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": np.pad(tokens, [(0, 0), (1, 0)])[:, :-1]}
    alone = jax.devices()[0]
    logits = [
        jax.jit(functools.partial(t5.forward, config))(jax.device_put(jax.device_get(params), alone), batch)
        for config, params in ((SMALL, state.params), (unrolled, found.params))
    ]
    np.testing.assert_allclose(*logits, atol=1e-6)
