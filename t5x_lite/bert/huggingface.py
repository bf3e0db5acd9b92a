"""Hugging Face's BERT: names and config.json in both directions, as convert/huggingface_t5.py has them for T5.

Models with Hugging Face's heads for pre-training, masked tokens, next sentences and sequence classification, or with
none. Which of them a directory has is seen from its tensors. Must not know how files are made.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_lite.bert import BertConfig, Head
from t5x_lite.convert import tensors
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
# Our parameters and Hugging Face's; {} is the layer.
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
_ONLY = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def source(folder: Path, hub: Mapping[str, Any], found: Mapping[str, Tensor]) -> Source:
    """Raises ValueError: a config or a head that is not BERT's as published, or copies that differ."""
    file = folder / "config.json"
    for name, value in _ONLY.items():
        if hub.get(name, value) != value:
            raise UserError(f"{file}: {name} is {hub[name]!r}; BERT as published, and here, has {value!r}")
    others = set(hub.get("architectures") or ()) - set(_ARCHITECTURES.values())
    if others:
        raise UserError(
            f"{file}: {', '.join(others)} is not read; {', '.join(sorted(set(_ARCHITECTURES.values())))} are"
        )
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in needed if name not in hub]:
        raise UserError(f"{file} does not say {', '.join(missing)}")
    held = {_modern(name): tensor for name, tensor in found.items()}
    if len(held) < len(found):
        raise UserError(f"{folder} holds tensors under two names: with `bert.` and without, or with gamma and weight")
    for name in _UNUSED:
        held.pop(name, None)
    tensors.drop_copies(folder, held, _COPIES)
    heads: tuple[Head, ...] = tuple(head for head, weight in _HEADS.items() if weight in held)
    num_labels = held[_HEADS["classify"]].shape[0] if "classify" in heads else 2
    labels = tuple(hub.get("id2label", {}).get(str(i), "LABEL_") for i in range(num_labels))
    named = "classify" in heads and not any(label.startswith("LABEL_") for label in labels)
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
        labels=labels if named else (),
        dropout_rate=hub.get("hidden_dropout_prob", 0.1),
    )
    return Source(config, held, NAMES.__getitem__, is_transposed)


def is_transposed(name: str) -> bool:
    return name.endswith("/kernel")


def _modern(name: str) -> str:
    """Without the prefix of models with heads; the first BERTs' gamma and beta are weight and bias."""
    return name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight").replace("Norm.beta", "Norm.bias")


def name_of(config: BertConfig, name: str) -> str:
    """What a model with these heads calls a parameter."""
    theirs = NAMES[name]
    inside = theirs.startswith(("embeddings.", "encoder.", "pooler."))
    return f"bert.{theirs}" if inside and _architecture(config) != "BertModel" else theirs


def _architecture(config: BertConfig) -> str:
    heads = frozenset(config.heads)
    if heads not in _ARCHITECTURES:
        known = "; ".join(", ".join(sorted(known)) for known in _ARCHITECTURES if known)
        raise UserError(f"heads={config.heads}: Hugging Face has no BERT with these together; it has {known}")
    return _ARCHITECTURES[heads]


def described(config: BertConfig) -> dict[str, Any]:
    """config.json. Raises ValueError: Hugging Face has no class with these heads."""
    labels = config.labels or [f"LABEL_{i}" for i in range(config.num_labels)]
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
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.dropout_rate,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        **_ONLY,
    }
