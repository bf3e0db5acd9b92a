"""Convert parameter names and config.json between T5EncoderConfig and Hugging Face's T5EncoderModel, UMT5's too.

A head for classes is that of T5ForSequenceClassification, which has a decoder. A folder of the sentence-transformers
library is such a model too: its projection, if it has one, is read, and what is written here is such a folder. Must not
handle file formats.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_lite.convert import huggingface_t5, tensors
from t5x_lite.convert.huggingface import described_labels, labels_of
from t5x_lite.convert.tensors import Source, Tensor
from t5x_lite.errors import MissingFileError, UserError
from t5x_lite.t5_encoder import T5EncoderConfig, t5_encoder

_DENSE = "2_Dense"
_PROJECTION = f"{_DENSE}/linear.weight"
_LIBRARY = "sentence_transformers.models."
_CLASSES = "ForSequenceClassification"
_HEAD = {
    f"classify/{ours}/{end}": f"classification_head.{theirs}.{'bias' if end == 'bias' else 'weight'}"
    for ours, theirs in (("dense", "dense"), ("out", "out_proj"))
    for end in ("kernel", "bias")
}

is_transposed = huggingface_t5.is_transposed


def name_of(config: T5EncoderConfig, name: str) -> str:
    if name == "embed/kernel":
        return _PROJECTION
    body = "transformer." if config.head == "classify" else ""
    return _HEAD.get(name) or body + huggingface_t5.name_of(config, name)


def source(folder: Path, hub: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Source:
    """Return the config and tensors. Raises UserError for an unsupported config, or another way to make embeddings."""
    if any(_CLASSES in name for name in hub.get("architectures") or ()):
        return _classifier(folder, hub, stored)
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
    config = t5_encoder(t5.config, embed_dim=embed_dim)  # pyright: ignore[reportArgumentType]
    return Source(config, by_name, lambda name: name_of(config, name), is_transposed)


def _classifier(folder: Path, hub: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Source:
    body = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    t5 = huggingface_t5.source(folder, hub, body)
    by_name = {name if name in _HEAD.values() else f"transformer.{name}": x for name, x in t5.tensors.items()}
    by_name.pop("transformer.lm_head.weight", None)  # a copy, of files that say that tables are tied
    out = by_name.get(_HEAD["classify/out/kernel"])
    count = 2 if out is None else out.shape[0]
    labels = labels_of(folder / "config.json", hub, count)
    fields = dataclasses.asdict(t5.config) | {"head": "classify", "num_labels": count, "labels": labels}
    config = T5EncoderConfig(**fields)
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
    kind = "UMT5" if hub["model_type"] == "umt5" else "T5"
    if config.head == "classify":
        if not config.num_decoder_layers:
            raise UserError(
                "Hugging Face has no T5 encoder with a head for classes alone (its T5ForSequenceClassification has a "
                "decoder): convert it --to=t5x_lite"
            )
        classes = described_labels(config.labels, config.num_labels)
        return hub | {"architectures": [kind + _CLASSES]} | classes
    return hub | {
        "architectures": [f"{kind}EncoderModel"],
        "num_decoder_layers": config.num_encoder_layers,  # transformers reads it, and the encoder does not use it
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def other_files(config: T5EncoderConfig) -> dict[str, Any]:
    """Return the JSON files of the sentence-transformers library, by their paths in the folder."""
    if config.head == "classify":
        return {}
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
