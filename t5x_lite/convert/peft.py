"""Read and write LoRA folders of the PEFT library: adapter_config.json and adapter_model.safetensors.

A folder is read as the base model with its updates added to the weights: W + scale x B A; or as the base with LoRA of
its own, whose B is scale x B, to train on. Names of tensors are those of the base with PEFT's prefix.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.convert import hub, huggingface, tensors
from t5x_lite.convert.tensors import Index, Source, Tensor
from t5x_lite.errors import MissingFileError, UserError
from t5x_lite.model import families
from t5x_lite.model.config import LORA_TARGETS, ModelConfig

CONFIG, TENSORS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# Keys of adapter_config.json that do not change what the weights are.
_HARMLESS = """peft_version peft_type base_model_name_or_path revision task_type inference_mode auto_mapping
    r lora_alpha use_rslora lora_dropout target_modules exclude_modules rank_pattern alpha_pattern modules_to_save
    layers_pattern layers_to_transform bias fan_in_fan_out init_lora_weights loftq_config eva_config corda_config
    megatron_core
    runtime_config ensure_weight_tying qalora_group_size""".split()
_ONLY = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False}
# These change the base's weights before training: the update does not belong to the weights as published.
_OTHER_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def is_adapter(path: Path) -> bool:
    return (path / CONFIG).is_file()


def base_of(folder: Path) -> Path:
    """Return the folder of the base model. Raises MissingFileError if it is neither here nor on the hub."""
    config = _config(folder)
    name = str(config.get("base_model_name_or_path") or "")
    if name and (folder / name / "config.json").is_file():
        return folder / name
    revision = f"@{config['revision']}" if config.get("revision") and hub.is_name(name) else ""
    place = hub.located(name + revision) if name else None
    if not (isinstance(place, Path) and (place / "config.json").is_file()):
        raise MissingFileError(
            f"{folder / CONFIG}: its base model {name!r} is not a folder here: set base_model_name_or_path in this file"
        )
    return place


def read(folder: Path, merged: bool = True) -> Source:
    """Return the base model with the folder's updates: in its weights, or apart, as LoRA.

    Apart, all have the largest of the ranks, and kernels of the same kind have LoRA in all layers: what the folder
    lacks is 0 in A and B, and stays so in training.

    Raises:
      UserError: a key of adapter_config.json has a value, or a tensor a place, that is not supported.
    """
    config, base = _config(folder), base_of(folder)
    if not (folder / TENSORS).is_file():
        raise MissingFileError(f"{folder} has {CONFIG}, but no {TENSORS}")
    source = huggingface.read(base)
    weights = dict(source.tensors)
    of_modules = _module_of(source.config)
    in_files = {of_modules(name).removesuffix(".weight"): name.removesuffix(".weight") for name in weights}

    def in_file(name: str) -> str:
        module, dot, end = name.removeprefix(_PREFIX).partition(".lora_")
        return f"{_PREFIX}{in_files.get(module, module)}{dot}{end}"

    stored = {in_file(name): tensor for name, tensor in tensors.read_safetensors(folder / TENSORS).items()}
    updates: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by module: A, and B with its scale
    while stored:
        name = next(iter(stored))
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_[AB]\.weight", name)
        if match is None:  # of modules_to_save: as a whole
            theirs = name.removeprefix(_PREFIX)
            if theirs not in weights or stored[name].shape != weights[theirs].shape:
                raise UserError(f"{folder / TENSORS}: {name} {list(stored[name].shape)} is not a tensor of {base}")
            weights[theirs] = stored.pop(name)
            continue
        module = match[1]
        a, b = (stored.pop(f"{_PREFIX}{module}.lora_{letter}.weight", None) for letter in "AB")
        weight = weights.get(f"{module}.weight")
        if a is None or b is None or weight is None or weight.shape != (b.shape[0], a.shape[1]):
            shapes = [None if x is None else list(x.shape) for x in (a, b, weight)]
            raise UserError(
                f"{folder / TENSORS}: {module} has lora_A {shapes[0]} and lora_B {shapes[1]}, the base's weight is "
                f"{shapes[2]}"
            )
        scale = _scale(config, module, a.shape[0])
        updates[module] = np.asarray(a, np.float32), np.float32(scale) * np.asarray(b, np.float32)
    if not merged:
        return _apart(folder, dataclasses.replace(source, tensors=weights), updates)
    for module, (a, b) in updates.items():
        weights[f"{module}.weight"] = _updated(weights[f"{module}.weight"], a, b)
    return dataclasses.replace(source, tensors=weights)


def _updated(weight: Tensor, a: np.ndarray, b: np.ndarray) -> Tensor:
    def part(index: Index) -> np.ndarray:
        return weight.read(index).astype(np.float32) + b[index[0]] @ a[:, index[1]]

    return Tensor(weight.shape, part)


def _apart(folder: Path, source: Source, updates: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Source:
    """Return a model with LoRA of its own."""
    config: Any = source.config
    if not hasattr(config, "lora_rank") or not updates:
        raise UserError(f"{folder}: there is no LoRA of a T5 to keep apart: convert it with the updates in its weights")
    rank, weights = max(a.shape[0] for a, _ in updates.values()), dict(source.tensors)
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    modules_of = {}  # kernel -> target, modules
    for name in families.hub_module(config).NAMES:
        if "/layers/" in name and name.endswith("/kernel") and source.name_of(name).format(0) in weights:
            stack, kernel = name.split("/")[0], name.split("/")[-2]
            modules = [source.name_of(name).format(i).removesuffix(".weight") for i in range(layers[stack])]
            modules_of[name] = kernel.partition("_")[0], modules
    targets = {target for target, modules in modules_of.values() if updates.keys() & set(modules)}
    others = updates.keys() - {module for _, modules in modules_of.values() for module in modules}
    if others:
        raise UserError(f"{folder}: {min(others)} has no LoRA here: convert it with the updates in its weights")
    for target, modules in modules_of.values():
        for module in modules if target in targets else ():
            outputs, inputs = weights[f"{module}.weight"].shape
            a, b = updates.get(module, (np.zeros((0, inputs), np.float32), np.zeros((outputs, 0), np.float32)))
            more = rank - a.shape[0]
            weights[f"{module}.lora_A"] = tensors.in_memory(np.pad(a, ((0, more), (0, 0))))
            weights[f"{module}.lora_B"] = tensors.in_memory(np.pad(b, ((0, 0), (0, more))))

    def name_of(name: str) -> str:
        match = re.fullmatch(r"(.+)_lora/([ab])/kernel", name)
        if match is None:
            return source.name_of(name)
        return f"{source.name_of(f'{match[1]}/kernel').removesuffix('.weight')}.lora_{match[2].upper()}"

    config = dataclasses.replace(config, lora_rank=rank, lora_targets=tuple(x for x in LORA_TARGETS if x in targets))
    return dataclasses.replace(source, config=config, tensors=weights, name_of=name_of)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / r of a module, or alpha / sqrt(r) of rslora; the first pattern that its name ends with counts."""

    def of_pattern(name: str, default: Any) -> Any:
        patterns = config.get(name) or {}
        return next((v for key, v in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)

    if of_pattern("rank_pattern", config.get("r", 8)) != rank:
        raise UserError(f"{module} has rank {rank}, but {CONFIG} says otherwise (r, rank_pattern)")
    return of_pattern("alpha_pattern", config.get("lora_alpha", 8)) / (
        math.sqrt(rank) if config.get("use_rslora") else rank
    )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object")
    for key, value in config.items():
        if key in _ONLY and value != _ONLY[key]:
            raise UserError(f"{file}: {key} is {value!r}; only {_ONLY[key]!r} is supported")
        if key not in _HARMLESS and value not in (None, False, [], {}):
            raise UserError(
                f"{file}: the key {key!r} ({str(value)[:60]!r}) is not supported, and may change the weights"
            )
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_OTHER_BASE):
        raise UserError(
            f"{file}: init_lora_weights is {initial!r}, which also changes the base's weights: merge the model with "
            "PEFT (merge_and_unload), and convert the result"
        )
    return config


def _module_of(config: ModelConfig) -> Callable[[str], str]:
    """Return a function from the name of a tensor in Hugging Face's files to that in its model, as PEFT has it."""
    family = families.hub_module(config)
    return functools.partial(family.module_of, config) if hasattr(family, "module_of") else lambda name: name


def check_lora(config: ModelConfig) -> None:
    if not getattr(config, "lora_rank", 0):
        raise UserError("this model has no LoRA parameters (its lora_rank is 0): convert it to another format")


def write(folder: Path, config: ModelConfig, params: Mapping[str, Any], base: str | None) -> None:
    """Write the LoRA parameters of a model as a PEFT folder for `base`, a Hugging Face name or folder.

    Raises UserError if the model has no LoRA.
    """
    check_lora(config)
    rank = getattr(config, "lora_rank", 0)
    family, module_of, by_name, modules = families.hub_module(config), _module_of(config), {}, set()
    for name, leaf in tensors.flat(params).items():
        if (match := re.fullmatch(r"(.+)_lora/([ab])/kernel", name)) is None:
            continue
        for layer in range(leaf.shape[0]):
            theirs = family.name_of(config, f"{match[1]}/kernel").format(layer)
            module = module_of(theirs).removesuffix(".weight")
            modules.add(module.rpartition(".")[2])
            matrix = tensors.in_memory(np.ascontiguousarray(np.asarray(leaf[layer]).T))
            by_name[f"{_PREFIX}{module}.lora_{match[2].upper()}.weight"] = matrix
    described = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # the update is B A, unscaled
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    tensors.write_safetensors(folder / TENSORS, dict(sorted(by_name.items())))
