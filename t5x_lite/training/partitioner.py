"""The device mesh, the sharded shapes of the train state, and functions compiled for both, as in T5X's partitioner.

It must not depend on text, SeqIO or TensorFlow.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from t5x_lite import sharding
from t5x_lite.errors import UserError
from t5x_lite.model.config import ModelConfig
from t5x_lite.training import step
from t5x_lite.training.optim import Optimizer


class Partitioner:
    """The device mesh and the sharded shapes of the train state.

    Args:
      config, optimizer: model and optimizer, which determine the state.
      mesh: the size of each mesh axis; -1 takes the remaining devices.
      rules: (logical axis, mesh axis) pairs; None means sharding.RULES.
      batch_rows: "NAME" -> number of rows on the devices at a time; each must divide over the mesh's batch axes.
      devices: devices of the mesh, which need not exist (for a plan); None means all devices.

    Raises:
      UserError: the sizes do not fit the devices. No data is read before.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: Optimizer,
        *,
        mesh: Mapping[str, int],
        rules: sharding.Rules | None = None,
        batch_rows: Mapping[str, int],
        devices: Sequence[Any] | None = None,
    ):
        if devices is None and jax.process_count() > 1 and not jax.distributed.is_initialized():
            raise UserError(
                "the devices belong to several processes, but JAX distributed is not initialised: give "
                "--coordinator_address, --process_count and --process_index"
            )
        if unknown := set(mesh) - set(sharding.MESH_AXES):
            raise UserError(f"MESH has no axis {unknown.pop()!r}: its axes are {', '.join(sharding.MESH_AXES)}")
        sizes = (mesh.get(axis, 1) for axis in sharding.MESH_AXES)
        self.mesh = sharding.make_mesh(*sizes, devices=devices)
        self.rules = rules or sharding.RULES
        parts = sharding.batch_parts(self.mesh, self.rules)
        for name, rows in batch_rows.items():
            if rows % parts:
                raise UserError(f"{name} = {rows} does not divide over the {parts} parts of the mesh's batch axes")
        self.compiler = step.Compiler(self.mesh, self.rules)
        self.abstract = step.abstract_state(config, optimizer, self.mesh, self.rules)
        self.batch_sharding = sharding.batch_sharding(self.mesh, self.rules)

    def with_params(self, function: Callable, **options: Any) -> Callable:
        """Compile `function(params, batch, **options)`; every host can read its results."""
        return self.compiler.with_params(function, self.abstract, **options)

    def train_step(self, **options: Any) -> Callable:
        """Compile `step.train_step` with these options; the old state is donated to the new one."""
        return self.compiler.train_step(self.abstract, **options)

    def local_rows(self, batch_size: int) -> tuple[int, int]:
        """Return the first and last + 1 of the rows of a global batch that are on this host's devices.

        Raises ValueError if they are not contiguous.
        """
        row_slices = self.batch_sharding.addressable_devices_indices_map((batch_size,)).values()
        parts = {rows[0].indices(batch_size)[:2] for rows in row_slices if rows is not None}
        first, last = min(start for start, _ in parts), max(end for _, end in parts)
        if sum(end - start for start, end in parts) != last - first:
            raise UserError(
                f"the devices of this host hold the rows {sorted(parts)} of a batch, which are not contiguous; "
                f"MESH = {dict(self.mesh.shape)} over {jax.process_count()} hosts: let data and fsdp span whole hosts"
            )
        return first, last

    def __str__(self) -> str:
        axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        device = self.mesh.devices.flat[0]
        return f"{self.mesh.size} x {device.device_kind} ({device.platform}) on {jax.process_count()} host(s): {axes}"
