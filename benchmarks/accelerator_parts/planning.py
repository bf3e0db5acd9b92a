"""Part 9: the predictions of `--mode=plan` for the steps that were measured: memory, and a bound on the time.

It compiles for the device by name and runs nothing, so that it can follow later, on a machine without the device:
`--only=plan`. For GPUs that needs JAX's CUDA packages.
"""

import dataclasses
import types
from typing import Any

import jax

from benchmarks.accelerator_parts.child import Item, Settings, Unavailable
from benchmarks.accelerator_parts.train import Variant
from benchmarks.train_step import Shape, make_optimizer, synthetic_batch
from t5x_lite import plan, sharding
from t5x_lite.metrics import hardware
from t5x_lite.plan import topologies
from t5x_lite.training import step
from t5x_lite.training.losses import LossConfig

ON_DEVICE = False


def items(settings: Settings) -> list[Item]:
    devices = list(settings.results.measured("device").values())
    lines = settings.results.measured("train")
    if not devices or not lines:
        raise Unavailable("no training step has been measured yet")
    topology = topologies.find(topology_name(devices[0]))
    return [Item(key, lambda line=line: measure(topology, line)) for key, line in lines.items()]


def topology_name(device: dict[str, Any]) -> str:
    """Returns the name of the smallest topology with this kind of device."""
    if device["platform"] == "cpu":
        return "cpu:1"
    chip = hardware.of_device(types.SimpleNamespace(device_kind=device["device"]))
    if chip is None:
        raise Unavailable(f"the table of chips does not have {device['device']}")
    return f"{chip.name}:{chip.shapes[0] if chip.shapes else 1}"


def measure(topology: topologies.Topology, line: dict[str, Any]) -> dict[str, Any]:
    config = Variant(**{field.name: line[field.name] for field in dataclasses.fields(Variant)}).config()
    compiler, optimizer = step.Compiler(sharding.make_mesh(1, devices=topology.devices[:1])), make_optimizer()
    shape = Shape(line["batch_size"], line["inputs"], line["targets"], packed=True)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(compiler.mesh))
        for name, x in synthetic_batch(shape, config.vocab_size).items()
    }
    result = plan.of_step(
        topology,
        compiler,
        step.abstract_state(config, optimizer, compiler.mesh),
        batch,
        config=config,
        optimizer=optimizer,
        loss=LossConfig(),
        lengths={"inputs": shape.inputs, "targets": shape.targets},
    )
    seconds = result.step_seconds
    return {
        "topology": result.topology,
        "compiled_for": result.compiled_for,
        "batch_size": shape.batch_size,
        "needed_gb": round(result.memory.needed / 2**30, 3),
        "bound_seconds": seconds,
        "bound_sequences_per_second": round(shape.batch_size / seconds, 2) if seconds else None,
    }
