"""What the core's tests share: the golden T5 of Hugging Face and T5X, in our layout."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t5x_lite.model.t5 import T5Config


@pytest.fixture
def golden_dir(golden) -> Path:
    return golden("README.md").parent


@dataclasses.dataclass
class GoldenT5:
    config: T5Config
    params: dict[str, Any]
    io: dict[str, np.ndarray]
    outputs: dict[str, Any]

    @property
    def batch(self) -> dict[str, np.ndarray]:
        return {
            "encoder_input_tokens": self.io["input_ids"] * self.io["attention_mask"],
            "decoder_input_tokens": self.io["decoder_input_ids"],
            "decoder_target_tokens": self.io["targets"],
            "decoder_loss_weights": (self.io["targets"] != 0).astype(np.int32),
        }


@pytest.fixture(scope="session")
def golden_t5(golden) -> GoldenT5:
    """A tiny T5 1.1 with random weights: its inputs, and what other implementations make of them."""
    folder = golden("hf_t5_v11")
    hub = json.loads((folder / "config.json").read_text())
    config = T5Config(
        d_model=hub["d_model"],
        d_ff=hub["d_ff"],
        num_heads=hub["num_heads"],
        head_dim=hub["d_kv"],
        num_encoder_layers=hub["num_layers"],
        num_decoder_layers=hub["num_decoder_layers"],
        vocab_size=hub["vocab_size"],
    )
    leaves = dict(np.load(folder / "t5x_params.npz"))
    io = dict(np.load(folder / "io.npz"))
    return GoldenT5(config, stack_layers(leaves), io, json.loads((folder / "outputs.json").read_text()))


def stack_layers(leaves: dict[str, np.ndarray]) -> dict[str, Any]:
    """T5X's unscanned names (encoder/layers_0/...) to our tree, with the layers stacked."""
    stacks: dict[str, list[np.ndarray]] = {}
    for name in sorted(leaves, key=lambda name: [int(n) for n in re.findall(r"layers_(\d+)", name)]):
        stacks.setdefault(re.sub(r"layers_\d+", "layers", name), []).append(leaves[name])
    tree: dict[str, Any] = {}
    for name, arrays in stacks.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = np.stack(arrays) if "layers" in path else arrays[0]
    return tree
