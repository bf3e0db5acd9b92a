"""Convert parameter names and config.json between BertConfig and Hugging Face (see convert/huggingface_t5.py for T5).

Supports Hugging Face's heads for pre-training, masked tokens, next sentences and sequence classification, or none. The
heads of a directory are inferred from its tensors. Must not handle file formats.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_lite.bert import BertConfig, Head
from t5x_lite.convert import tensors
from t5x_lite.convert.huggingface import check_keys, described_labels, labels_of
from t5x_lite.convert.tensors import Source, Tensor
from t5x_lite.errors import UserError

_LAYER = {
    **{f"attention/{name}": f"attention.self.{name}" for name in ("query", "key", "value")},
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/wi": "intermediate.dense",
    "mlp/wo": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_MODULES = {
    "embedding_norm": "embeddings.LayerNorm",
    **{f"encoder/layers/{ours}": f"encoder.layer.{{}}.{theirs}" for ours, theirs in _LAYER.items()},
    "pooler": "pooler.dense",
    "mlm/transform": "cls.predictions.transform.dense",
    "mlm/norm": "cls.predictions.transform.LayerNorm",
    "nsp": "cls.seq_relationship",
    "classify": "classifier",
}
# Parameter names here -> Hugging Face names; {} is the layer.
NAMES = {
    "token_embedder/embedding": "embeddings.word_embeddings.weight",
    "position_embedding": "embeddings.position_embeddings.weight",
    "segment_embedding": "embeddings.token_type_embeddings.weight",
    "mlm/bias": "cls.predictions.bias",
    **{
        f"{ours}/{end}": f"{theirs}.{'bias' if end == 'bias' else 'weight'}"
        for ours, theirs in _MODULES.items()
        for end in (("scale", "bias") if ours.endswith("norm") else ("kernel", "bias"))
    },
}

_UNUSED = ("embeddings.position_ids", "embeddings.token_type_ids")  # 0, 1, 2, ... and 0, 0, 0, ...
_COPIES = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_HEADS: dict[Head, str] = {
    "pooler": "pooler.dense.weight",
    "mlm": "cls.predictions.transform.dense.weight",
    "nsp": "cls.seq_relationship.weight",
    "classify": "classifier.weight",
}
_ARCHITECTURES = {
    frozenset(): "BertModel",
    frozenset({"pooler"}): "BertModel",
    frozenset({"mlm"}): "BertForMaskedLM",
    frozenset({"pooler", "mlm"}): "BertForMaskedLM",
    frozenset({"pooler", "nsp"}): "BertForNextSentencePrediction",
    frozenset({"pooler", "mlm", "nsp"}): "BertForPreTraining",
    frozenset({"pooler", "classify"}): "BertForSequenceClassification",
}
_READ = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "pad_token_id"),
    *("max_position_embeddings", "type_vocab_size", "id2label", "label2id", "hidden_dropout_prob"),
    *("tie_word_embeddings", "is_encoder_decoder", "eos_token_id"),
)
_ONLY = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def source(folder: Path, hub: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Source:
    """Return the config and tensors. Raises UserError for an unsupported config or head, or copies that differ."""
    file = folder / "config.json"
    check_keys(file, hub, _READ, _ONLY)
    others = set(hub.get("architectures") or ()) - set(_ARCHITECTURES.values())
    if others:
        raise UserError(
            f"{file}: {', '.join(others)} is not supported; {', '.join(sorted(set(_ARCHITECTURES.values())))} are"
        )
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in needed if name not in hub]:
        raise UserError(f"{file} lacks {', '.join(missing)}")
    by_name = {_modern(name): tensor for name, tensor in stored.items()}
    if len(by_name) < len(stored):
        raise UserError(f"{folder} has tensors under two names: with `bert.` and without, or with gamma and weight")
    for name in _UNUSED:
        by_name.pop(name, None)
    tensors.drop_copies(folder, by_name, _COPIES)
    heads: tuple[Head, ...] = tuple(head for head, weight in _HEADS.items() if weight in by_name)
    num_labels = by_name[_HEADS["classify"]].shape[0] if "classify" in heads else 2
    config = BertConfig(
        d_model=hub["hidden_size"],
        d_ff=hub["intermediate_size"],
        num_heads=hub["num_attention_heads"],
        num_layers=hub["num_hidden_layers"],
        vocab_size=hub["vocab_size"],
        max_length=hub.get("max_position_embeddings", 512),
        num_segments=hub.get("type_vocab_size", 2),
        heads=heads,
        num_labels=num_labels,
        labels=labels_of(file, hub, num_labels) if "classify" in heads else (),
        dropout_rate=hub.get("hidden_dropout_prob", 0.1),
    )
    return Source(config, by_name, NAMES.__getitem__, is_transposed)


def is_transposed(name: str) -> bool:
    return name.endswith("/kernel")


def _modern(name: str) -> str:
    """Strip the prefix of models with heads, and rename gamma and beta of the first BERTs to weight and bias."""
    return name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight").replace("Norm.beta", "Norm.bias")


def name_of(config: BertConfig, name: str) -> str:
    """Return the Hugging Face name of a parameter in a model with these heads."""
    theirs = NAMES[name]
    inside = theirs.startswith(("embeddings.", "encoder.", "pooler."))
    return f"bert.{theirs}" if inside and _architecture(config) != "BertModel" else theirs


def _architecture(config: BertConfig) -> str:
    heads = frozenset(config.heads)
    if heads not in _ARCHITECTURES:
        supported = "; ".join(", ".join(sorted(heads)) for heads in _ARCHITECTURES if heads)
        raise UserError(f"heads={config.heads}: Hugging Face has no BERT with this combination; it has {supported}")
    return _ARCHITECTURES[heads]


def described(config: BertConfig) -> dict[str, Any]:
    """Return config.json. Raises UserError if Hugging Face has no class with these heads."""
    return {
        "architectures": [_architecture(config)],
        "model_type": "bert",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.num_segments,
        **described_labels(config.labels, config.num_labels),
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.dropout_rate,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        **_ONLY,
    }
