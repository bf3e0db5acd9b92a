"""Sharding of arrays: one device mesh, and rules from the parameters' logical axes to mesh axes.

The mesh has three axes. `data` replicates parameters and splits the batch; `fsdp` splits both; `tensor` splits heads,
MLP and vocabulary. A run may set other rules.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite.errors import UserError
from t5x_lite.sharding_rules import MESH_AXES, RULES, Rules

AnyMesh = Mesh | AbstractMesh  # with devices, or with axis sizes only

# Size in bytes above which a leaf that no axis splits, on a mesh that splits parameters, is an error.
LARGEST_REPLICATED = 2**23

_mesh_in_use: contextvars.ContextVar[tuple[AnyMesh, Rules] | None] = contextvars.ContextVar("mesh", default=None)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Create a mesh of all devices of all hosts. At most one axis may be -1, which takes the remaining devices.

    TPU slices, connected only by the data centre's network (DCN), are consecutive along `data`, so that only the
    gradients' all-reduce crosses them, once a step.
    """
    devices = jax.devices() if devices is None else devices
    sizes: dict[str, int] = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
    requested = ", ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh sizes must be positive, and at most one of them -1 (= the rest): got {requested}")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = len(devices) // taken
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh {requested} does not fit {len(devices)} {devices[0].platform} device(s): the product of its sizes "
            f"(MESH) must be {len(devices)}; one of them may be -1, the rest"
        )
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    if sizes["data"] % slices:
        raise UserError(
            f"mesh {requested}: there are {slices} slices, and data = {sizes['data']} must be a multiple, such as "
            f"--gin.MESH=\"{{'data': {slices}, 'fsdp': -1}}\""
        )
    slice_shape = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    if slices == 1:
        mesh_devices = mesh_utils.create_device_mesh(slice_shape, devices, allow_split_physical_axes=True)
    else:
        mesh_devices = mesh_utils.create_hybrid_device_mesh(
            slice_shape, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    # JAX's default, Explicit, does not support sharding constraints by logical axes.
    return Mesh(mesh_devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def use_mesh(mesh: AnyMesh, rules: Rules = RULES) -> Iterator[None]:
    """Set the mesh and rules that `constrain` uses while a function is traced."""
    token = _mesh_in_use.set((mesh, rules))
    try:
        yield
    finally:
        _mesh_in_use.reset(token)


def constrain(x: jax.Array, *axes: str | None, first: str | None = None) -> jax.Array:
    """Constrain the sharding of an activation by its logical axes. Does nothing outside `use_mesh`.

    Args:
      first: the logical axis that takes its mesh axes before all others, which are split over those that remain.
    """
    current = _mesh_in_use.get()
    if current is None:
        return x
    mesh, rules = current
    if first is not None:
        taken = _mesh_axes(next((of for axis, of in rules if axis == first), None))
        left = [(axis, tuple(a for a in _mesh_axes(of) if a not in taken)) for axis, of in rules if axis != first]
        rules = ((first, taken), *left)
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, rules, axes))


def _mesh_axes(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value or ()


def device() -> Any:
    """Return one of the devices that a function is traced for."""
    current = _mesh_in_use.get()
    mesh = None if current is None else current[0]
    return mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]


def part_shape(shape: Sequence[int], axes: Sequence[str | None]) -> tuple[int, ...] | None:
    """Return the shape of each device's shard of an array with these logical axes, or None if shards are not equal."""
    current = _mesh_in_use.get()
    if current is None:
        return tuple(shape)
    spec = named_sharding(*current, axes).spec
    parts = [_parts(current[0], mesh_axes) for mesh_axes in (*spec, *(None for _ in shape[len(spec) :]))]
    equal = all(size % n == 0 for size, n in zip(shape, parts, strict=True))
    return tuple(size // n for size, n in zip(shape, parts, strict=True)) if equal else None


def on_parts(
    function: Callable[..., jax.Array],
    arrays: Sequence[jax.Array | None],
    axes: Sequence[Sequence[str | None]],
    out_axes: Sequence[str | None],
) -> jax.Array:
    """Compute `function(*arrays)`, each device on its own shards, for kernels that XLA cannot partition.

    Args:
      axes: the logical axes of each array; shards must be equal, see `part_shape`.
      out_axes: the logical axes of the result.
    """
    current = _mesh_in_use.get()
    if current is None or current[0].size == 1:
        return function(*arrays)
    present = {n: x for n, x in enumerate(arrays) if x is not None}

    def local(*parts: jax.Array) -> jax.Array:
        part_of = dict(zip(present, parts, strict=True))
        return function(*map(part_of.get, range(len(arrays))))

    specs = tuple(named_sharding(*current, axes[n]).spec for n in present)
    out_specs = named_sharding(*current, out_axes).spec
    # Unchecked, because a Pallas kernel does not declare on which axes its results vary.
    mapped = jax.shard_map(local, mesh=current[0], in_specs=specs, out_specs=out_specs, check_vma=False)
    return mapped(*present.values())


def named_sharding(mesh: AnyMesh, rules: Rules, axes: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(mesh, nn.logical_to_mesh_axes(tuple(axes), tuple(rules)) or PartitionSpec())


def shard_state(state: Any, params: Mapping, mesh: AnyMesh, rules: Rules = RULES) -> Any:
    """Decide the sharding of the training state, for init, step and restore alike.

    Args:
      state: shapes of the whole state (a pytree from `jax.eval_shape`).
      params: shapes of the parameters, each in its Linen box with its logical axes.

    Returns:
      `state` with a sharding on each `jax.ShapeDtypeStruct`. A leaf whose path ends with a parameter's path and that
      has the same shape gets that parameter's sharding, so optimizer moments follow their parameter. Other leaves are
      replicated.

    Raises:
      ValueError: an axis does not divide, or a large leaf would be replicated. The message names leaf and cure.
    """
    boxes = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))[0]
    axes_of = {_names(path): (box.unbox().shape, box.names) for path, box in boxes}

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = _names(path)
        axes: Sequence[str | None] = (None,) * len(leaf.shape)
        for start in range(len(names)):
            shape, param_axes = axes_of.get(names[start:], (None, ()))
            if shape == leaf.shape:
                axes = param_axes
                break
        sharding = named_sharding(mesh, rules, axes)
        _check("/".join(names), leaf, axes, sharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _check(name: str, leaf: jax.ShapeDtypeStruct, axes: Sequence[str | None], sharding: NamedSharding) -> None:
    mesh, spec = sharding.mesh, sharding.spec
    for size, axis, mesh_axes in zip(leaf.shape, axes, spec, strict=False):
        mesh_axes = _mesh_axes(mesh_axes)
        if size % (parts := _parts(mesh, mesh_axes)):
            fits = [n for n in range(1, size + 1) if size % n == 0 and n <= mesh.size]
            raise UserError(
                f"{name} of shape {leaf.shape}: axis {axis!r} of size {size} does not divide over mesh axis "
                f"{'*'.join(mesh_axes)} = {parts}; sizes that do: {fits}"
            )
    size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 and sharding.is_fully_replicated and size > LARGEST_REPLICATED:
        raise UserError(
            f"{name} of shape {leaf.shape} ({size / 2**20:.0f} MiB) would be replicated on every device of the mesh "
            f"{dict(mesh.shape)}; its logical axes {tuple(axes)} match no rule that splits it"
        )


def batch_sharding(mesh: AnyMesh, rules: Rules = RULES) -> NamedSharding:
    """Return the sharding of a batch: rows are split over data and fsdp."""
    return named_sharding(mesh, rules, ("batch",))


def batch_parts(mesh: AnyMesh, rules: Rules = RULES) -> int:
    """Return the number of equal parts that the rows of a batch are split into."""
    spec = batch_sharding(mesh, rules).spec
    return _parts(mesh, spec[0] if spec else None)


def _parts(mesh: AnyMesh, axes: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(axes))


def shard_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Put this host's rows of a batch on the mesh, as part of the global batch."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
