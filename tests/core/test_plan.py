"""Plans: what the compiler and the program's text say, against the same program run, counted by hand or by XLA."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core.test_run import configured, refused
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5x_lite import plan, sharding
from t5x_lite.bert import BertConfig
from t5x_lite.cli import main as command
from t5x_lite.cli import plan as plan_mode
from t5x_lite.cli import task_setup
from t5x_lite.errors import UserError
from t5x_lite.metrics import hardware
from t5x_lite.model.families import model_of
from t5x_lite.plan import evidence, hlo, rows, suggest, topologies
from t5x_lite.plan.__main__ import main
from t5x_lite.plan.topologies import Topology
from t5x_lite.training import step

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu: pip install -r requirements-tpu.txt")
CPU = next(chip for chip in hardware.CHIPS if chip.name == "cpu")
TINY = [
    *("--gin.T5Config.d_model=16", "--gin.T5Config.d_ff=24", "--gin.T5Config.num_heads=4", "--gin.T5Config.head_dim=6"),
    *("--gin.T5Config.num_encoder_layers=2", "--gin.T5Config.num_decoder_layers=3", "--gin.T5Config.vocab_size=96"),
    *("--gin.BATCH_SIZE=16", "--gin.TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 10}", "--gin.DTYPE='float32'"),
    *("--gin.MESH={'data': 2, 'fsdp': 4}", "--gin.MIXTURE_OR_TASK_NAME='no such task'"),
]


@pytest.fixture
def tiny():
    return configured(*TINY)


DECODER = [*TINY, "--gin.T5Config.num_encoder_layers=0"]


@pytest.fixture(scope="module")
def tiny_plan():
    """Of a decoder alone, which compiles in half of the time."""
    return plan_mode.step_plan(configured(*DECODER), cpus())


def cpus(memory: float = 0.0) -> Topology:
    return Topology("cpu:8", dataclasses.replace(CPU, memory=memory), tuple(jax.devices()[:8]))


@pytest.mark.slow
def test_bytes_are_those_of_the_step_that_a_run_compiles_and_of_its_arrays(tiny):
    found = plan_mode.step_plan(tiny, cpus())
    machine = task_setup.partitioner(tiny)
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), machine.abstract)
    rows = {name: np.ones(x.shape, np.int32) for name, x in plan_mode.abstract_batch(tiny, machine).items()}
    batch = sharding.shard_batch(rows, machine.batch_sharding)
    train_step = machine.compiler.train_step(
        machine.abstract, config=tiny.model, optimizer=tiny.optimizer, loss=tiny.loss, num_microbatches=1
    )
    key = jax.device_put(jax.random.key(1), machine.compiler.replicated())
    really = train_step.lower(state, batch, key).compile().memory_analysis()

    assert found.memory.temporaries == really.temp_size_in_bytes > 0
    assert found.memory.arguments == really.argument_size_in_bytes
    assert found.memory.outputs == really.output_size_in_bytes
    assert found.memory.aliased == really.alias_size_in_bytes > 0

    def on_first_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert found.parameter_bytes == on_first_device(state.params) < 4 * found.parameters
    assert found.optimizer_bytes == on_first_device(state.opt_state)
    assert found.batch_bytes == on_first_device(batch)
    assert {"encoder_segment_ids", "decoder_positions"} <= set(batch)  # packed, as training has it


@pytest.mark.slow
def test_flops_of_closed_form_are_those_of_the_program_and_about_those_that_xla_counts(tiny):
    model = dataclasses.replace(tiny.model, d_model=128, d_ff=256, num_encoder_layers=2, scan_layers=False)
    run = dataclasses.replace(tiny, model=model)
    machine = task_setup.partitioner(run)
    closed = model_of(model).flops(16, {"inputs": 12, "targets": 10})

    def traced(remat, **options):
        config = dataclasses.replace(model, remat=remat, **options)
        train_step = machine.compiler.train_step(machine.abstract, config=config, optimizer=run.optimizer)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return train_step.trace(machine.abstract, plan_mode.abstract_batch(run, machine), key)

    assert plan.matmul_flops(traced("none").jaxpr) == closed
    counted = traced("none").lower().cost_analysis()["flops"]  # elementwise operations as well
    assert closed < counted < 1.25 * closed
    with_full, with_minimal = (plan.matmul_flops(traced(remat).jaxpr) for remat in ("full", "minimal"))
    assert closed < with_minimal < with_full < 4 / 3 * closed  # the logits are not repeated


@pytest.mark.slow
def test_flops_of_a_fused_kernel_count_on_every_device_and_its_weights_twice(tiny):
    model = dataclasses.replace(tiny.model, num_decoder_layers=1)
    machine = task_setup.partitioner(tiny)

    def flops(attention, remat):
        config = dataclasses.replace(model, attention=attention, remat=remat)
        abstract = step.abstract_state(config, tiny.optimizer, machine.mesh)
        train_step = machine.compiler.train_step(abstract, config=config, optimizer=tiny.optimizer)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return plan.matmul_flops(train_step.trace(abstract, plan_mode.abstract_batch(tiny, machine), key).jaxpr)

    # Two layers of the encoder on 12 inputs; one of the decoder on 10 targets, alone and with the inputs.
    once = 2 * 16 * 4 * 6 * (2 * 12 * 12 + 10 * 10 + 10 * 12)
    assert flops("flash", "none") == flops("batch", "none") + once
    assert flops("flash", "minimal") == flops("flash", "none")  # the results are saved, with the sum of the weights


@pytest.mark.parametrize("memory, fits", [(1e3, False), (1e12, True), (None, None)])
def test_whether_it_fits_is_said(tiny_plan, memory, fits):
    found = dataclasses.replace(tiny_plan, capacity=memory)
    assert found.fits is fits
    said = {False: "DOES NOT FIT", True: "fits", None: "unknown"}[fits]
    assert said in plan.table(found)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. Exceeded ...",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for ... (18.50G) exceeds ...",
    ],
)
def test_a_compiler_that_refuses_for_size_is_an_answer_and_other_errors_are_not(tiny, message):
    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(message)

    memory, compiled, _ = plan.compile_within(Lowered(), cpus())
    assert compiled is None and memory.needed == 18.5 * 2**30 and memory.temporaries is None
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        plan.compile_within(Lowered(), cpus())


# The program's text


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("a", "b"), out_specs=PartitionSpec("a", None))
    def sums(x):
        def body(total, _):
            total = jax.lax.psum(total, "b") * 0.5
            return jax.lax.pcast(total, "b", to="varying"), None

        x, _ = jax.lax.scan(body, x, length=5)
        return jax.lax.psum(x, "b")

    x = jax.ShapeDtypeStruct((6, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("a", "b")))
    program = hlo.Program(jax.jit(sums).lower(x).compile().as_text())
    one = 3 * 2 * 4  # bytes of a device's part
    assert program.collectives(8) == {"all-reduce": hlo.Collectives(6, 6 * 2 * one * 3 / 4)}
    apart = program.collectives(8, domain=[0, 0, 1, 1, 0, 0, 1, 1])
    # Of each four devices two are in a domain: half of what is held goes round there, then half of that half between.
    assert apart == {"all-reduce": hlo.Collectives(6, 6 * 2 * one / 2, 6 * 2 * one / 4)}
    assert not program.unknown_loops


# As a TPU's compiler writes: a loop without a count, its variable goes up by two; an all-gather in two fusions.
TPU_TEXT = """\
HloModule m, is_scheduled=true

%gather.1 (p0.1: bf16[4,64]) -> bf16[16,64] {
  %p0.1 = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.1 = bf16[16,64]{1,0} all-gather(%p0.1), channel_id=9, replica_groups=mesh['x'=2,'y'=4] {'y'}, \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%gather.2 (p0.2: bf16[4,64]) -> bf16[16,64] {
  %p0.2 = bf16[4,64]{1,0} parameter(0)
  ROOT %ag.2 = bf16[16,64]{1,0} all-gather(%p0.2), channel_id=9, replica_groups=mesh['x'=2,'y'=4] {'y'}, \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%body (state: (f32[3,5], u32[], bf16[4,64])) -> (f32[3,5], u32[], bf16[4,64]) {
  %state = (f32[3,5]{1,0:S(1)}, u32[]{:T(128)}, bf16[4,64]{1,0}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %i = u32[]{:T(128)} get-tuple-element(%state), index=1
  %x = f32[3,5]{1,0:S(1)} get-tuple-element(%state), index=0
  %w = bf16[4,64]{1,0} get-tuple-element(%state), index=2
  %part = bf16[16,64]{1,0:S(1)} fusion(%w), kind=kOutput, calls=%gather.1
  %start = (f32[3,5]{1,0:S(1)}, f32[3,5]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=4, \
source_target_pairs={{0,1},{1,0}}
  %done = f32[3,5]{1,0} collective-permute-done(%start)
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %out = (f32[3,5]{1,0}, u32[]{:T(128)}, bf16[4,64]{1,0}) tuple(%done, %next, %w)
}

%condition (state.1: (f32[3,5], u32[], bf16[4,64])) -> pred[] {
  %end = u32[]{:T(128)} constant(9)
  %state.1 = (f32[3,5]{1,0:S(1)}, u32[]{:T(128)}, bf16[4,64]{1,0}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=1
  ROOT %less = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (a: f32[3,5], b: bf16[4,64]) -> f32[3,5] {
  %a = f32[3,5]{1,0} parameter(0)
  %b = bf16[4,64]{1,0} parameter(1)
  %one = u32[]{:T(128)} constant(1)
  %first = (f32[3,5]{1,0}, u32[]{:T(128)}, bf16[4,64]{1,0}) tuple(%a, %one, %b)
  %loop = (f32[3,5]{1,0}, u32[]{:T(128)}, bf16[4,64]{1,0}) while(%first), condition=%condition, body=%body
  %gathered = bf16[16,64]{1,0} fusion(%b), kind=kOutput, calls=%gather.2
  ROOT %result = f32[3,5]{1,0} get-tuple-element(%loop), index=0
}
"""


def test_the_text_of_a_tpu_program_is_read():
    program = hlo.Program(TPU_TEXT)
    assert program.times["body"] == 4 and not program.unknown_loops  # 1, 3, 5, 7
    held = 4 * 64 * 2
    assert program.collectives(8) == {
        "all-gather": hlo.Collectives(1, 3.0 * held),
        "collective-permute": hlo.Collectives(4, 4.0 * 3 * 5 * 4),
    }
    assert program.collectives(8, domain=[0, 0, 0, 0, 1, 1, 1, 1]) == program.collectives(8)  # inside y
    split = program.collectives(8, domain=[0, 0, 1, 1, 0, 0, 1, 1])["all-gather"]
    assert (split.bytes, split.network_bytes) == (2 * held, held)
    # In each turn the permuted array, out of VMEM; `add`; `compare`.
    assert program.memory_traffic() == 4 * (3 * 5 * 4 + 3 * 4 + (2 * 4 + 1))


def test_a_fusion_reads_the_part_that_it_converts():
    text = """
%of_layer (p: s8[24,8,4], i: s32[]) -> bf16[1,8,4] {
  %p = s8[24,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %wide = bf16[24,8,4]{2,1,0} convert(%p)
  ROOT %part = bf16[1,8,4]{2,1,0} dynamic-slice(%wide, %i, %zero, %zero), dynamic_slice_sizes={1,8,4}
}

%whole (q: s8[24,8,4]) -> bf16[24,8,4] {
  %q = s8[24,8,4]{2,1,0} parameter(0)
  ROOT %all = bf16[24,8,4]{2,1,0} convert(%q)
}

ENTRY %main (a: s8[24,8,4], n: s32[]) -> (bf16[1,8,4], bf16[24,8,4]) {
  %a = s8[24,8,4]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %one = bf16[1,8,4]{2,1,0} fusion(%a, %n), kind=kLoop, calls=%of_layer
  %every = bf16[24,8,4]{2,1,0} fusion(%a), kind=kLoop, calls=%whole
  ROOT %both = (bf16[1,8,4]{2,1,0}, bf16[24,8,4]{2,1,0}) tuple(%one, %every)
}
"""
    # A layer in int8, its number, and the layer in bfloat16; then all layers in int8 and bfloat16.
    assert hlo.Program(text).memory_traffic() == (32 + 4 + 64) + 24 * (32 + 64)


def test_what_a_tpu_program_sends_to_other_slices_counts_as_the_collective_that_it_was():
    sums = """ENTRY %main (a: f32[6,5]) -> f32[6,5] {
  %a = f32[6,5]{1,0} parameter(0)
  %token = token[] after-all()
  %inside = f32[6,5]{1,0} all-reduce(%a), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %send = (f32[6,5]{1,0}, u32[], token[]) send(%inside, %token), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %b = f32[6,5]{1,0} copy(%inside)
}"""
    found = hlo.Program(sums).collectives(8, domain=[0, 0, 0, 0, 1, 1, 1, 1])
    assert found == {"all-reduce": hlo.Collectives(2, 2 * 120 * 3 / 4, 2 * 120 / 2)}


def test_a_tpus_fusion_that_keeps_a_part_of_a_sum_is_a_reduce_scatter():
    program = hlo.Program("""
%all-reduce-scatter.2 (input: f32[8,6]) -> f32[2,6] {
  %input = f32[8,6]{1,0} parameter(0)
  %all-reduce.1 = f32[8,6]{1,0} all-reduce(%input), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %partition-id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %part = f32[2,6]{1,0} dynamic-slice(%all-reduce.1, %partition-id, %zero), dynamic_slice_sizes={2,6}
}

ENTRY %main (a: f32[8,6]) -> f32[2,6] {
  %a = f32[8,6]{1,0} parameter(0)
  ROOT %fusion = f32[2,6]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.2
}
""")
    assert program.collectives(4) == {"reduce-scatter": hlo.Collectives(1, 8 * 6 * 4 * 3 / 4)}


def test_groups_are_read_in_every_form():
    pairs = {(0, 4), (1, 5), (2, 6), (3, 7)}
    for text in (
        "replica_groups={{0,4},{1,5},{2,6},{3,7}}, x",
        "replica_groups=[4,2]<=[2,4]T(1,0), x",
        "replica_groups=mesh['x'=2,'y'=4] {'x'}, x",
    ):
        assert {tuple(group) for group in hlo._groups(text, 8).tolist()} == pairs
    assert hlo._groups("to_apply=%add", 8).tolist() == [list(range(8))]


def test_memory_traffic_is_what_xla_counts_and_a_loop_counts_as_often_as_it_runs():
    w = jax.ShapeDtypeStruct((7, 64, 64), jnp.float32)
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32)

    def layers(x, w, unroll):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w, unroll=unroll)[0]

    unrolled, looped = (jax.jit(functools.partial(layers, unroll=n)).lower(x, w).compile() for n in (7, 1))
    counted = unrolled.cost_analysis()["bytes accessed"]
    assert hlo.Program(unrolled.as_text()).memory_traffic() == pytest.approx(counted, rel=0.15)
    traffic = hlo.Program(looped.as_text()).memory_traffic()
    assert looped.cost_analysis()["bytes accessed"] < 0.5 * counted < 0.6 * traffic < counted


# Topologies


@pytest.mark.parametrize(
    "name, said",
    [
        ("v9:2x2", ["CHIP:SHAPE", "Chips: v4, v5e"]),
        ("v5e", ["CHIP:SHAPE", "v5e:4x4"]),
        ("h10:8", ["Did you mean h100?"]),
        ("v5e:3x5", ["'3x5'", "2x2, 2x4, 4x4"]),
        ("v4:4x4", ["'4x4'", "4x4x4"]),
        ("h100:12", ["multiple of 8"]),
        ("cpu:0", ["cpu:N"]),
        ("2xcpu:8", ["cpu:N"]),
    ],
)
def test_names_that_stand_for_nothing_are_refused_with_those_that_do(capsys, name, said):
    line = refused(capsys, "--mode=plan", f"--topology={name}", *TINY)
    assert all(words in line for words in said), line


def test_the_flags_go_together(capsys):
    assert "--topology=v5e:4x4" in refused(capsys, "--mode=plan", *TINY)
    assert "--mode=plan" in refused(capsys, "--topology=v5e:4x4", *TINY)


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_the_command_that_installs_it_is_said(capsys):
    line = refused(capsys, "--mode=plan", "--topology=v5e:4x4", *TINY)
    assert "pip install -r requirements-tpu.txt" in line


def test_a_mesh_that_does_not_fit_is_refused_as_a_run_refuses_it(tiny):
    with pytest.raises(ValueError, match=r"fsdp=3.*does not fit 8"):
        plan_mode.step_plan(dataclasses.replace(tiny, mesh={"fsdp": 3}), cpus())


def test_chips_are_known_by_what_jax_calls_them():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    kinds = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H200": "h200"}
    kinds |= {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA A100-SXM4-80GB": "a100-80gb"}
    assert {kind: chip.name for kind in kinds if (chip := hardware.of_device(Device(kind)))} == kinds
    assert hardware.of_device(Device("cpu")) is None


@dataclasses.dataclass(frozen=True)
class FakeTpu:
    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU of a test"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self):
        return (self.id % 4, 0, 0)


def test_slices_lie_along_data_and_nothing_else():
    devices = [FakeTpu(id, slice_index) for slice_index in range(2) for id in range(4)]
    mesh = sharding.make_mesh(2, -1, 1, devices=devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    assert (slices == np.arange(2)[:, None, None]).all()
    with pytest.raises(ValueError, match=r"2 slices, and data = 1 must be a multiple.*'data': 2"):
        sharding.make_mesh(1, -1, 1, devices=devices)


# Suggestions


def test_presets_are_those_of_the_gin_files():
    for name, mesh in suggest.MESHES.items():
        assert configured(*TINY[:-2], f"--gin_file=mesh/{name}.gin").mesh == mesh


def setting(remat="none", name="fsdp", rows=16, parts=1):
    return suggest.Setting(rows, name, suggest.MESHES[name], remat, parts)


def test_frontier_has_what_no_setting_of_its_batch_beats(tiny_plan):
    def candidate(rows, needed, seconds):
        memory = dataclasses.replace(tiny_plan.memory, needed=needed)
        return suggest.Candidate(
            setting(rows=rows), dataclasses.replace(tiny_plan, memory=memory, step_seconds=seconds)
        )

    quick, small, slower, larger = (candidate(16, *c) for c in ((30, 1.0), (10, 3.0), (20, 3.0), (40, 1.0)))
    middle, of_another_batch = candidate(16, 20, 2.0), candidate(8, 50, 9.0)
    candidates = [larger, quick, slower, small, of_another_batch, middle]
    assert suggest.frontier(candidates) == [of_another_batch, small, middle, quick]
    assert suggest.frontier([quick, candidate(16, 30, 1.0)]) == [quick]
    without_rates = dataclasses.replace(tiny_plan, step_seconds=None, executed_flops=7.0)
    assert suggest.Candidate(setting(), without_rates).seconds == 7.0


def test_a_setting_is_not_tried_if_a_smaller_one_was_too_large():
    assert suggest.needs_as_much(setting(rows=32), setting(rows=16))
    assert suggest.needs_as_much(setting(rows=32, parts=2), setting(rows=16))
    assert not suggest.needs_as_much(setting(rows=32, parts=4), setting(rows=16))
    assert not suggest.needs_as_much(setting(rows=8), setting(rows=16, parts=2))  # which also sums gradients
    assert not suggest.needs_as_much(setting("full", rows=32), setting(rows=16))
    assert not suggest.needs_as_much(setting(name="data", rows=32), setting(rows=16))


class FakePlans:
    """Makes plans of 1 GB a row at once, less with remat; "minimal" is the quickest, and "data" a little quicker."""

    def __init__(self, plan, capacity, compute=0.0, fixed=1.0):
        self.plan, self.capacity, self.compute, self.fixed, self.made = plan, capacity, compute, fixed, []

    def __call__(self, setting):
        if setting.name == "fsdp_tensor":
            raise ValueError("unsuitable")
        self.made.append((setting.name, setting.batch_size, setting.remat, setting.num_microbatches))
        needed = {"none": 10, "minimal": 5, "full": 2}[setting.remat] * setting.batch_size // setting.num_microbatches
        a_row = {"none": 0.4, "minimal": 0.2, "full": 0.3}[setting.remat] - 0.05 * (setting.name == "data")
        return dataclasses.replace(
            self.plan,
            batch_size=setting.batch_size,
            remat=setting.remat,
            num_microbatches=setting.num_microbatches,
            memory=dataclasses.replace(self.plan.memory, needed=needed),
            times=plan.Times(compute=self.compute),
            step_seconds=max(self.compute, self.fixed + a_row * setting.batch_size),
            capacity=self.capacity,
        )

    def search(self, mesh=suggest.MESHES["fsdp"]):
        return suggest.Search(self, 4, mesh, cpus())


def test_the_frontier_is_compiled_for_other_meshes_and_batches(tiny_plan):
    make = FakePlans(tiny_plan, capacity=20.0)
    search = make.search()
    best, itself = search.run()
    assert make.made == [
        # 4 rows of "none" need two micro-batches, and take longer than "minimal", as "full" does in less memory.
        *(("fsdp", 4, "none", 1), ("fsdp", 4, "none", 2), ("fsdp", 4, "minimal", 1), ("fsdp", 4, "full", 1)),
        *(("data", 4, "minimal", 1), ("data", 4, "full", 1)),
        *(("data", 2, "full", 1), ("data", 2, "minimal", 1)),
        *(("data", 8, "full", 1), ("data", 8, "minimal", 1), ("data", 8, "minimal", 2)),
        *(("data", 16, "full", 1), ("data", 16, "full", 2)),  # 16 rows of "minimal", in 4: 8 in 1 were too many
        ("data", 16, "minimal", 4),
    ]
    assert best.flags == "--gin_file=mesh/data.gin --gin.REMAT=\"'minimal'\" --gin.NUM_MICROBATCHES=1"
    assert (itself.batch_size, itself.remat) == (4, "minimal") and itself.fits
    found = [(c.setting.batch_size, c.setting.remat) for c in suggest.frontier(search.fitting)]
    assert found == [(size, remat) for size in (2, 4, 8, 16) for remat in ("full", "minimal")]
    assert len(search.compiled) == len(make.made) and all(candidate.plan.fits for candidate in search.fitting)


def test_what_cannot_be_quicker_is_not_compiled(tiny_plan):
    one_device = dataclasses.replace(cpus(), devices=cpus().devices[:1])
    make = FakePlans(tiny_plan, capacity=100.0)
    suggest.Search(make, 4, {}, one_device).run()
    assert {name for name, *_ in make.made} == {"fsdp"}
    bound_by_compute = FakePlans(tiny_plan, capacity=100.0, compute=50.0)
    best, _ = bound_by_compute.search().run()
    assert best.name == "fsdp" and {name for name, *_ in bound_by_compute.made} == {"fsdp"}
    no_gain = FakePlans(tiny_plan, capacity=100.0, fixed=0.0)
    no_gain.search().run()
    assert {size for _, size, *_ in no_gain.made} == {2, 4, 8}  # 8 rows are no quicker, so 16 are not tried


def test_a_mesh_of_the_runs_own_is_tried_too(tiny_plan):
    assert suggest.meshes({"fsdp": -1}) == suggest.MESHES
    own = {"data": 2, "fsdp": -1}
    make = FakePlans(tiny_plan, capacity=100.0)
    make.search(own).run()
    assert ("", 4, "minimal", 1) in make.made
    assert suggest.Setting(4, "", own, "full", 2).flags.startswith("--gin.MESH=\"{'data': 2, 'fsdp': -1}\" --gin.REMAT")


@pytest.mark.slow
def test_nothing_is_compiled_that_cannot_fit_on_paper(tiny, monkeypatch):
    monkeypatch.setattr(plan, "compile_within", None)
    found = plan_mode.step_plan(tiny, cpus(1e3), on_paper=True)
    assert found.fits is False and found.compile_seconds == 0.0
    with pytest.raises(UserError, match="nothing fits cpu:8"):
        suggest.Search(lambda setting: found, 16, tiny.mesh, cpus(1e3)).run()


def test_an_error_on_every_mesh_is_shown():
    def make(setting):
        raise UserError("of the run itself")

    with pytest.raises(UserError, match="of the run itself"):
        suggest.Search(make, 16, {}, cpus()).run()


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_what_a_count_on_paper_leaves_out_does_not_fit_indeed(tiny, remat):
    model = dataclasses.replace(tiny.model, remat=remat, vocab_size=2048)
    run = dataclasses.replace(tiny, model=model, task_feature_lengths={"inputs": 64, "targets": 48})
    machine = task_setup.partitioner(run)
    least = plan.least_memory(run.model, machine.compiler, machine.abstract, plan_mode.abstract_batch(run, machine))
    really = plan_mode.step_plan(run, cpus()).memory.needed
    assert 0.2 * really < least < really


# Evidence


def topology(name, count=8):
    chip = next(chip for chip in hardware.CHIPS if chip.name == name)
    return Topology(f"{name}:{count}", chip, tuple(range(count)))


@pytest.mark.parametrize("size", json.loads(evidence.PUBLISHED.read_text())["sizes"])
def test_published_sizes_are_those_of_the_gin_files(size):
    shape = json.loads(evidence.PUBLISHED.read_text())["sizes"][size]
    run = configured(f"--gin_file=models/t5_1_1/{size}.gin", "--gin.MIXTURE_OR_TASK_NAME='any'")
    assert step.param_count(step.abstract_params(run.model, sharding.make_mesh())) == shape.pop("parameters")
    assert {name: getattr(run.model, name) for name in shape} == shape


BASE = configured("--gin_file=models/t5_1_1/base.gin", "--gin.MIXTURE_OR_TASK_NAME='any'").model
LENGTHS = {"inputs": 512, "targets": 114}


@pytest.mark.parametrize(
    ("parameters", "chip", "lengths", "expected"),
    [
        (247_577_856, "a100-80gb", LENGTHS, ["nanoT5, base", "NeMo T5 220M"]),
        (222_903_552, "a100-40gb", LENGTHS, ["nanoT5, base", "NeMo T5 220M"]),  # T5 1.0
        (247_577_856, "a100-80gb", {"inputs": 512, "targets": 32}, []),
        (247_577_856, "a100-80gb", {"inputs": 1024, "targets": 114}, []),
        (247_577_856, "a100-80gb", {"inputs": 512}, []),
        (582_401_280, "a100-80gb", LENGTHS, []),  # mT5, most of it embeddings
        (247_577_856, "v5e", LENGTHS, []),
    ],
)
def test_published_figures_are_of_the_same_shape(parameters, chip, lengths, expected):
    figures = evidence.published(BASE, parameters, topology(chip).chip, lengths)
    assert [figure["what"] for figure in figures] == expected


def test_published_figures_of_another_model_of_that_size_are_left_out():
    chip = topology("a100-80gb").chip
    assert not evidence.published(dataclasses.replace(BASE, num_encoder_layers=0), 247_577_856, chip, LENGTHS)
    assert not evidence.published(
        BertConfig(d_model=768, d_ff=3072, num_heads=12, num_layers=12), 247_577_856, chip, LENGTHS
    )


def test_a_published_figure_says_what_differs(tiny_plan):
    large = dataclasses.replace(BASE, d_model=1024, num_encoder_layers=24, num_decoder_layers=24, dtype="bfloat16")
    itself = dataclasses.replace(tiny_plan, parameters=783_150_080, lengths=LENGTHS)
    published, compared = evidence.lines(itself, topology("h200"), large, packed=True)
    assert published == (
        "published: T5X by NVIDIA, large, 64 x H100 fp8: 174.1 sequences/s a device, MFU 26% by our count (inputs 512, "
        "targets 128, packed no, dtype fp8 (Transformer Engine), optimizer Adam, batch 32 rows a device; JAX-Toolbox, "
        "rosetta/projects/t5x/README.md); here: targets 114, packed yes, dtype bfloat16, H200, 8 device(s)"
    )
    assert compared.startswith("compared: ")
    none, _ = evidence.lines(itself, topology("v4"), large, packed=True)
    assert none == "published: no figure of this model, chip and lengths"
    assert evidence.lines(itself, cpus(), large, packed=True) == []


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_a_plan_says_how_far_it_was_right_where_it_was_compared(name):
    assert evidence.compared_line(topology(name, 1)) == (
        "compared: plans for one H100 with one H200 (2026-11-27): memory within 6 %, the step took 1.65 times the bound"
    )
    assert evidence.compared_line(topology(name)).endswith("; never on several devices")


@pytest.mark.parametrize("name", ["v5e", "a100-80gb", "h100-pcie"])
def test_a_plan_says_that_it_was_never_compared(name):
    assert "never with a run on a" in evidence.compared_line(topology(name))
    stand_in = dataclasses.replace(topology("h100"), real=False)
    assert "never" in evidence.compared_line(stand_in)


# The command


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_it_as_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # which the command adds to
    arguments = ["run.py", "--mode=plan", "--topology=cpu:8", "--decode", *DECODER, f"--gin.MODEL_DIR='{tmp_path}'"]
    arguments.append("--gin.REMAT='none'")  # which multiplies nothing twice
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1} and f"{found['parameters']:,}" in out
    assert found["collectives"]["all-reduce"]["count"] > 0 and found["decode_memory"]["needed"] > 0
    assert found["flops"] == found["executed_flops"] and found["fits"] is None


@pytest.mark.slow
def test_the_command_suggests_and_writes_all_candidates(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    arguments = ["run.py", "--mode=plan", "--topology=cpu:8", "--suggest", *DECODER, f"--gin.MODEL_DIR='{tmp_path}'"]
    arguments += ["--gin.T5Config.num_decoder_layers=1", "--gin.BATCH_SIZE=8"]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert out.startswith("| batch | mesh") and "suggested for BATCH_SIZE = 8: --gin" in out
    assert found["batch_size"] == 8 and found["remat"] == "none"  # which computes least
    sizes = [candidate["batch_size"] for candidate in found["candidates"]]
    assert set(sizes) == {4, 8, 16}
    assert len(sizes) > out.count("\n| ") - 1  # the table leaves some out
    assert {candidate["remat"] for candidate in found["candidates"]} == {"none", "minimal", "full"}
    assert found | {"candidates": None} in [candidate | {"candidates": None} for candidate in found["candidates"]]
    assert main([str(tmp_path / "plan.json")]) == 0
    assert capsys.readouterr().out.count("\n") == len(sizes) + 2


def test_a_table_of_plans_is_markdown(tiny_plan, tmp_path, capsys):
    itself = dataclasses.replace(
        tiny_plan,
        parameters=76_961_152,
        memory=dataclasses.replace(tiny_plan.memory, needed=3 * 2**30),
        capacity=2.0 * 2**30,
        times=plan.Times(compute=0.04, memory=0.05),
        step_seconds=0.05,
        mfu=0.8,
    )
    (tmp_path / "plan.json").write_text(json.dumps(rows.values(itself)))
    assert main([str(tmp_path / "plan.json")]) == 0
    text = capsys.readouterr().out
    head, line, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    assert tuple(head) == rows.COLUMNS and set("".join(line)) == {"-"}
    setting = ["77 M", "cpu:8", "16", "data 2, fsdp 4", tiny_plan.remat, "1"]
    assert row == [*setting, "3.00 of 2.0 GiB: does not fit", "50.0 ms", "40.0", "80%", "memory"]


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"candidates": [3]}', None])
def test_a_file_that_is_not_a_plan_gives_one_line(text, tmp_path, capsys):
    file = tmp_path / "plan.json"
    if text is not None:
        file.write_text(text)
    assert main([str(file)]) == 2
    error = capsys.readouterr().err
    assert str(file) in error and error.count("\n") == 1


@pytest.mark.slow
@needs_libtpu
def test_small_for_a_slice_that_is_not_there(tmp_path):
    arguments = ["--mode=plan", "--topology=v5e:2x4", "--gin_file=models/t5_1_1/small.gin", "--gin_file=mesh/fsdp.gin"]
    arguments += ["--gin.BATCH_SIZE=64", f"--gin.MODEL_DIR='{tmp_path}'"]
    root = Path(command.__file__).parents[2]
    environment = os.environ | {"XLA_FLAGS": ""}  # libtpu ends the process at a flag that it does not know
    subprocess.run([sys.executable, "run.py", *arguments], cwd=root, env=environment, check=True)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["compiled_for"] == "v5e" and found["parameters"] == 76_961_152
    assert found["parameter_bytes"] == pytest.approx(4 * 76_961_152 / 8, rel=0.01)
    gathered = sum(found["collectives"][kind]["bytes"] for kind in ("all-gather", "collective-permute"))
    assert gathered > 2 * 2 * 76_961_152 / 8 * 7 / 2  # each parameter in bfloat16, at least once each way
    assert 0 < found["mfu"] < 1 and found["step_seconds"] == max(
        seconds for seconds in found["times"].values() if seconds is not None
    )
    assert math.isclose(found["times"]["compute"], found["executed_flops"] / 8 / 197e12)


@needs_libtpu
@pytest.mark.parametrize("shape", ["2xv5e:4x4", "v4:4x4x4", "v6e:1x1"])
def test_devices_of_a_tpu_topology(shape, monkeypatch):
    for name in ("XLA_FLAGS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    found = topologies.find(shape)
    assert len(found.devices) == {"2xv5e:4x4": 32, "v4:4x4x4": 64, "v6e:1x1": 1}[shape]
    assert set(found.domain_of.values()) == ({0, 1} if shape.startswith("2x") else {0})
    assert sharding.make_mesh(-1, 1, 1, devices=found.devices).size == len(found.devices)
