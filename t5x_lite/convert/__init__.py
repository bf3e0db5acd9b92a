"""Parameters from Hugging Face and T5X into our tree, and back to Hugging Face.

    python -m t5x_lite.convert SOURCE DEST --to=huggingface|t5x_lite

SOURCE is a Hugging Face directory (T5 1.0 and 1.1, Flan, mT5, ByT5, UMT5; BERT), a T5X checkpoint (one msgpack file, a
folder of msgpack and zarr, or Orbax's), or our own: a MODEL_DIR or one of its checkpoints. DEST is a Hugging Face
directory, or a folder that INITIAL_CHECKPOINT_PATH takes. A tokenizer's files go along where SOURCE has them.

Every tensor of a source is used once, with the shape that the model asks for, or refused by name. They are read one
stack of layers at a time, straight onto the mesh: the host holds one parameter and what lies on its devices. This
module knows what lies where; not how others name and store it (huggingface.py, t5x.py), nor what a tokenizer does.
"""

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import traverse_util

from t5x_lite import checkpoint, sharding
from t5x_lite.checkpoint import saving
from t5x_lite.convert import huggingface, t5x, tensors, tokenizer
from t5x_lite.convert.tensors import Source, Tensor
from t5x_lite.errors import ExistingFileError, MissingFileError, UserError
from t5x_lite.model import interface
from t5x_lite.model.interface import ModelConfig
from t5x_lite.training import step

Format = Literal["huggingface", "t5x_lite"]

TOKENIZER_FILES = ("spiece.model", "sentencepiece.model")
_HUB_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)


# What lies where


def abstract_params(
    config: ModelConfig, mesh: sharding.AnyMesh | None = None, rules: sharding.Rules = sharding.RULES
) -> dict[str, Any]:
    """Shapes and shardings of a model's parameters; without a mesh, on the first device."""
    return step.abstract_params(config, mesh or sharding.make_mesh(1, devices=jax.local_devices()[:1]), rules)


def read(
    path: str | Path,
    mesh: sharding.AnyMesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    **changes: Any,
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the parameters, on the mesh, of whatever `path` holds.

    Args:
      changes: values for fields of the config that do not touch parameters, such as dtype.

    Raises:
      FileNotFoundError: nothing there that is known.
      ValueError: a tensor is unknown, missing or of the wrong shape; a config that is of no known model type.
    """
    path = Path(path).expanduser()
    if (path / "config.json").exists():
        source = huggingface.read(path)
    elif checkpoint.find_checkpoint(path) is not None:
        config = dataclasses.replace(_own_config(path), **changes)
        return config, checkpoint.restore_params(path, abstract_params(config, mesh, rules))
    elif path.exists() and tensors.is_t5x(path):
        source = t5x.read(path)
    else:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:12]) if path.is_dir() else "it does not exist"
        raise MissingFileError(
            f"{path} is no model: expected a Hugging Face directory (config.json), a MODEL_DIR or one of its "
            f"checkpoints, or a T5X checkpoint; found: {there or 'an empty folder'}"
        )
    config = dataclasses.replace(source.config, **changes)
    return config, _placed(_claim(path, source), abstract_params(config, mesh, rules))


def info(config: ModelConfig) -> dict[str, Any]:
    """What a checkpoint says of its model."""
    return {"model": dataclasses.asdict(config), "model_type": type(config).__name__}


def _own_config(path: Path) -> ModelConfig:
    said = checkpoint.read_info(path)
    if "model" not in said:
        raise UserError(f"{path}: the checkpoint's info says no model config, so it cannot be built")
    kinds, said_type = interface.config_types(), said.get("model_type")
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in said["model"].items()}
    if said_type is not None and said_type not in kinds:
        raise UserError(f"{path}: its model is of type {said_type}, which is none of these types: {', '.join(kinds)}")
    # Checkpoints of earlier versions do not say of which type their model is.
    for kind in kinds.values() if said_type is None else [kinds[said_type]]:
        unknown = set(fields) - set(kind.__dataclass_fields__)
        if not unknown:
            return kind(**fields)
    raise UserError(f"{path}: its model config has {', '.join(sorted(unknown))}, unknown to {', '.join(kinds)}")


# Each parameter is a list of the source's tensors: one, or one for each layer.

Parts = Mapping[str, list[Tensor]]


def _placed(parts: Parts, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Reads each parameter and puts it on its devices before the next is read: of it, only what lies on this host."""
    placed = {}
    for name, leaf in tensors.flat(abstract).items():
        layers = parts[name]

        def part(index: Any, layers: list[Tensor] = layers, leaf: Any = leaf) -> np.ndarray:
            if len(layers[0].shape) == len(leaf.shape):
                return layers[0].read(index).astype(leaf.dtype)
            chosen = range(len(layers))[index[0]]
            shape = [len(range(size)[i]) for size, i in zip(leaf.shape, index, strict=True)]
            stack = np.empty(shape, leaf.dtype)
            for row, layer in enumerate(chosen):
                stack[row] = layers[layer].read(index[1:])
            return stack

        placed[name] = jax.block_until_ready(jax.make_array_from_callback(leaf.shape, leaf.sharding, part))
    return traverse_util.unflatten_dict(placed, sep="/")


def _claim(path: Path, source: Source) -> dict[str, list[Tensor]]:
    """The tensors of each parameter.

    Raises ValueError: one is missing, not asked for, or of the wrong shape; all are named.
    """
    parts: dict[str, list[Tensor]] = {}
    missing, wrong, used = [], [], set()
    for name, leaf in tensors.flat(abstract_params(source.config)).items():
        stacked = "/layers/" in name
        shape = leaf.shape[1:] if stacked else leaf.shape
        parts[name] = []
        for layer in range(leaf.shape[0] if stacked else 1):
            theirs = source.name_of(name).format(layer)
            used.add(theirs)
            if theirs not in source.tensors:
                missing.append(f"{theirs} {list(shape)}")
                continue
            tensor = source.tensors[theirs]
            tensor = tensor.transposed if source.is_transposed(name) else tensor
            if tensor.shape != shape:
                wrong.append(f"{theirs}: {list(tensor.shape)}, the model has {list(shape)} ({name})")
            parts[name].append(tensor)
    unknown = sorted(f"{name} {list(source.tensors[name].shape)}" for name in source.tensors.keys() - used)
    problems = {"missing": missing, "unknown": unknown, "of another shape": wrong}
    if any(problems.values()):
        lines = [f"{path} does not hold the tensors of {source.config}."]
        for what, names in problems.items():
            if names:
                lines += [f"  {what}: {len(names)}", *(f"    {name}" for name in names[:12])]
        raise UserError("\n".join(lines))
    return parts


# The command


def tokenizer_file(path: str | Path) -> Path | None:
    """The tokenizer's file that goes with a model: beside it, or what the config.gin of its run names."""
    path = Path(path).expanduser()
    found = None if (path / "config.json").exists() else checkpoint.find_checkpoint(path)
    run = Path(found).parent.parent if found is not None and found.parent.name == checkpoint.FOLDER else path
    for folder in (path, run):
        for name in (*TOKENIZER_FILES, "vocab.txt"):
            if (folder / name).is_file():
                return folder / name
    gin = run / "config.gin"
    said = re.search(r"^VOCABULARY = (['\"])(.+)\1$", gin.read_text(), re.MULTILINE) if gin.is_file() else None
    return Path(said[2]) if said and Path(said[2]).is_file() else None


def convert(source: str | Path, dest: str | Path, to: Format) -> ModelConfig:
    """Writes the model in `source` to the folder `dest`; returns its config.

    Raises FileExistsError: `dest` holds something; and what `read` raises.
    """
    source, dest = Path(source).expanduser(), Path(dest).expanduser()
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ExistingFileError(f"{dest} is there and not empty: name a new folder")
    host = sharding.make_mesh(1, devices=jax.local_devices(backend="cpu")[:1])
    config, params = read(source, host)
    if to == "t5x_lite":
        saving.save_params(dest, params, info=info(config))
        (dest / "model.gin").write_text(model_gin(config))
    else:
        huggingface.write(dest, *_lora_merged(config, params))
    copy_tokenizer(source, dest, config)
    return config


def model_gin(config: ModelConfig) -> str:
    """The model's sizes as a gin file for run.py; what a run decides (dropout, dtype ...) is left to its macros."""
    name, of_a_run = type(config).__name__, ("dropout_rate", "dtype", "scan_layers", "remat", "attention")
    values = {key: value for key, value in vars(config).items() if key not in of_a_run}
    lines = [f"    {key} = {value!r}" for key, value in values.items()]
    head = "# The model of this checkpoint: give it to run.py as a --gin_file."
    return "\n".join((head, "", f"Run.model = @{name}()", f"{name}:", *lines)) + "\n"


def _lora_merged(config: ModelConfig, params: Mapping[str, Any]) -> tuple[ModelConfig, Mapping[str, Any]]:
    """The same model without LoRA: what it adds is added to the kernels."""
    if not getattr(config, "lora_rank", 0):
        return config, params
    leaves = {name: np.asarray(leaf) for name, leaf in tensors.flat(params).items()}
    for name in [name for name in leaves if name.endswith("_lora/a/kernel")]:
        of = name.removesuffix("_lora/a/kernel")
        leaves[f"{of}/kernel"] = leaves[f"{of}/kernel"] + leaves.pop(name) @ leaves.pop(f"{of}_lora/b/kernel")
    return dataclasses.replace(config, lora_rank=0), traverse_util.unflatten_dict(leaves, sep="/")


def copy_tokenizer(source: Path, dest: Path, config: ModelConfig) -> None:
    """The files of a model's tokenizer, those that there are."""
    if (file := tokenizer_file(source)) is not None:
        shutil.copyfile(file, dest / ("vocab.txt" if file.suffix == ".txt" else "spiece.model"))
        if (config_file := file.parent / "tokenizer_config.json").is_file():  # a vocab.txt alone does not say its case
            shutil.copyfile(config_file, dest / config_file.name)
    elif (model := tokenizer.rebuilt(source)) is not None:
        (dest / "spiece.model").write_bytes(model)  # which SeqIO needs
    for name in _HUB_TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, dest / name)
