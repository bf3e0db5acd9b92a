"""Which mesh, remat policy and number of micro-batches fit a topology, and which of them should be the quickest.

Few are compiled: what cannot fit by a count on paper is left out. It knows plans, and nothing of gin files but the
names of those in gin_configs/mesh.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import get_args

from t5x_lite.bert import BertConfig
from t5x_lite.config import Remat
from t5x_lite.errors import UserError
from t5x_lite.machine import Machine
from t5x_lite.plan import Plan, gib, make, shard_bytes
from t5x_lite.plan.topologies import Topology
from t5x_lite.run_config import RunConfig

log = logging.getLogger("t5x_lite")

# As in gin_configs/mesh/*.gin, the thriftiest with memory that goes with every model first.
MESHES: dict[str, Mapping[str, int]] = {
    "fsdp": {"data": 1, "fsdp": -1, "tensor": 1},
    "data": {"data": -1, "fsdp": 1, "tensor": 1},
    "fsdp_tensor": {"data": 1, "fsdp": -1, "tensor": 2},
}


def best(run: RunConfig, topology: Topology) -> tuple[RunConfig, Plan]:
    """The run with what fits and has the best bound on the step's time, and its plan; prints all that was compiled.

    On the first mesh that can hold the model each remat policy is compiled, with the fewest micro-batches that fit; the
    best of these is then tried on the other meshes.

    Raises:
      ValueError: nothing fits.
    """
    fitting: list[tuple[str, RunConfig, Plan]] = []
    policies: tuple[Remat, ...] = get_args(Remat)
    print(f"{'mesh':12} {'REMAT':8} {'NUM_MICROBATCHES':16}  memory a device  step at least")
    for name, mesh in MESHES.items():
        here = [(name, *found) for remat in policies if (found := _fewest_parts(run, topology, name, mesh, remat))]
        fitting += here
        if here:
            policies = (min(here, key=_seconds)[1].model.remat,)
    if not fitting:
        raise UserError(
            f"nothing fits {topology.name} on any of the meshes {', '.join(MESHES)}: take more or larger devices, "
            "or a smaller BATCH_SIZE"
        )
    name, found, plan = min(fitting, key=_seconds)
    print(
        f"suggested: --gin_file=mesh/{name}.gin --gin.REMAT=\"'{found.model.remat}'\" "
        f"--gin.NUM_MICROBATCHES={found.num_microbatches}\n"
    )
    return found, plan


def _seconds(candidate: tuple[str, RunConfig, Plan]) -> float:
    return candidate[2].step_seconds or math.inf


def _fewest_parts(
    run: RunConfig, topology: Topology, name: str, mesh: Mapping[str, int], remat: Remat
) -> tuple[RunConfig, Plan] | None:
    """The run with the fewest micro-batches that fit; None: none do, or the mesh does not go with model and batch."""
    parts = 1
    while parts <= run.batch_size:
        model = dataclasses.replace(run.model, remat=remat)
        setting = f"{name:12} {remat:8} {parts:16}"
        try:
            tried = dataclasses.replace(run, model=model, mesh=mesh, num_microbatches=parts)
            least = least_memory(tried, Machine(tried, topology.devices))
        except ValueError as error:
            log.info("%s  left out: %s", setting, error)
            return None
        if topology.chip.memory and least > topology.chip.memory:
            log.info("%s  left out: needs %s at least", setting, gib(least))
        else:
            plan = make(tried, topology)
            seconds = "" if plan.step_seconds is None else f"{plan.step_seconds * 1e3:.1f} ms"
            note = "  does not fit" if plan.fits is False else ""
            print(f"{setting}  {gib(plan.memory.needed):>15}  {seconds:>13}{note}", flush=True)
            if plan.fits is not False:
                return tried, plan
        parts *= 2
    return None


def least_memory(run: RunConfig, machine: Machine) -> float:
    """Bytes on each device that no compiler can do without: state, gradients and what the backward pass is left with.

    Of each layer "full" remat keeps its input, "minimal" its matrix products with parameters as well, "none" the
    attention's weights, too, where no fused kernel does without them.
    """
    c, lengths = run.model, run.task_feature_lengths
    state = shard_bytes(machine.abstract) + shard_bytes(machine.abstract.params)
    if isinstance(c, BertConfig):
        return state
    S, T = lengths.get("inputs", 0), lengths["targets"]
    if c.decoder_only:
        S, T = 0, S + T
    rows = run.batch_size / run.num_microbatches / (machine.mesh.shape["data"] * machine.mesh.shape["fsdp"])
    tensor = machine.mesh.shape["tensor"]
    width, joined = c.compute_dtype.itemsize, c.num_heads * c.head_dim / tensor
    encoder, decoder = S * c.d_model, T * c.d_model
    if c.remat != "full":
        mlp = len(c.mlp_activations) * c.d_ff / tensor
        encoder += S * (4 * joined + c.d_model + mlp)
        decoder += T * (4 * joined + c.d_model + mlp)
        if not c.decoder_only:
            decoder += T * (2 * joined + c.d_model) + S * 2 * joined
    may_fuse = machine.mesh.devices.flat[0].platform != "cpu" and c.attention in (None, "flash", "cudnn")
    if c.remat == "none" and not may_fuse:
        encoder += c.num_heads / tensor * S * S
        decoder += c.num_heads / tensor * T * (T + S)
    kept = rows * width * (c.num_encoder_layers * encoder + c.num_decoder_layers * decoder)
    return state + kept + rows * T * c.vocab_size / tensor * 4  # the last: logits
