"""Lazily read tensors, by name, from files of other systems.

Formats: safetensors (read and written), PyTorch's .bin, Flax's msgpack, T5X's msgpack with zarr folders, Orbax. Only
the requested part of a file is read, except .bin and msgpack files without folders, which are read whole. Must not
depend on models, parameter names or meshes.
"""

import dataclasses
import importlib.util
import itertools
import json
import logging
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
import tensorstore
from flax import traverse_util

from t5x_lite.convert.bucket import AnyPath, BucketPath
from t5x_lite.errors import MissingFileError, MissingPackageError, UserError

log = logging.getLogger(__name__)

Index = tuple[slice | int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array in a file. `read` takes an index for every axis and returns that part."""

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]

    @property
    def transposed(self) -> "Tensor":
        return Tensor(self.shape[::-1], lambda index: self.read(index[::-1]).T)

    def at(self, i: int, axis: int) -> "Tensor":
        """Return entry `i` of one axis, which the result lacks."""
        shape = self.shape[:axis] + self.shape[axis + 1 :]
        return Tensor(shape, lambda index: self.read((*index[:axis], i, *index[axis:])))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read((slice(None),) * len(self.shape)), dtype)


def in_memory(array: Any) -> Tensor:
    return Tensor(tuple(array.shape), lambda index: np.asarray(array[index]))


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of another system: its config as a `ModelConfig`, its tensors, and the mapping of names.

    name_of: maps a parameter name to the source's name, with {} for the layer.
    is_transposed: whether the source stores a parameter transposed.
    """

    config: Any
    tensors: Mapping[str, Tensor]
    name_of: Callable[[str], str]
    is_transposed: Callable[[str], bool] = lambda name: False


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten {"a": {"b": leaf}} to {"a/b": leaf}."""

    def is_leaf(_: Any, node: Mapping) -> bool:
        return "driver" in node  # a tensorstore spec, a dict that is a leaf

    return traverse_util.flatten_dict(dict(tree), sep="/", is_leaf=is_leaf)


def drop_copies(folder: Path, stored: dict[str, Tensor], copies: Mapping[str, str]) -> None:
    """Remove copies of other tensors; a copy whose original is missing is renamed to it.

    Raises UserError if a copy differs.
    """
    for copy, original in copies.items():
        if copy not in stored:
            continue
        tensor = stored.pop(copy)
        if not _equal(tensor, stored.setdefault(original, tensor)):
            raise UserError(f"{folder}: {copy} differs from {original}, but a model with this config shares them")


def _equal(a: Tensor, b: Tensor, rows: int = 4096) -> bool:
    rest = (slice(None),) * (len(a.shape) - 1)
    blocks = ((slice(start, start + rows), *rest) for start in range(0, a.shape[0], rows))
    return a.shape == b.shape and all(np.array_equal(a.read(block), b.read(block)) for block in blocks)


# safetensors format: length of the header (8 bytes), header (JSON: dtype, shape, offsets), data.

_SAFETENSORS_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),  # position ids in old BERTs, which are not used
}


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises UserError for an unsupported dtype or a damaged or truncated file."""
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= file.stat().st_size - 8:
            raise UserError(f"{file} is not a safetensors file, or is truncated: download it again")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if file.stat().st_size != end:
        raise UserError(f"{file} has {file.stat().st_size} bytes, its header says {end}: download it again")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise UserError(f"{file}: {name} is {entry['dtype']}; supported are {', '.join(_SAFETENSORS_DTYPES)}")
        dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        start = 8 + length + entry["data_offsets"][0]

        def read(index: Index, dtype: np.dtype = dtype, shape: tuple = shape, start: int = start) -> np.ndarray:
            # Map the file for this read only, because the pages of a map count as memory of the process.
            flat = np.memmap(file, np.uint8, "r", start, (math.prod(shape) * dtype.itemsize,))
            return np.array(flat.view(dtype).reshape(shape)[index])

        tensors[name] = Tensor(shape, read)
    return tensors


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write all tensors as float32; each is read when it is written."""
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
    """Read a PyTorch file. Raises MissingPackageError without PyTorch, UserError if it contains more than tensors."""
    if importlib.util.find_spec("torch") is None:
        raise MissingPackageError(
            f"{file} is in PyTorch's format, which needs PyTorch: pip install torch, or download the model's "
            "model.safetensors"
        )
    import torch  # pyright: ignore[reportMissingImports]

    # Files from before 2020 are not zip archives and cannot be memory-mapped.
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} contains more than tensors, or is damaged; other objects are never loaded") from error

    def read(tensor: Any, index: Index) -> np.ndarray:
        part = tensor.detach()[index]
        return part.float().numpy() if part.dtype == torch.bfloat16 else part.numpy()

    return {
        name: Tensor(tuple(tensor.shape), lambda index, tensor=tensor: read(tensor, index))
        for name, tensor in tensors.items()
    }


def read_flax(file: Path) -> dict[str, Tensor]:
    """Read a file of transformers' Flax models, under PyTorch's names and with PyTorch's layouts.

    Raises UserError if the file is not msgpack.
    """
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            tree = flax.serialization.msgpack_restore(file.read_bytes())
        leaves = traverse_util.flatten_dict(tree, sep=".")
    except Exception as error:
        raise UserError(f"{file} is not a Flax checkpoint: it is not a msgpack tree ({error})") from error
    tensors = {}
    for name, leaf in leaves.items():
        parent, _, last = name.rpartition(".")
        tensor = in_memory(leaf)
        tensor = tensor.transposed if last == "kernel" else tensor
        tensors[f"{parent}.weight" if last in ("kernel", "embedding", "scale") else name] = tensor
    return tensors


_FORMATS = (
    ("model.safetensors", read_safetensors),
    ("pytorch_model.bin", read_torch),
    ("flax_model.msgpack", read_flax),
)


def read_hub(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a Hugging Face directory, whole or sharded: safetensors, else .bin, else Flax's.

    A format that cannot be read is passed over if there is another one, which is logged.

    Raises:
      MissingFileError: there is none of these formats, or a shard is missing.
      UserError: an index and its shards disagree, or the only format cannot be read.
    """
    present = [
        (stem, read)
        for stem, read in _FORMATS
        if any((folder / f"{stem}{end}").exists() for end in ("", ".index.json"))
    ]
    if not present:
        names = ", ".join(stem for stem, _ in _FORMATS)
        raise MissingFileError(f"{folder} has a config.json, but none of {names}, nor an index of one")
    for (stem, read), (other, _) in itertools.pairwise(present):
        try:
            return _read_whole_or_shards(folder, stem, read)
        except (UserError, OSError) as error:
            log.warning("%s Reading %s instead.", f"{error}.".replace("..", "."), other)
    return _read_whole_or_shards(folder, *present[-1])


def _read_whole_or_shards(folder: Path, stem: str, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    if (folder / stem).exists():
        return read(folder / stem)
    index = folder / f"{stem}.index.json"
    shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if missing := sorted(name for name in set(shard_of.values()) if not (folder / name).exists()):
        raise MissingFileError(f"{index} names missing shards: {', '.join(missing)}: download them")
    by_name: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        tensors = read(folder / shard)
        if read is not read_flax and set(tensors) != {name for name, file in shard_of.items() if file == shard}:
            raise UserError(f"{folder / shard} does not match {index.name}: download it again")
        by_name |= tensors
    return by_name


# T5X and Orbax: a tree whose leaves are in a msgpack file, in zarr folders, or in a key-value store (OCDBT).


def is_t5x(path: AnyPath) -> bool:
    """Return whether `path` is a T5X checkpoint: a msgpack file, a folder with one, or an Orbax folder."""
    return path.is_file() or (path / "checkpoint").is_file() or _orbax_folder(path) is not None


def read_t5x(path: AnyPath) -> dict[str, Tensor]:
    """Read the whole training state, keyed by "a/b/c".

    Raises UserError if the file is not msgpack, MissingFileError if an array's folder is missing.
    """
    if (orbax := _orbax_folder(path)) is not None:
        return _read_orbax(orbax)
    file = path if path.is_file() else path / "checkpoint"
    try:
        # Read on the CPU: the optimizer state must not take accelerator memory.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            tree = flax.serialization.msgpack_restore(file.read_bytes())
        assert isinstance(tree, dict)
    except Exception as error:
        raise UserError(f"{file} is not a T5X checkpoint: it is not a msgpack tree ({error})") from error
    state = {}
    for name, leaf in flat(tree).items():
        if hasattr(leaf, "shape"):
            state[name] = in_memory(leaf)
        elif (folder := _array_folder(leaf)) is not None:
            state[name] = _open(path / folder)
    return state


def _array_folder(leaf: Any) -> str | None:
    """Return the array folder that a msgpack leaf refers to (T5X's spec or Orbax's string), else None."""
    if isinstance(leaf, str) and leaf.startswith("PLACEHOLDER://"):
        return leaf.removeprefix("PLACEHOLDER://")
    if isinstance(leaf, dict) and leaf.get("driver") == "zarr":
        path = leaf.get("path") or leaf["kvstore"]["path"]
        return path.rstrip("/").rsplit("/", 1)[-1]
    return None


def _orbax_folder(path: AnyPath) -> AnyPath | None:
    """Return the folder of Orbax's tree: `path`, or one item of a checkpoint with several items."""
    folders: Iterable[AnyPath] = (path, path / "state", path / "default", path / "items", path / "params")
    return next((p for p in folders if (p / "_METADATA").exists()), None)


def _read_orbax(folder: AnyPath) -> dict[str, Tensor]:
    entries = json.loads((folder / "_METADATA").read_text(encoding="utf-8"))["tree_metadata"].values()
    names = [
        [str(part["key"]) for part in entry["key_metadata"]]
        for entry in entries
        if not entry["value_metadata"].get("skip_deserialize") and entry["value_metadata"].get("value_type") != "None"
    ]
    ocdbt = (folder / "manifest.ocdbt").exists()

    def open_leaf(key: str) -> Tensor:
        return _open(folder, key) if ocdbt else _open(folder / key)

    return {"/".join(name): open_leaf(".".join(name)) for name in names}


def _open(folder: AnyPath, ocdbt_key: str | None = None) -> Tensor:
    """Open the array in a folder, or under a key of a folder that is a key-value store."""
    url = str(folder) if isinstance(folder, BucketPath) else f"file://{folder.absolute()}"
    store: Any = f"{url}/"
    if ocdbt_key is not None:
        store = {"driver": "ocdbt", "base": url, "path": f"{ocdbt_key}/"}
    try:
        array = tensorstore.open({"driver": "auto", "kvstore": store}, read=True).result()  # zarr, version 2 or 3
    except (ValueError, OSError) as error:
        place = ocdbt_key or str(folder)
        raise MissingFileError(f"{place} has no array, but the checkpoint refers to one: {error}") from error
    return Tensor(tuple(array.shape), lambda index: array[index].read().result())
