"""Parameters that do not train, stored in fewer bits: bfloat16, or int8 for kernels (weights only).

A kernel W [..., I, O] in int8 is a node of two leaves, `int8` [..., I, O] and `scale` [..., O], float32: W is nearly
int8 * scale, and scale is the largest |W| of an output / 127, so an entry is off by at most half of the scale. Layers
multiply by `int8` and then by `scale`. Names of parameters elsewhere are those without these two. Must not depend on
layers, optimizers or files.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from t5x_lite.model.config import StoredDtype

INT8, SCALE = "int8", "scale"
_MOST = 127
_KERNEL = "kernel"


def is_quantized(node: Any) -> bool:
    return isinstance(node, Mapping) and INT8 in node


def stored(params: Any, dtype: StoredDtype) -> Any:
    """Return a tree of parameters, arrays or shapes with shardings, as stored in `dtype`; quantized ones stay so."""
    leaves = traverse_util.flatten_dict(params, sep="/")
    new: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if plain_name(name) != name:
            new[name] = leaf
        elif dtype == "int8" and name.split("/")[-1] == _KERNEL:
            new |= {f"{name}/{part}": x for part, x in _quantized(leaf).items()}
        else:
            new[name] = _cast(leaf, "bfloat16" if dtype == "int8" else dtype)
    return traverse_util.unflatten_dict(new, sep="/")


def _cast(leaf: Any, dtype: str) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)
    return leaf.astype(dtype)


def _quantized(leaf: Any) -> dict[str, Any]:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return quantized(leaf)
    scale_sharding = None
    if isinstance(leaf.sharding, NamedSharding):
        axes = (*leaf.sharding.spec, *(None,) * (len(leaf.shape) - len(leaf.sharding.spec)))
        scale_sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*axes[:-2], axes[-1]))
    shape = (*leaf.shape[:-2], leaf.shape[-1])
    return {
        INT8: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype("int8"), sharding=leaf.sharding),
        SCALE: jax.ShapeDtypeStruct(shape, jnp.dtype("float32"), sharding=scale_sharding),
    }


def quantized(kernel: Float[Array, "*layers I O"]) -> dict[str, Array]:
    scale = jnp.max(jnp.abs(kernel), axis=-2).astype(jnp.float32) / _MOST
    steps = kernel / jnp.where(scale == 0, 1.0, scale)[..., None, :]
    return {INT8: jnp.round(steps).astype(jnp.int8), SCALE: scale}


def placed(name: str, kernel: Float[Array, "*layers I O"], abstract_params: Any) -> dict[str, Array]:
    """Return the leaves of a kernel, "a/b/c" -> array, with their shardings in `abstract_params`."""
    leaves: dict[str, Any] = traverse_util.flatten_dict(abstract_params, sep="/")
    shardings = {part: leaves[f"{name}/{part}"].sharding for part in (INT8, SCALE)}
    return {f"{name}/{k}": x for k, x in jax.jit(quantized, out_shardings=shardings)(kernel).items()}


def plain_name(name: str) -> str:
    """Return the name of the parameter that a leaf belongs to."""
    whole, _, part = name.rpartition("/")
    return whole if part in (INT8, SCALE) and whole.split("/")[-1] == _KERNEL else name


def plain(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return "a/b/c" -> shape and sharding of each parameter before it was stored; a quantized one is float32."""
    shapes = {}
    for name, leaf in leaves.items():
        if plain_name(name) == name:
            shapes[name] = leaf
        elif name.endswith(f"/{INT8}"):
            shapes[plain_name(name)] = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype("float32"), sharding=leaf.sharding)
    return shapes


def values(params: Any) -> Any:
    """Return a tree with the values of all parameters in float32."""
    if is_quantized(params):
        return params[INT8].astype(jnp.float32) * params[SCALE][..., None, :]
    if isinstance(params, Mapping):
        return {name: values(node) for name, node in params.items()}
    return params.astype(jnp.float32)
