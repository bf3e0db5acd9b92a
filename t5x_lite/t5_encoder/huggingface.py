"""Convert parameter names and config.json between T5EncoderConfig and Hugging Face's T5EncoderModel, UMT5's too.

A folder of the sentence-transformers library is such a model too: its projection, if it has one, is read, and what is
written here is such a folder. Must not handle file formats.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_lite.convert import huggingface_t5, tensors
from t5x_lite.convert.tensors import Source, Tensor
from t5x_lite.errors import MissingFileError, UserError
from t5x_lite.t5_encoder import T5EncoderConfig, t5_encoder

_DENSE = "2_Dense"
_PROJECTION = f"{_DENSE}/linear.weight"
_LIBRARY = "sentence_transformers.models."

is_transposed = huggingface_t5.is_transposed


def name_of(config: T5EncoderConfig, name: str) -> str:
    return _PROJECTION if name == "embed/kernel" else huggingface_t5.name_of(config, name)


def source(folder: Path, hub: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Source:
    """Return the config and tensors. Raises UserError for an unsupported config, or another way to make embeddings."""
    whole = {key: value for key, value in hub.items() if key != "is_encoder_decoder"}
    t5 = huggingface_t5.source(folder, whole, stored)
    by_name, embed_dim = {**t5.tensors}, 0
    by_name.pop("lm_head.weight", None)  # a copy, of files that say that tables are tied
    for kind, module in _modules(folder):
        settings = folder / module / "config.json"
        values = _read(settings) if kind in ("Pooling", "Dense") else {}
        if kind == "Pooling":
            modes = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
            modes = modes or [f"pooling_mode_{values.get('pooling_mode')}_tokens"]  # as from version 6 on
            if modes != ["pooling_mode_mean_tokens"]:
                raise UserError(
                    f"{settings}: embeddings are made by {modes}; only pooling_mode_mean_tokens is supported"
                )
        elif kind == "Dense":
            if values.get("bias", True) or not str(values.get("activation_function", "")).endswith(".Identity"):
                raise UserError(f"{settings}: only a projection without bias and activation_function is supported")
            dense = tensors.read_hub(folder / module)
            if dense.keys() != {"linear.weight"}:
                raise UserError(
                    f"{folder / module}: expected the tensor linear.weight, found {', '.join(sorted(dense))}"
                )
            by_name[_PROJECTION] = dense["linear.weight"]
            embed_dim = by_name[_PROJECTION].shape[0]
        elif kind not in ("Transformer", "Normalize"):
            raise UserError(f"{folder / 'modules.json'}: the module {kind} is not supported")
    config = t5_encoder(t5.config, embed_dim)  # pyright: ignore[reportArgumentType]
    return Source(config, by_name, lambda name: name_of(config, name), is_transposed)


def _modules(folder: Path) -> list[tuple[str, str]]:
    file = folder / "modules.json"
    if not file.is_file():
        return []
    return [(x["type"].rpartition(".")[2], x["path"]) for x in _read(file)]


def _read(file: Path) -> Any:
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist: the folder is not complete")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None


def described(config: T5EncoderConfig) -> dict[str, Any]:
    """Return config.json."""
    hub = huggingface_t5.described(config)
    umt5 = hub["model_type"] == "umt5"
    return hub | {
        "architectures": ["UMT5EncoderModel" if umt5 else "T5EncoderModel"],
        "num_decoder_layers": config.num_encoder_layers,  # transformers reads it, and the encoder does not use it
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def other_files(config: T5EncoderConfig) -> dict[str, Any]:
    """Return the JSON files of the sentence-transformers library, by their paths in the folder."""
    dense = [("Dense", _DENSE)] if config.embed_dim else []
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), *dense, ("Normalize", f"{2 + len(dense)}_Normalize")]
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"{_LIBRARY}{kind}"}
            for i, (kind, path) in enumerate(modules)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": config.d_model, "pooling_mode_mean_tokens": True},
    }
    if dense:
        files[f"{_DENSE}/config.json"] = {
            "in_features": config.d_model,
            "out_features": config.embed_dim,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    return files
