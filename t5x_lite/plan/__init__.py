"""What a run will take, before the machine is rented: its real step, compiled for devices that need not be there.

Memory is what the compiler allotted; FLOPs are counted in the program before it is compiled, collectives and traffic
with the memory in the compiled one. Times are bounds from these and the chip's published peaks, no measurements. This
module reads no data and runs nothing; it knows the step, the machine and what chips are said to do.
"""

import dataclasses
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from t5x_lite import sharding
from t5x_lite.metrics.hardware import GIB
from t5x_lite.model import remat
from t5x_lite.model.interface import ModelConfig, model_of
from t5x_lite.plan import hlo
from t5x_lite.plan.topologies import Topology
from t5x_lite.training import step
from t5x_lite.training.losses import LossConfig
from t5x_lite.training.optim import Optimizer


@dataclasses.dataclass
class Memory:
    """Bytes on each device, as the compiler counts them, with the padding of its layouts.

    needed: all together; outputs that take an argument's place (aliased) count once. The others are unknown (None)
    where the compiler refused the program for its size and said no more.
    """

    needed: int
    arguments: int | None = None
    outputs: int | None = None
    aliased: int | None = None
    temporaries: int | None = None
    program: int | None = None


@dataclasses.dataclass
class Times:
    """Seconds for a step if one thing alone bounded it, at the published peak; None: unknown.

    compute: matrix products, what remat repeats included. memory: traffic with HBM. links, network: collectives inside
    a slice (host), and between slices (hosts).
    """

    compute: float | None = None
    memory: float | None = None
    links: float | None = None
    network: float | None = None

    @property
    def bound(self) -> float | None:
        known = [seconds for seconds in vars(self).values() if seconds is not None]
        return max(known, default=None)


@dataclasses.dataclass
class Plan:
    """Bytes are of each device. `parameters` ... `batch` follow from shapes and shardings, without padding."""

    topology: str
    devices: int
    compiled_for: str
    mesh: dict[str, int]
    batch_size: int
    lengths: dict[str, int]
    remat: str
    num_microbatches: int
    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    memory: Memory
    capacity: float | None
    flops: float
    executed_flops: float
    collectives: dict[str, hlo.Collectives]
    traffic: float | None
    times: Times
    step_seconds: float | None
    mfu: float | None
    compile_seconds: float
    decode_memory: Memory | None = None

    @property
    def fits(self) -> bool | None:
        """None: the capacity is not known."""
        return None if self.capacity is None else self.memory.needed <= self.capacity


def of_step(
    topology: Topology,
    compiler: step.Compiler,
    abstract: step.TrainState,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    *,
    config: ModelConfig,
    optimizer: Optimizer,
    loss: LossConfig,
    lengths: Mapping[str, int],
    num_microbatches: int = 1,
    rng_impl: str = "threefry2x32",
    on_paper: bool = False,
) -> Plan:
    """Compiles one training step for `topology`.

    Args:
      abstract, batch: shapes and shardings of the state and of a global batch, on the compiler's mesh.
      lengths: of the features in a row.
      on_paper: do not compile what cannot fit by `least_memory`; that is then the plan's memory.
    """
    key = jax.eval_shape(lambda: jax.random.key(0, impl=rng_impl))
    train_step = compiler.train_step(
        abstract, config=config, optimizer=optimizer, loss=loss, num_microbatches=num_microbatches
    )
    traced = train_step.trace(abstract, batch, key)
    mesh, batch_size = compiler.mesh, next(iter(batch.values())).shape[0]
    least = least_memory(config, compiler, abstract, batch, num_microbatches) if on_paper else 0
    if least > (topology.chip.memory or math.inf):
        memory, compiled, seconds = Memory(int(least)), None, 0.0
    else:
        memory, compiled, seconds = compile_within(traced.lower(), topology)
    flops = model_of(config).flops(batch_size, lengths)
    plan = Plan(
        topology=topology.name,
        devices=mesh.size,
        compiled_for=topology.chip.name if topology.real else "cpu",
        mesh=dict(mesh.shape),
        batch_size=batch_size,
        lengths=dict(lengths),
        remat=config.remat,
        num_microbatches=num_microbatches,
        parameters=step.param_count(abstract.params),
        parameter_bytes=shard_bytes(abstract.params),
        optimizer_bytes=shard_bytes(abstract.opt_state),
        batch_bytes=shard_bytes(batch),
        memory=memory,
        capacity=topology.chip.memory or None,
        flops=flops,
        executed_flops=matmul_flops(traced.jaxpr),
        collectives={},
        traffic=None,
        times=Times(),
        step_seconds=None,
        mfu=None,
        compile_seconds=seconds,
    )
    if compiled is not None:
        program = hlo.Program(compiled.as_text())
        domains = topology.domain_of
        plan.collectives = program.collectives(plan.devices, [domains[d] for d in mesh.devices.flat])
        if topology.real:
            plan.traffic = program.memory_traffic()
        plan.times = bounds(plan, topology)
        plan.step_seconds = plan.times.bound
        if plan.step_seconds:
            plan.mfu = flops / plan.step_seconds / plan.devices / topology.chip.flops
    return plan


def least_memory(
    config: ModelConfig,
    compiler: step.Compiler,
    abstract: step.TrainState,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    num_microbatches: int = 1,
) -> float:
    """Bytes on each device below which no compiled step can stay: state, gradients, logits and saved activations.

    Of what the backward pass is traced to save a compiler may recompute cheap parts, so half of it counts, and that as
    if it were divided over all devices.
    """
    rows = next(iter(batch.values())).shape[0] // num_microbatches
    part = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    model = model_of(config)

    def saved(params: Any, part: Any) -> Any:
        with sharding.use_mesh(compiler.mesh, compiler.rules):
            return jax.vjp(lambda params: model.logits(params, part, jax.random.key(0)), params)

    leaves = jax.tree.leaves(jax.eval_shape(saved, abstract.params, part))
    held = sum(x.size * x.dtype.itemsize for x in leaves if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))
    held -= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.params))
    return shard_bytes(abstract) + shard_bytes(abstract.params) + max(held, 0) / 2 / compiler.mesh.size


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's part of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)


def compile_within(lowered: Any, topology: Topology) -> tuple[Memory, Any | None, float]:
    """Memory, the compiled program and the seconds that it took; None: it is larger than the chip's memory."""
    start = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        # The TPU's compiler refuses what does not fit, which is an answer to what is asked here.
        said = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not said:
            raise
        size, unit = (said[1], said[2]) if said[1] else (said[3], said[4])
        return Memory(int(float(size) * 1024 ** ("KMGT".index(unit) + 1))), None, time.monotonic() - start
    return memory_of(compiled), compiled, time.monotonic() - start


def memory_of(compiled: Any) -> Memory:
    """Returns what the compiler allotted to a compiled program."""
    m = compiled.memory_analysis()
    parts = (m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes, m.temp_size_in_bytes)
    program = m.generated_code_size_in_bytes
    return Memory(parts[0] + parts[1] - parts[2] + parts[3] + program, *parts, program)


# Of its attention, as JAX calls it: queries with keys, weights with values; backward these again, and four gradients.
CUDNN_PRODUCTS = {remat.CUDNN_FORWARD: 2, "dot_product_attention_bwd_wrapper": 5}


def matmul_flops(jaxpr: Any) -> float:
    """FLOPs of all matrix products in a traced program, of all devices together; what remat repeats counts again.

    A `while` that is no scan counts once, of the branches of a `cond` the dearest.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
            continue
        if name in CUDNN_PRODUCTS:
            query, key = (x.aval for x in equation.invars[:2])
            total += CUDNN_PRODUCTS[name] * 2.0 * query.size * key.shape[1]
            continue
        times = {"scan": params.get("length"), "shard_map": getattr(params.get("mesh"), "size", 1)}.get(name, 1)
        if name == "pallas_call":
            times = math.prod(params["grid_mapping"].grid)
        inner = [matmul_flops(j) for value in params.values() for j in _jaxprs(value)]
        if inner:
            total += times * (max(inner) if name == "cond" else sum(inner))
    return total


def _jaxprs(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if hasattr(getattr(item, "jaxpr", item), "eqns"):
            yield item


def bounds(plan: Plan, topology: Topology) -> Times:
    chip = topology.chip
    if not chip.flops:
        return Times()
    inside = sum(found.bytes for found in plan.collectives.values())
    between = sum(found.network_bytes for found in plan.collectives.values())
    return Times(
        compute=plan.executed_flops / plan.devices / chip.flops,
        memory=None if plan.traffic is None else plan.traffic / chip.memory_bandwidth,
        links=inside / chip.link_bandwidth,
        network=between / chip.network_bandwidth if chip.network_bandwidth else None,
    )


# What is said of it


def table(plan: Plan) -> str:
    """The plan as lines of text."""
    m, t = plan.memory, plan.times
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lengths = " / ".join(str(length) for length in plan.lengths.values())
    capacity = "" if plan.capacity is None else f" of {gib(plan.capacity)}"
    fits = {True: "fits", False: "DOES NOT FIT", None: "the device's memory is not known"}[plan.fits]
    lines = [
        ("topology", f"{plan.topology}: {plan.devices} device(s), mesh {mesh}"),
        ("batch", f"{plan.batch_size} rows of {lengths}, {plan.num_microbatches} micro-batch(es), remat {plan.remat}"),
        ("parameters", f"{plan.parameters:,}"),
        ("memory a device", f"{gib(m.needed)}{capacity}: {fits}"),
    ]
    for name, value in (
        ("  parameters", plan.parameter_bytes),
        ("  optimizer", plan.optimizer_bytes),
        ("  batch", plan.batch_bytes),
        ("  arguments", m.arguments),
        ("  temporaries", m.temporaries),
        ("  outputs", m.outputs),
        ("  of them in arguments' place", m.aliased),
        ("  program", m.program),
    ):
        lines.append((name, "unknown: the compiler refused" if value is None else gib(value)))
    extra = plan.executed_flops / plan.flops - 1
    lines.append(("FLOPs a step", f"{plan.flops:.3e} (and {extra:.0%} more are computed: remat and such)"))
    for kind, found in sorted(plan.collectives.items()):
        further = f", and {gib(found.network_bytes)} to other slices or hosts" if found.network_bytes else ""
        lines.append((kind, f"{found.count:,} a step, each device sends {gib(found.bytes)}{further}"))
    if plan.traffic is not None:
        lines.append(("traffic with memory", f"{gib(plan.traffic)} a device and step"))
    if plan.step_seconds and plan.mfu:
        parts = [f"{name} {seconds * 1e3:.1f}" for name, seconds in vars(t).items() if seconds is not None]
        lines.append(("bounds, ms", ", ".join(parts)))
        tokens = plan.batch_size * sum(plan.lengths.values()) / plan.step_seconds
        lines.append(
            ("a step takes at least", f"{plan.step_seconds * 1e3:.1f} ms: MFU {plan.mfu:.0%}, {tokens:,.0f} tokens/s")
        )
    if plan.decode_memory is not None:
        lines.append(("memory to decode", f"{gib(plan.decode_memory.needed)}{capacity}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in [*lines, *(("", n) for n in _notes(plan))])


def _notes(plan: Plan) -> list[str]:
    notes = []
    if plan.step_seconds:
        notes.append("a bound, the largest of those above, each at the published peak; real steps take longer")
    if plan.compiled_for == "cpu" and plan.capacity is not None:
        notes.append("no JAX for NVIDIA GPUs is installed: temporaries are those of the program that CPUs get, which")
        notes.append("computes bfloat16 in float32; for the real ones: pip install -r requirements-gpu.txt")
    return notes


def gib(size: float | int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.2f} MiB"
