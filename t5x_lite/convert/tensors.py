"""Tensors in files of other systems, by name, each read only when and as far as it is asked for.

Knows file formats: safetensors (read and written), PyTorch's .bin, T5X's msgpack with zarr folders, Orbax. It must not
know any model, what a name means, or meshes. Nothing here holds more of a file than the part asked for, except .bin
and msgpack files without folders, which are read as one.
"""

import dataclasses
import importlib.util
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import traverse_util

from t5x_lite.errors import MissingFileError, MissingPackageError, UserError

Index = tuple[slice | int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that lies in a file. `read` takes an index for every axis and returns that part."""

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]

    @property
    def transposed(self) -> "Tensor":
        return Tensor(self.shape[::-1], lambda index: self.read(index[::-1]).T)

    def at(self, i: int, axis: int) -> "Tensor":
        """Entry `i` of one axis, which is gone from the result."""
        shape = self.shape[:axis] + self.shape[axis + 1 :]
        return Tensor(shape, lambda index: self.read((*index[:axis], i, *index[axis:])))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read((slice(None),) * len(self.shape)), dtype)


def in_memory(array: Any) -> Tensor:
    return Tensor(tuple(array.shape), lambda index: np.asarray(array[index]))


@dataclasses.dataclass(frozen=True)
class Source:
    """Another system's model: its config in our words, its tensors, and what it calls our parameters.

    name_of: our parameter to its name there, with {} for the layer.
    is_transposed: whether our parameter has its axes the other way round there.
    """

    config: Any
    tensors: Mapping[str, Tensor]
    name_of: Callable[[str], str]
    is_transposed: Callable[[str], bool] = lambda name: False


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": leaf}} to {"a/b": leaf}."""

    def is_leaf(_: Any, node: Mapping) -> bool:
        return "driver" in node  # a tensorstore spec, which is a dict itself

    return traverse_util.flatten_dict(dict(tree), sep="/", is_leaf=is_leaf)


def drop_copies(folder: Path, found: dict[str, Tensor], copies: Mapping[str, str]) -> None:
    """Takes out copies of other tensors; where a copy is alone, it takes the other's name.

    Raises ValueError: a copy differs.
    """
    for copy, original in copies.items():
        if copy not in found:
            continue
        tensor = found.pop(copy)
        if not _equal(tensor, found.setdefault(original, tensor)):
            raise UserError(f"{folder}: {copy} differs from {original}, and a model of this config has them as one")


def _equal(a: Tensor, b: Tensor, rows: int = 4096) -> bool:
    rest = (slice(None),) * (len(a.shape) - 1)
    blocks = ((slice(start, start + rows), *rest) for start in range(0, a.shape[0], rows))
    return a.shape == b.shape and all(np.array_equal(a.read(block), b.read(block)) for block in blocks)


# safetensors: the length of a header (8 bytes), the header (JSON: dtype, shape, offsets), the numbers.

_SAFETENSORS_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),  # positions 0, 1, 2, ... in old BERTs, which nothing asks for
}


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Raises ValueError: a tensor of another type than floats, or the file is shorter than its header says."""
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= file.stat().st_size - 8:
            raise UserError(f"{file} is no safetensors file, or only a part of one: download it again")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if file.stat().st_size != end:
        raise UserError(f"{file} has {file.stat().st_size} bytes, its header says {end}: download it again")
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise UserError(f"{file}: {name} is {entry['dtype']}; only {', '.join(_SAFETENSORS_DTYPES)} are read")
        dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        start = 8 + length + entry["data_offsets"][0]

        def read(index: Index, dtype: np.dtype = dtype, shape: tuple = shape, start: int = start) -> np.ndarray:
            # Mapped for this read alone, for pages of a map count as memory of the process for as long as it lives.
            flat = np.memmap(file, np.uint8, "r", start, (math.prod(shape) * dtype.itemsize,))
            return np.array(flat.view(dtype).reshape(shape)[index])

        found[name] = Tensor(shape, read)
    return found


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """All as float32, each read when it is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * math.prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            f.write(np.ascontiguousarray(np.asarray(tensor, "<f4")).data)


def read_torch(file: Path) -> dict[str, Tensor]:
    """Raises ModuleNotFoundError where PyTorch is not installed; ValueError: other things than tensors are in it."""
    if importlib.util.find_spec("torch") is None:
        raise MissingPackageError(
            f"{file} is PyTorch's own format, which only PyTorch reads: pip install torch, or get the model's "
            "model.safetensors"
        )
    import torch  # pyright: ignore[reportMissingImports]

    # Files from before 2020 are no zip archives, and cannot be mapped.
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds more than tensors, or is damaged; other objects are never loaded") from error

    def read(tensor: Any, index: Index) -> np.ndarray:
        part = tensor.detach()[index]
        return part.float().numpy() if part.dtype == torch.bfloat16 else part.numpy()

    return {
        name: Tensor(tuple(tensor.shape), lambda index, tensor=tensor: read(tensor, index))
        for name, tensor in tensors.items()
    }


def read_hub(folder: Path) -> dict[str, Tensor]:
    """Those of a Hugging Face directory, whole or in shards; safetensors where there are both formats.

    Raises:
      FileNotFoundError: neither format, or a shard is missing.
      ValueError: an index says otherwise than its shards.
    """
    for stem, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch)):
        if (folder / stem).exists():
            return read(folder / stem)
        index = folder / f"{stem}.index.json"
        if not index.exists():
            continue
        shard_of = json.loads(index.read_text())["weight_map"]
        if missing := sorted(name for name in set(shard_of.values()) if not (folder / name).exists()):
            raise MissingFileError(f"{index} names shards that are not there: {', '.join(missing)}: download them")
        found: dict[str, Tensor] = {}
        for shard in sorted(set(shard_of.values())):
            tensors = read(folder / shard)
            if set(tensors) != {name for name, at in shard_of.items() if at == shard}:
                raise UserError(f"{folder / shard} does not hold the tensors that {index.name} says: download it again")
            found |= tensors
        return found
    raise MissingFileError(f"{folder} has a config.json and no model.safetensors, pytorch_model.bin or their indexes")


# T5X and Orbax: a tree, its leaves in one msgpack file or in a folder (zarr) or key-value store (OCDBT) beside it.


def is_t5x(path: Path) -> bool:
    """Whether this is T5X's: a msgpack file, a folder with one, or a folder that Orbax wrote."""
    return path.is_file() or (path / "checkpoint").is_file() or _orbax_folder(path) is not None


def read_t5x(path: Path) -> dict[str, Tensor]:
    """The whole training state, by "a/b/c".

    Raises ValueError: no msgpack; FileNotFoundError: an array's folder is missing.
    """
    if (orbax := _orbax_folder(path)) is not None:
        return _read_orbax(orbax)
    file = path if path.is_file() else path / "checkpoint"
    try:
        # Off the accelerator: what it holds decides what it is, and optimizer state is not wanted there.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            tree = flax.serialization.msgpack_restore(file.read_bytes())
        assert isinstance(tree, dict)
    except Exception as error:
        raise UserError(f"{file} is no T5X checkpoint: it is not the msgpack of a tree ({error})") from error
    found = {}
    for name, leaf in flat(tree).items():
        if hasattr(leaf, "shape"):
            found[name] = in_memory(leaf)
        elif (folder := _array_folder(leaf)) is not None:
            found[name] = _open({"driver": "file", "path": str(path / folder)})
    return found


def _array_folder(leaf: Any) -> str | None:
    """The folder that stands for an array in a msgpack: T5X's specs, or Orbax's string. Other leaves: None."""
    if isinstance(leaf, str) and leaf.startswith("PLACEHOLDER://"):
        return leaf.removeprefix("PLACEHOLDER://")
    if isinstance(leaf, dict) and leaf.get("driver") == "zarr":
        path = leaf.get("path") or leaf["kvstore"]["path"]
        return path.rstrip("/").rsplit("/", 1)[-1]
    return None


def _orbax_folder(path: Path) -> Path | None:
    """Where Orbax's tree is: the folder itself or one part of a checkpoint of several parts."""
    places: Iterable[Path] = (path, path / "state", path / "default", path / "items", path / "params")
    return next((p for p in places if (p / "_METADATA").exists()), None)


def _read_orbax(folder: Path) -> dict[str, Tensor]:
    folder = folder.absolute()
    tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder)).tree
    ocdbt = (folder / "manifest.ocdbt").exists()

    def open_leaf(name: str) -> Tensor:
        key = name.replace("/", ".")
        if ocdbt:
            return _open({"driver": "ocdbt", "base": f"file://{folder}", "path": f"{key}/"})
        return _open({"driver": "file", "path": str(folder / key)})

    return {name: open_leaf(name) for name, leaf in flat(tree).items() if getattr(leaf, "shape", None) is not None}


def _open(store: dict[str, Any]) -> Tensor:
    try:
        array = tensorstore.open({"driver": "auto", "kvstore": store}, read=True).result()  # zarr, version 2 or 3
    except (ValueError, OSError) as error:
        raise MissingFileError(f"{store['path']} holds no array, though the checkpoint names one: {error}") from error
    return Tensor(tuple(array.shape), lambda index: array[index].read().result())
