"""Which mesh, remat policy and number of micro-batches fit a topology, and which of them should be the quickest.

Few are compiled: what cannot fit by a count on paper is left out. It knows plans, and nothing of gin files but the
names of those in gin_configs/mesh.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, get_args

from t5x_lite.errors import UserError
from t5x_lite.model.config import Remat
from t5x_lite.plan import Plan, gib
from t5x_lite.plan.topologies import Topology

log = logging.getLogger("t5x_lite")

# As in gin_configs/mesh/*.gin, the thriftiest with memory that goes with every model first.
MESHES: dict[str, Mapping[str, int]] = {
    "fsdp": {"data": 1, "fsdp": -1, "tensor": 1},
    "data": {"data": -1, "fsdp": 1, "tensor": 1},
    "fsdp_tensor": {"data": 1, "fsdp": -1, "tensor": 2},
}


class Setting(NamedTuple):
    """One of the combinations that are tried; `name` is the mesh's in gin_configs/mesh."""

    name: str
    mesh: Mapping[str, int]
    remat: Remat
    num_microbatches: int


Make = Callable[[Setting], Plan]


def best(make: Make, batch_size: int, topology: Topology) -> tuple[Setting, Plan]:
    """The setting that fits and has the best bound on the step's time, and its plan; prints all that was compiled.

    On the first mesh that can hold the model each remat policy is compiled, with the fewest micro-batches that fit; the
    best of these is then tried on the other meshes.

    Args:
      make: compiles a setting, where it may fit (`on_paper` of plan.of_step).
      batch_size: rows of a global batch, the most micro-batches that are tried.

    Raises:
      UserError: nothing fits.
    """
    fitting: list[tuple[Setting, Plan]] = []
    errors: list[ValueError | None] = []
    policies: tuple[Remat, ...] = get_args(Remat)
    print(f"{'mesh':12} {'REMAT':8} {'NUM_MICROBATCHES':16}  memory a device  step at least")
    for name, mesh in MESHES.items():
        of_mesh = [plan for remat in policies if (plan := _fewest_parts(make, batch_size, name, mesh, remat, errors))]
        fitting += of_mesh
        if of_mesh:
            policies = (min(of_mesh, key=_seconds)[0].remat,)
    if not fitting and errors and None not in errors:
        raise UserError(str(errors[0]))  # not the memory, but something that no mesh puts right
    if not fitting:
        raise UserError(
            f"nothing fits {topology.name} on any of the meshes {', '.join(MESHES)}: take more or larger devices, "
            "or a smaller BATCH_SIZE"
        )
    setting, plan = min(fitting, key=_seconds)
    print(
        f"suggested: --gin_file=mesh/{setting.name}.gin --gin.REMAT=\"'{setting.remat}'\" "
        f"--gin.NUM_MICROBATCHES={setting.num_microbatches}\n"
    )
    return setting, plan


def _seconds(candidate: tuple[Setting, Plan]) -> float:
    return candidate[1].step_seconds or math.inf


def _fewest_parts(
    make: Make,
    batch_size: int,
    name: str,
    mesh: Mapping[str, int],
    remat: Remat,
    errors: list[ValueError | None],
) -> tuple[Setting, Plan] | None:
    """The setting with the fewest micro-batches that fit; None: none do, or the mesh does not suit model and batch.

    Adds to `errors` why a setting could not be planned, and None for each that could.
    """
    parts = 1
    while parts <= batch_size:
        setting = Setting(name, mesh, remat, parts)
        line = f"{name:12} {remat:8} {parts:16}"
        try:
            plan = make(setting)
        except ValueError as error:
            log.info("%s  left out: %s", line, error)
            errors.append(error)
            return None
        errors.append(None)
        if plan.compile_seconds == 0.0:
            log.info("%s  left out: needs %s at least", line, gib(plan.memory.needed))
        else:
            seconds = "" if plan.step_seconds is None else f"{plan.step_seconds * 1e3:.1f} ms"
            note = "  does not fit" if plan.fits is False else ""
            print(f"{line}  {gib(plan.memory.needed):>15}  {seconds:>13}{note}", flush=True)
        if plan.fits is not False:
            return setting, plan
        parts *= 2
    return None
