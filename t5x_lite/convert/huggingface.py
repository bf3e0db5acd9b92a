"""Read and write Hugging Face directories (config.json and tensors) for any model family.

Each family has a module for its names, layouts and config.json (`interface.FAMILIES`). File formats are in tensors.py,
placement on devices is in convert.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.convert import tensors
from t5x_lite.convert.tensors import Source, Tensor
from t5x_lite.errors import UserError
from t5x_lite.model import interface
from t5x_lite.model.interface import ModelConfig


def read(folder: Path) -> Source:
    """Return the config and tensors of a directory. Raises UserError or MissingFileError."""
    file = folder / "config.json"
    hub = json.loads(file.read_text())
    modules = interface.hub_modules()
    if hub.get("model_type") not in modules:
        raise UserError(
            f"{file}: model_type is {hub.get('model_type')!r}; supported: {', '.join(map(repr, modules))} ('t5' also "
            "for Flan and ByT5)"
        )
    return importlib.import_module(modules[hub["model_type"]]).source(folder, hub, tensors.read_hub(folder))


def write(folder: Path, config: ModelConfig, params: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors (float32) of a model whose parameters are on this host.

    Raises UserError if Hugging Face has no such model.
    """
    family = interface.hub_module(config)
    hub = family.described(config)
    by_name: dict[str, Tensor] = {}
    for name, leaf in tensors.flat(params).items():
        whole = tensors.in_memory(np.asarray(leaf))  # no copy if the device is the CPU
        for layer in range(leaf.shape[0] if "/layers/" in name else 1):
            tensor = whole.at(layer, 0) if "/layers/" in name else whole
            theirs = family.name_of(config, name).format(layer)
            by_name[theirs] = tensor.transposed if family.is_transposed(name) else tensor
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hub, indent=1) + "\n")
    tensors.write_safetensors(folder / "model.safetensors", dict(sorted(by_name.items())))
