"""Search settings around a run's own: batch sizes, meshes, remat policies, with the fewest micro-batches that fit.

The frontier has the settings to choose from: for each batch size those for which no other needs less memory and has as
good a bound on the step time. What is unlikely to be on it, or whose estimated memory exceeds the chip's, is not
compiled. Mesh names are those in gin_configs/mesh.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
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
LARGER_BATCHES = (2, 4)  # times the run's own
WORTHWHILE = 1.01  # gain of throughput for which a larger batch is tried


class Setting(NamedTuple):
    """A combination to try; `name` is the mesh file in gin_configs/mesh, or "" for a mesh of the run's own."""

    batch_size: int
    name: str
    mesh: Mapping[str, int]
    remat: Remat
    num_microbatches: int

    @property
    def flags(self) -> str:
        mesh = f"--gin_file=mesh/{self.name}.gin" if self.name else f'--gin.MESH="{dict(self.mesh)}"'
        return f"{mesh} --gin.REMAT=\"'{self.remat}'\" --gin.NUM_MICROBATCHES={self.num_microbatches}"

    def __str__(self) -> str:
        mesh = self.name or ", ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        return f"{self.batch_size} rows, mesh {mesh}, REMAT {self.remat}, {self.num_microbatches} micro-batch(es)"


class Candidate(NamedTuple):
    setting: Setting
    plan: Plan

    @property
    def seconds(self) -> float:
        """The bound on the step time; of a chip whose rates are unknown the FLOPs, which rank settings likewise."""
        return self.plan.executed_flops if self.plan.step_seconds is None else self.plan.step_seconds


def frontier(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that are best for their batch size, by batch size and memory.

    Any other with that batch size needs more memory or takes longer than one of them; of equal ones the first is kept.
    The last one of a batch size is the quickest.
    """
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.setting.batch_size, c.plan.memory.needed, c.seconds)):
        new_batch = not kept or kept[-1].setting.batch_size != candidate.setting.batch_size
        if new_batch or candidate.seconds < kept[-1].seconds:
            kept.append(candidate)
    return kept


def meshes(own: Mapping[str, int]) -> dict[str, Mapping[str, int]]:
    """Return the meshes to try: the usual ones, and the run's own, without a name, if it is another."""
    full = {"data": 1, "fsdp": 1, "tensor": 1} | dict(own)
    return MESHES if full in MESHES.values() else {**MESHES, "": own}


@dataclasses.dataclass
class Search:
    """The plans compiled so far.

    make: compiles a setting if it may fit (`on_paper` of plan.of_step).
    batch_size: rows of the run's global batch.
    mesh: the run's own.
    """

    make: Callable[[Setting], Plan]
    batch_size: int
    mesh: Mapping[str, int]
    topology: Topology
    compiled: list[Candidate] = dataclasses.field(default_factory=list)
    too_large: list[Setting] = dataclasses.field(default_factory=list)
    error: ValueError | None = None  # the first setting's that could not be planned

    def run(self) -> Candidate:
        """Compile what may be on the frontier; return the quickest candidate that has the run's own batch size.

        On the first mesh that fits the model every remat policy is compiled. Unless the quickest is bound by compute,
        those on the frontier follow on other meshes, the quickest first, as long as they improve on it. The frontier is
        then compiled for other batch sizes, larger ones as long as they raise the throughput's bound.

        Raises:
          UserError: no setting fits.
        """
        for name, mesh in meshes(self.mesh).items():
            self._try_mesh(name, mesh)
        if not self.fitting:
            raise UserError(
                str(self.error)
                if self.error and not self.too_large  # not about memory, and on every mesh
                else f"nothing fits {self.topology.name} on any of the meshes {', '.join(filter(None, MESHES))}: use "
                "more or larger devices, or a smaller BATCH_SIZE"
            )
        own = frontier(self.fitting)
        if self.batch_size % 2 == 0:
            self._try_batch(self.batch_size // 2, own)
        throughput = self._throughput(self.batch_size)
        for times in LARGER_BATCHES:
            self._try_batch(times * self.batch_size, own)
            before, throughput = throughput, self._throughput(times * self.batch_size)
            if throughput < WORTHWHILE * before:
                break
        return own[-1]

    @property
    def fitting(self) -> list[Candidate]:
        return [candidate for candidate in self.compiled if candidate.plan.fits is not False]

    def _try_mesh(self, name: str, mesh: Mapping[str, int]) -> None:
        policies: tuple[Remat, ...] = get_args(Remat)
        if not self.fitting:
            for remat in policies:
                self._fewest_parts(self.batch_size, name, mesh, remat)
            return
        if len(self.topology.devices) == 1:
            return  # all meshes are the same
        best = frontier(self.fitting)
        if best[-1].plan.step_seconds and best[-1].plan.step_seconds == best[-1].plan.times.compute:
            return  # no mesh is quicker, and the first needs the least memory
        remats: list[Remat] = [candidate.setting.remat for candidate in reversed(best)]
        for remat in dict.fromkeys(remats):
            candidate = self._fewest_parts(self.batch_size, name, mesh, remat)
            if candidate not in frontier(self.fitting):
                return

    def _try_batch(self, batch_size: int, own: list[Candidate]) -> None:
        for candidate in own:
            setting = candidate.setting
            self._fewest_parts(batch_size, setting.name, setting.mesh, setting.remat)

    def _throughput(self, batch_size: int) -> float:
        rates = (batch_size / c.seconds for c in self.fitting if c.setting.batch_size == batch_size)
        return max(rates, default=0.0)

    def _fewest_parts(self, batch_size: int, name: str, mesh: Mapping[str, int], remat: Remat) -> Candidate | None:
        """Return the candidate with the fewest micro-batches that fits; None if none does or the mesh is unsuitable."""
        for power in range(batch_size.bit_length()):
            setting = Setting(batch_size, name, mesh, remat, num_microbatches=2**power)
            if any(needs_as_much(setting, other) for other in self.too_large):
                continue
            try:
                plan = self.make(setting)
            except ValueError as error:
                log.info("%s: skipped: %s", setting, error)
                self.error = self.error or error
                return None
            candidate = Candidate(setting, plan)
            if plan.compile_seconds == 0.0:
                log.info("%s: needs at least %s", setting, gib(plan.memory.needed))
            else:
                self.compiled.append(candidate)
                seconds = "" if plan.step_seconds is None else f", at least {plan.step_seconds * 1e3:.1f} ms"
                log.info("%s: %s%s", setting, gib(plan.memory.needed), seconds)
            if plan.fits is not False:
                return candidate
            self.too_large.append(setting)
        return None


def needs_as_much(setting: Setting, other: Setting) -> bool:
    """Return whether a setting has as many rows at once as another, and a sum of gradients if that has one."""
    rows, other_rows = (s.batch_size / s.num_microbatches for s in (setting, other))
    same = (setting.name, setting.remat) == (other.name, other.remat)
    return same and rows >= other_rows and min(setting.num_microbatches, 2) >= min(other.num_microbatches, 2)
