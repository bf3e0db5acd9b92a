"""Suggest the mesh, remat policy and number of micro-batches that fit a topology and have the best step-time bound.

A setting whose estimated memory already exceeds the chip's is not compiled. Mesh names are those in gin_configs/mesh.
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

# As in gin_configs/mesh/*.gin. The first needs the least memory and supports every model.
MESHES: dict[str, Mapping[str, int]] = {
    "fsdp": {"data": 1, "fsdp": -1, "tensor": 1},
    "data": {"data": -1, "fsdp": 1, "tensor": 1},
    "fsdp_tensor": {"data": 1, "fsdp": -1, "tensor": 2},
}


class Setting(NamedTuple):
    """A combination to try; `name` is the mesh file in gin_configs/mesh."""

    name: str
    mesh: Mapping[str, int]
    remat: Remat
    num_microbatches: int


Make = Callable[[Setting], Plan]


def best(make: Make, batch_size: int, topology: Topology) -> tuple[Setting, Plan]:
    """Return the setting that fits and has the lowest step-time bound, and its plan; print all compiled settings.

    On the first mesh that fits the model, every remat policy is compiled with the fewest micro-batches that fit. The
    best policy is then tried on the other meshes.

    Args:
      make: compiles a setting if it may fit (`on_paper` of plan.of_step).
      batch_size: rows of a global batch, the upper limit of micro-batches.

    Raises:
      UserError: no setting fits.
    """
    fitting: list[tuple[Setting, Plan]] = []
    errors: list[ValueError | None] = []
    policies: tuple[Remat, ...] = get_args(Remat)
    print(f"{'mesh':12} {'REMAT':8} {'NUM_MICROBATCHES':16}  memory a device  step at least")
    for name, mesh in MESHES.items():
        settings = (_fewest_parts(make, batch_size, name, mesh, remat, errors) for remat in policies)
        candidates = [setting for setting in settings if setting]
        fitting += candidates
        if candidates:
            policies = (min(candidates, key=_seconds)[0].remat,)
    if not fitting and errors and None not in errors:
        raise UserError(str(errors[0]))  # an error that is not about memory and occurs on every mesh
    if not fitting:
        raise UserError(
            f"nothing fits {topology.name} on any of the meshes {', '.join(MESHES)}: use more or larger devices, "
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
    """Return the setting with the fewest micro-batches that fits; None if none does or the mesh is unsuitable.

    Appends to `errors` the error of each setting, or None if it could be planned.
    """
    parts = 1
    while parts <= batch_size:
        setting = Setting(name, mesh, remat, parts)
        line = f"{name:12} {remat:8} {parts:16}"
        try:
            plan = make(setting)
        except ValueError as error:
            log.info("%s  skipped: %s", line, error)
            errors.append(error)
            return None
        errors.append(None)
        if plan.compile_seconds == 0.0:
            log.info("%s  skipped: needs at least %s", line, gib(plan.memory.needed))
        else:
            seconds = "" if plan.step_seconds is None else f"{plan.step_seconds * 1e3:.1f} ms"
            note = "  does not fit" if plan.fits is False else ""
            print(f"{line}  {gib(plan.memory.needed):>15}  {seconds:>13}{note}", flush=True)
        if plan.fits is not False:
            return setting, plan
        parts *= 2
    return None
