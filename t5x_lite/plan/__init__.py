"""Plan a run's memory and step time by compiling its training step for hardware that you do not have.

Memory is what the compiler allocates. FLOPs are counted in the traced program; collectives and memory traffic in the
compiled one. Times are lower bounds from these numbers and the chip's published peak rates, not measurements. This
module reads no data and runs no program.
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
from t5x_lite.model.config import ModelConfig
from t5x_lite.model.families import model_of
from t5x_lite.plan import hlo
from t5x_lite.plan.topologies import Topology
from t5x_lite.training import step
from t5x_lite.training.losses import LossConfig
from t5x_lite.training.optim import Optimizer


@dataclasses.dataclass
class Memory:
    """Bytes per device, as counted by the compiler, including the padding of its layouts.

    needed: total; outputs that alias an argument count once. The other fields are None if the compiler rejected the
    program for its size.
    """

    needed: int
    arguments: int | None = None
    outputs: int | None = None
    aliased: int | None = None
    temporaries: int | None = None
    program: int | None = None


@dataclasses.dataclass
class Times:
    """Lower bounds of the step time in seconds, one for each resource, at published peak rates; None if unknown.

    compute: matrix products, including those repeated by remat. memory: HBM traffic. links, network: collectives within
    a slice (host), and between slices (hosts).
    """

    compute: float | None = None
    memory: float | None = None
    links: float | None = None
    network: float | None = None

    @property
    def bound(self) -> float | None:
        return max((seconds for seconds in vars(self).values() if seconds is not None), default=None)


@dataclasses.dataclass
class Plan:
    """The plan of one run. Bytes are per device; those of parameters, optimizer and batch exclude padding."""

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
        """Whether the step fits in memory; None if the capacity is unknown."""
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
    """Compile one training step for `topology`.

    Args:
      abstract, batch: shapes and shardings of the state and of a global batch, on the compiler's mesh.
      lengths: length of each feature.
      on_paper: skip the compilation if `least_memory` exceeds the chip's memory; the plan then reports `least_memory`.
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
    """Return a lower bound of the bytes per device of a step: state, gradients, logits and saved activations.

    The compiler may recompute cheap residuals of the backward pass, so half of their size counts, divided by the number
    of devices.
    """
    rows = next(iter(batch.values())).shape[0] // num_microbatches
    part = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    model = model_of(config)

    def saved(params: Any, part: Any) -> Any:
        with sharding.use_mesh(compiler.mesh, compiler.rules):
            return jax.vjp(lambda params: model.logits(params, part, jax.random.key(0)), params)

    leaves = jax.tree.leaves(jax.eval_shape(saved, abstract.params, part))
    residuals = sum(
        x.size * x.dtype.itemsize for x in leaves if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )
    residuals -= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.params))
    return shard_bytes(abstract) + shard_bytes(abstract.params) + max(residuals, 0) / 2 / compiler.mesh.size


def shard_bytes(tree: Any) -> int:
    """Return the bytes of one device's shards of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)


def compile_within(lowered: Any, topology: Topology) -> tuple[Memory, Any | None, float]:
    """Return memory, the compiled program (None if it exceeds the chip's memory) and the compile time in seconds."""
    start = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=topology.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        # The TPU compiler rejects a program that does not fit, and reports the size that it needs.
        match = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not match:
            raise
        size, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
        return Memory(int(float(size) * 1024 ** ("KMGT".index(unit) + 1))), None, time.monotonic() - start
    return memory_of(compiled), compiled, time.monotonic() - start


def memory_of(compiled: Any) -> Memory:
    """Return the memory that the compiler allocated to a compiled program."""
    m = compiled.memory_analysis()
    parts = (m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes, m.temp_size_in_bytes)
    program = m.generated_code_size_in_bytes
    return Memory(parts[0] + parts[1] - parts[2] + parts[3] + program, *parts, program)


# Matrix products per attention call, by JAX primitive. Forward: qk and weights times values. Backward: qk again and
# four gradients.
CUDNN_PRODUCTS = {remat.CUDNN_FORWARD: 2, "dot_product_attention_bwd_wrapper": 5}


def matmul_flops(jaxpr: Any) -> float:
    """Return the FLOPs of all matrix products in a traced program, for all devices, including those repeated by remat.

    A `while` loop that is not a scan counts once; of the branches of a `cond` the most expensive counts.
    """
    total = 0.0
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    used = {id(x) for x in (*jaxpr.outvars, *(x for equation in jaxpr.eqns for x in equation.invars))}
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "pallas_call" and not used.intersection(map(id, equation.outvars)):
            continue  # remat saves its results; JAX keeps the call, and XLA removes it
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
    """Return the lower bounds of the step time from the plan's counts and the chip's peak rates."""
    chip = topology.chip
    if not chip.flops:
        return Times()
    inside = sum(total.bytes for total in plan.collectives.values())
    between = sum(total.network_bytes for total in plan.collectives.values())
    return Times(
        compute=plan.executed_flops / plan.devices / chip.flops,
        memory=None if plan.traffic is None else plan.traffic / chip.memory_bandwidth,
        links=inside / chip.link_bandwidth,
        network=between / chip.network_bandwidth if chip.network_bandwidth else None,
    )


def table(plan: Plan) -> str:
    """Return the plan as text."""
    m, t = plan.memory, plan.times
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lengths = " / ".join(str(length) for length in plan.lengths.values())
    capacity = "" if plan.capacity is None else f" of {gib(plan.capacity)}"
    fits = {True: "fits", False: "DOES NOT FIT", None: "the device's memory is unknown"}[plan.fits]
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
        lines.append((name, "unknown: the compiler rejected the program" if value is None else gib(value)))
    extra = plan.executed_flops / plan.flops - 1
    lines.append(("FLOPs a step", f"{plan.flops:.3e} ({extra:.0%} more with remat and other overhead)"))
    for kind, total in sorted(plan.collectives.items()):
        network = f", and {gib(total.network_bytes)} to other slices or hosts" if total.network_bytes else ""
        lines.append((kind, f"{total.count:,} per step, each device sends {gib(total.bytes)}{network}"))
    if plan.traffic is not None:
        lines.append(("traffic with memory", f"{gib(plan.traffic)} per device and step"))
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
        notes.append("this is the largest of the bounds above, at published peak rates; real steps take longer")
    if plan.compiled_for == "cpu" and plan.capacity is not None:
        notes.append("JAX for NVIDIA GPUs is not installed: temporaries are those of a program compiled for CPU, which")
        notes.append("computes bfloat16 in float32; for exact numbers: pip install -r requirements-gpu.txt")
    return notes


def gib(size: float | int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:.2f} MiB"
