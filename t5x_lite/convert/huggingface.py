"""Hugging Face's directories: config.json and tensors to and from a model of any family.

Each family's own module knows its names, layouts and config.json (`interface.FAMILIES`). This one knows neither how
files are made (tensors.py) nor where parameters will lie (convert).
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
    """Raises UserError or FileNotFoundError, with what to do."""
    file = folder / "config.json"
    hub = json.loads(file.read_text())
    modules = interface.hub_modules()
    if hub.get("model_type") not in modules:
        raise UserError(
            f"{file}: model_type is {hub.get('model_type')!r}; {', '.join(map(repr, modules))} are read ('t5' also for "
            "Flan and ByT5)"
        )
    return importlib.import_module(modules[hub["model_type"]]).source(folder, hub, tensors.read_hub(folder))


def write(folder: Path, config: ModelConfig, params: Mapping[str, Any]) -> None:
    """config.json and model.safetensors (float32) of a model that lies on this host.

    Raises UserError: Hugging Face has no such model.
    """
    family = interface.hub_module(config)
    hub = family.described(config)
    found: dict[str, Tensor] = {}
    for name, leaf in tensors.flat(params).items():
        whole = tensors.in_memory(np.asarray(leaf))  # no copy, where the device is the host
        for layer in range(leaf.shape[0] if "/layers/" in name else 1):
            tensor = whole.at(layer, 0) if "/layers/" in name else whole
            theirs = family.name_of(config, name).format(layer)
            found[theirs] = tensor.transposed if family.is_transposed(name) else tensor
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hub, indent=1) + "\n")
    tensors.write_safetensors(folder / "model.safetensors", dict(sorted(found.items())))
