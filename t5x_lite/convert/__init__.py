"""Convert checkpoints from Hugging Face and T5X to t5x_lite, and back to Hugging Face.

    python -m t5x_lite.convert SOURCE DEST --to=huggingface|t5x_lite|peft

SOURCE is a Hugging Face directory or name (T5 1.0 and 1.1, Flan, mT5, ByT5, UMT5; BERT), a LoRA folder of PEFT, a T5X
checkpoint (one msgpack file, a folder of msgpack and zarr, or Orbax), a MODEL_DIR, or one of its checkpoints. DEST is a
new Hugging Face directory, a folder for INITIAL_CHECKPOINT_PATH, or a PEFT folder for the LoRA of a run. Tokenizer
files in SOURCE are copied.

Every tensor of a source must be used exactly once, with the shape of the model's parameter; otherwise a UserError names
it. Parameters are read one by one directly onto the mesh, so the host holds one parameter plus the shards on its
devices. Names and formats of other systems are in huggingface.py, peft.py and t5x.py.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from t5x_lite import checkpoint, sharding, storage
from t5x_lite.checkpoint import saving
from t5x_lite.convert import hub, huggingface, peft, t5x, tensors, tokenizer
from t5x_lite.convert.bucket import AnyPath, BucketPath, place_of
from t5x_lite.convert.tensors import Source, Tensor
from t5x_lite.errors import MissingFileError, UserError
from t5x_lite.model import families, quantization
from t5x_lite.model.config import ModelConfig, StoredDtype
from t5x_lite.training import step

log = logging.getLogger(__name__)

Format = Literal["huggingface", "t5x_lite", "peft"]

# Fields of a model's config that belong to a run: they change neither the parameters nor what a model is.
RUN_SETTINGS = ("dropout_rate", "dtype", "scan_layers", "remat", "attention")
# In the info of a checkpoint that was converted from a model on the hub: its name there.
HUB_NAME = "hub_name"
TOKENIZER_FILES = ("spiece.model", "sentencepiece.model", "tokenizer.model")
_HUB_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)


def abstract_params(
    config: ModelConfig, mesh: sharding.AnyMesh | None = None, rules: sharding.Rules = sharding.RULES
) -> dict[str, Any]:
    """Return shapes and shardings of a model's parameters; without a mesh, on the first device."""
    return step.abstract_params(config, mesh or sharding.make_mesh(1, devices=jax.local_devices()[:1]), rules)


def read(
    path: str | AnyPath,
    mesh: sharding.AnyMesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    params_dtype: StoredDtype = "float32",
    keep_lora: bool = False,
    **changes: Any,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the config and the parameters, on the mesh, of a checkpoint in any supported format.

    Args:
      params_dtype: how the parameters are stored (quantization.py).
      keep_lora: read a LoRA folder of PEFT as a model with LoRA, instead of with the updates in its weights.
      changes: values for config fields that do not affect parameters, such as dtype.

    Raises:
      MissingFileError: `path` does not contain a supported format.
      UserError: a tensor is unknown, missing or of the wrong shape, or the model type is unknown.
    """
    place = hub.located(path)

    def abstract(config: ModelConfig) -> dict[str, Any]:
        return quantization.stored(abstract_params(config, mesh, rules), params_dtype)

    if own_checkpoint(place) is not None:
        config = dataclasses.replace(_own_config(str(place)), **changes)
        return config, checkpoint.restore_params(str(place), abstract(config))
    source = _source(place, keep_lora)
    config = dataclasses.replace(source.config, **changes)
    return config, _placed(_claim(place, source), abstract(config))


def import_params(
    path: str | Path,
    config: ModelConfig,
    abstract: Any,
    *,
    fresh: Mapping[str, Any] | None = None,
    left_out: str | None = None,
) -> dict[str, Any]:
    """Return the parameters of a model in another format for a run of `config`. A model with LoRA has a PEFT folder's.

    Args:
      abstract, fresh, left_out: see `checkpoint.restore_params`, whose errors and those of `read` are raised.
    """
    source = _source(hub.located(path), keep_lora=bool(getattr(config, "lora_rank", 0)))
    log.info("%s holds %s", path, source.config)
    warn_of_another_model(path, dataclasses.asdict(source.config), config)
    parts, shapes = _claim(path, source), tensors.flat(abstract_params(source.config))
    leaves, new = checkpoint.matched(
        epath.Path(str(path)), shapes, abstract, fresh, left_out, info(config), info(source.config)
    )
    wanted = {k: leaf for k, leaf in tensors.flat(abstract).items() if quantization.plain_name(k) in leaves}
    placed = tensors.flat(_placed(parts, traverse_util.unflatten_dict(wanted, sep="/")))
    return checkpoint.like(abstract, traverse_util.unflatten_dict(placed | new, sep="/"))


def warn_of_another_model(path: Any, saved: Mapping[str, Any], config: ModelConfig) -> None:
    """Log the fields of a config that change what parameters of the same shapes compute."""
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    theirs = json.loads(json.dumps(dict(saved)))
    others = [k for k in ours.keys() & theirs.keys() & set(config.meaning) if ours[k] != theirs[k]]
    others += ["labels"] * bool(ours.get("labels") and theirs.get("labels") and ours["labels"] != theirs["labels"])
    if others:
        listed = "; ".join(f"{k} = {theirs[k]!r} there, {ours[k]!r} in this run" for k in sorted(others))
        log.warning("The parameters of %s were trained with another %s: %s", path, type(config).__name__, listed)


def is_foreign(path: str | AnyPath) -> bool:
    """Return whether a path is a model in another format than this project's: see `read`."""
    place = hub.located(path)
    if isinstance(place, BucketPath):
        return own_checkpoint(place) is None and tensors.is_t5x(place)
    return peft.is_adapter(place) or (place / "config.json").exists() or tensors.is_t5x(place)


def _source(path: AnyPath, keep_lora: bool = False) -> Source:
    if isinstance(path, Path):
        if peft.is_adapter(path):
            return peft.read(path, merged=not keep_lora)
        if (path / "config.json").exists():
            return huggingface.read(path)
    if tensors.is_t5x(path):
        return t5x.read(path)
    if isinstance(path, BucketPath):
        raise MissingFileError(
            f"{path} is no T5X checkpoint, and of other models only local folders are read: copy it here"
        )
    content = ", ".join(sorted(p.name for p in path.iterdir())[:12]) if path.is_dir() else "it does not exist"
    raise MissingFileError(
        f"{path} is not a model: expected a Hugging Face directory (config.json), a PEFT folder "
        f"({peft.CONFIG}), a MODEL_DIR or one of its checkpoints, or a T5X checkpoint; found: "
        f"{content or 'an empty folder'}"
    )


def info(config: ModelConfig) -> dict[str, Any]:
    """Return the description of the model that a checkpoint stores."""
    return {"model": dataclasses.asdict(config), "model_type": type(config).__name__}


def _own_config(path: Any) -> ModelConfig:
    stored_info = checkpoint.read_info(path)
    if "model" not in stored_info:
        raise UserError(f"{path}: the checkpoint's info has no model config, so the model cannot be built")
    kinds, model_type = families.config_types(), stored_info.get("model_type")
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in stored_info["model"].items()}
    if model_type is not None and model_type not in kinds:
        raise UserError(f"{path}: its model is of type {model_type}, which is none of these types: {', '.join(kinds)}")
    # Checkpoints of earlier versions have no model_type.
    for kind in kinds.values() if model_type is None else [kinds[model_type]]:
        unknown = set(fields) - set(kind.__dataclass_fields__)
        if not unknown:
            return kind(**fields)
    raise UserError(f"{path}: its model config has {', '.join(sorted(unknown))}, unknown to {', '.join(kinds)}")


# The source tensors of each parameter: one, or one per layer.

Parts = Mapping[str, list[Tensor]]


def _placed(parts: Parts, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Read the parameters one by one onto their devices; only the shards of this host are read."""
    placed: dict[str, Any] = {}
    leaves = tensors.flat(abstract)
    for name, leaf in quantization.plain(leaves).items():
        layers = parts[name]

        def part(index: Any, layers: list[Tensor] = layers, leaf: Any = leaf) -> np.ndarray:
            if len(layers[0].shape) == len(leaf.shape):
                return layers[0].read(index).astype(leaf.dtype)
            layer_numbers = range(len(layers))[index[0]]
            shape = [len(range(size)[i]) for size, i in zip(leaf.shape, index, strict=True)]
            stack = np.empty(shape, leaf.dtype)
            for row, layer in enumerate(layer_numbers):
                stack[row] = layers[layer].read(index[1:])
            return stack

        array = jax.block_until_ready(jax.make_array_from_callback(leaf.shape, leaf.sharding, part))
        placed |= {name: array} if name in leaves else quantization.placed(name, array, abstract)
    return traverse_util.unflatten_dict(placed, sep="/")


def _claim(path: Any, source: Source) -> dict[str, list[Tensor]]:
    """Return the tensors of each parameter.

    Raises UserError that names all tensors that are missing, unknown or of the wrong shape.
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
        lines = [f"{path} does not contain the tensors of its configuration, a {type(source.config).__name__}."]
        for problem, names in problems.items():
            if names:
                lines += [f"  {problem}: {len(names)}", *(f"    {name}" for name in names[:12])]
        raise UserError("\n".join(lines))
    return parts


def tokenizer_folders(path: str | AnyPath) -> tuple[AnyPath, ...]:
    """Return the folders in which a model's tokenizer may be: its own, and its run's."""
    path = place_of(path)
    if isinstance(path, Path) and peft.is_adapter(path):
        return path, peft.base_of(path)
    run = run_folder(path)
    return (path,) if run == path else (path, run)


def own_checkpoint(path: AnyPath) -> AnyPath | None:
    """Return the checkpoint of this project that `path` is, or the newest in it; None for a folder of others."""
    if isinstance(path, BucketPath):
        if (path / "info" / "metadata").is_file():
            return path
        is_others = tensors.is_t5x(path)  # which is seen without listing the bucket
    else:
        is_others = (path / "config.json").exists() or peft.is_adapter(path)
    newest = None if is_others else checkpoint.find_checkpoint(str(path))
    return None if newest is None else place_of(str(newest))


def run_folder(path: AnyPath) -> AnyPath:
    """Return the MODEL_DIR of a checkpoint, or `path` if it is not a checkpoint in a MODEL_DIR."""
    newest = own_checkpoint(path)
    return newest.parent.parent if newest is not None and newest.parent.name == checkpoint.FOLDER else path


def step_of(path: AnyPath) -> int | None:
    """Return the step of a checkpoint, by its name or what it says; None if it is not known."""
    own = own_checkpoint(path)
    if own is None:
        names = (re.fullmatch(r"checkpoint_(\d+)", name) for name in (path.name, path.parent.name))  # T5X's
        return next((int(match[1]) for match in names if match), None)
    return int(own.name) if own.name.isdecimal() else checkpoint.read_info(str(own)).get("step")


def tokenizer_file(path: str | AnyPath) -> AnyPath | None:
    """Return the tokenizer file of a model: next to it, or the VOCABULARY of its run's config.gin."""
    folders = tokenizer_folders(path)
    for folder in folders:
        for name in (*TOKENIZER_FILES, "vocab.txt"):
            if (folder / name).is_file():
                return folder / name
    gin = folders[-1] / "config.gin"
    binding = (
        re.search(r"^VOCABULARY = (['\"])(.+)\1$", gin.read_text(encoding="utf-8"), re.MULTILINE)
        if gin.is_file()
        else None
    )
    file = place_of(binding[2]) if binding else None
    return file if file is not None and file.is_file() else None


def vocabulary(path: str | AnyPath) -> tokenizer.AnyVocabulary | None:
    """Return the tokenizer of a T5, or None if there is none."""
    if (file := tokenizer_file(path)) is not None:
        return tokenizer.Vocabulary(file)
    vocabularies = (tokenizer.beside(folder) for folder in tokenizer_folders(path))
    return next((vocabulary for vocabulary in vocabularies if vocabulary is not None), None)


def convert(
    source: str | AnyPath, dest: str | Path, to: Format, base: str | None = None, keep_lora: bool = False
) -> ModelConfig:
    """Write the model in `source` to the folder `dest`, which is there when it is complete, and return its config.

    Args:
      base: the Hugging Face name or folder of the model that a PEFT folder belongs to; or the checkpoint that a run
        started from, if the run saved its trained parameters alone and its base has been moved.
      keep_lora: with to="t5x_lite", keep the updates of a PEFT folder apart, to train on.

    Raises ExistingFileError if `dest` exists and is not empty, and the errors of `read`.
    """
    if keep_lora and to != "t5x_lite":
        raise UserError(f"--keep_lora is for --to=t5x_lite, not --to={to}")
    if storage.is_url(dest):
        raise UserError(f"{dest} is not a local folder: name one, and copy it (gcloud storage cp -r FOLDER {dest})")
    dest = Path(dest).expanduser()
    with storage.whole_folder(dest) as partial:
        return _convert(source, dest, partial, to, base, keep_lora)


def _convert(
    source: str | AnyPath, dest: Path, folder: Path, to: Format, base: str | None, keep_lora: bool
) -> ModelConfig:
    """Write what is to be `dest` to `folder`."""
    origin: dict[str, Any] = {HUB_NAME: str(source)} if hub.is_name(source) else {}
    place = hub.located(source)
    if (step := step_of(place)) is not None:
        origin["step"] = step
    host = sharding.make_mesh(1, devices=jax.local_devices(backend="cpu")[:1])
    with checkpoint.base_at(base):
        config, params = read(place, host, keep_lora=keep_lora)
    if to == "t5x_lite":
        saving.save_params(folder, params, info=info(config) | origin)
        (folder / "model.gin").write_text(model_gin(config), encoding="utf-8")
    elif to == "peft":
        peft.check_lora(config)
        _check_only_lora_was_trained(place)
        peft.write(folder, config, params, base)
    else:
        huggingface.write(folder, *_lora_merged(config, params))
    copy_tokenizer(place, folder, config)
    if to == "huggingface" and tokenizer.describe(folder).config.get("extra_ids_descend"):
        log.warning(
            "%s: its bytes have sentinels of their own, which Hugging Face's ByT5Tokenizer numbers the other way: "
            "<extra_id_0> here is its <extra_id_%d>.",
            dest,
            tokenizer.describe(folder).config["extra_ids"] - 1,
        )
    return config


def model_gin(config: ModelConfig) -> str:
    """Return the model's sizes as a gin file for run.py; settings of a run (dropout, dtype ...) are left to macros."""
    name = type(config).__name__
    values = {key: value for key, value in vars(config).items() if key not in RUN_SETTINGS}
    lines = [f"    {key} = {value!r}" for key, value in values.items()]
    head = "# The model of this checkpoint: pass it to run.py as a --gin_file."
    return "\n".join((head, "", f"Run.model = @{name}()", f"{name}:", *lines)) + "\n"


def _lora_merged(config: ModelConfig, params: Mapping[str, Any]) -> tuple[ModelConfig, Mapping[str, Any]]:
    """Return the model without LoRA, with the LoRA products added to the kernels."""
    if not getattr(config, "lora_rank", 0):
        return config, params
    leaves = {name: np.asarray(leaf) for name, leaf in tensors.flat(params).items()}
    for name in [name for name in leaves if name.endswith("_lora/a/kernel")]:
        layer = name.removesuffix("_lora/a/kernel")
        leaves[f"{layer}/kernel"] = leaves[f"{layer}/kernel"] + leaves.pop(name) @ leaves.pop(f"{layer}_lora/b/kernel")
    return dataclasses.replace(config, lora_rank=0), traverse_util.unflatten_dict(leaves, sep="/")


def _check_only_lora_was_trained(source: AnyPath) -> None:
    if (own := own_checkpoint(source)) is None:
        return
    trained = checkpoint.read_info(str(own)).get("trained") or checkpoint.own_parameter_names(str(own))
    others = sorted(name for name in trained if "_lora/" not in name)
    if others:
        raise UserError(
            f"{source} holds {len(others)} trained parameters beside LoRA's ({others[0]} ...), which a PEFT folder "
            "would lose: convert it --to=huggingface, which adds LoRA to the weights"
        )


def copy_tokenizer(source: AnyPath, dest: Path, config: ModelConfig) -> None:
    """Copy the tokenizer files of a model, if there are any."""
    folders = [*tokenizer_folders(source)]
    if (file := tokenizer_file(source)) is not None:
        content = file.read_bytes()
        (dest / ("vocab.txt" if file.suffix == ".txt" else tokenizer.file_name(content))).write_bytes(content)
        folders = [file.parent]
    elif (model := tokenizer.rebuilt(source)) is not None:
        (dest / tokenizer.file_name(model)).write_bytes(model)  # SeqIO reads no tokenizer.json
    for folder in folders:
        for name in _HUB_TOKENIZER_FILES:
            if (folder / name).is_file() and not (dest / name).exists():
                (dest / name).write_bytes((folder / name).read_bytes())
