"""Convert parameter names, layouts and config.json of Hugging Face's T5 (1.0, 1.1, Flan, ByT5), mT5 and UMT5.

Must not handle file formats.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5x_lite.convert import tensors
from t5x_lite.convert.huggingface import check_keys
from t5x_lite.convert.tensors import Source, Tensor
from t5x_lite.errors import UserError
from t5x_lite.model.config import T5Config

_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_MLP = ("wi", "wi_0", "wi_1", "wo")

# Parameter names here -> Hugging Face names; {} is the layer. Hugging Face stores kernels as [out, in] and relative
# biases as [buckets, heads].
NAMES = {
    "token_embedder/embedding": "shared.weight",
    "encoder/relpos_bias/rel_embedding": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder/layers/relpos_bias/rel_embedding": (
        "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "encoder/layers/pre_attention_layer_norm/scale": "encoder.block.{}.layer.0.layer_norm.weight",
    **{
        f"encoder/layers/attention/{ours}/kernel": f"encoder.block.{{}}.layer.0.SelfAttention.{theirs}.weight"
        for ours, theirs in _ATTENTION.items()
    },
    "encoder/layers/pre_mlp_layer_norm/scale": "encoder.block.{}.layer.1.layer_norm.weight",
    **{f"encoder/layers/mlp/{w}/kernel": f"encoder.block.{{}}.layer.1.DenseReluDense.{w}.weight" for w in _MLP},
    "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
    "decoder/relpos_bias/rel_embedding": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder/layers/relpos_bias/rel_embedding": (
        "decoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "decoder/layers/pre_self_attention_layer_norm/scale": "decoder.block.{}.layer.0.layer_norm.weight",
    **{
        f"decoder/layers/self_attention/{ours}/kernel": f"decoder.block.{{}}.layer.0.SelfAttention.{theirs}.weight"
        for ours, theirs in _ATTENTION.items()
    },
    "decoder/layers/pre_cross_attention_layer_norm/scale": "decoder.block.{}.layer.1.layer_norm.weight",
    **{
        f"decoder/layers/encoder_decoder_attention/{ours}/kernel": (
            f"decoder.block.{{}}.layer.1.EncDecAttention.{theirs}.weight"
        )
        for ours, theirs in _ATTENTION.items()
    },
    "decoder/layers/pre_mlp_layer_norm/scale": "decoder.block.{}.layer.2.layer_norm.weight",
    **{f"decoder/layers/mlp/{w}/kernel": f"decoder.block.{{}}.layer.2.DenseReluDense.{w}.weight" for w in _MLP},
    "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
    "decoder/logits_dense/kernel": "lm_head.weight",
}

# Additional tensors in Hugging Face's T5 directories: copies of other tensors, and one that its code never reads.
_SHARED = "shared.weight"
_COPIES = {"encoder.embed_tokens.weight": _SHARED, "decoder.embed_tokens.weight": _SHARED}
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

# Hugging Face's names of the MLP activations. Its gated "gelu" is the tanh approximation, as here and in T5X.
_ACTIVATIONS = {
    "relu": ("relu",),
    "gelu_new": ("gelu",),
    "silu": ("silu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}


# Keys of config.json that are read, and those that must have T5's value.
_READ = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "feed_forward_proj"),
    *("tie_word_embeddings", "scale_decoder_outputs", "dropout_rate"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
    *("hidden_size", "num_attention_heads", "num_hidden_layers"),  # other names that transformers writes for some
)
_ONLY = {
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "is_encoder_decoder": True,
}
_REASONS = {
    "pad_token_id": "masks, losses and packing take token 0 as padding",
    "eos_token_id": "decoding ends at token 1, and tokenizers with another end, such as CodeT5's (2), are not read",
    "decoder_start_token_id": "training and decoding start with token 0, unlike some CodeT5 (2)",
}


def source(folder: Path, hub: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Source:
    """Return the config and tensors. Raises UserError for an unsupported config, or copies that differ."""
    config, by_name = _config_of(folder / "config.json", hub), dict(stored)
    by_name.pop(_UNUSED, None)
    tensors.drop_copies(folder, by_name, _COPIES | ({"lm_head.weight": _SHARED} if config.tie_embeddings else {}))
    if not config.tie_embeddings and hub.get("tie_word_embeddings", True) and _SHARED in by_name:
        # transformers 5 writes files with a tied table that is not scaled.
        by_name.setdefault("lm_head.weight", by_name[_SHARED])
    return Source(config, by_name, NAMES.__getitem__, is_transposed)


def is_transposed(name: str) -> bool:
    return name.endswith(("/kernel", "/rel_embedding"))


def name_of(config: T5Config, name: str) -> str:
    """Return Hugging Face's name of a parameter; {} is the layer."""
    return NAMES[name]


def _config_of(file: Path, hub: Mapping[str, Any]) -> T5Config:
    kind = hub["model_type"]
    proj = hub.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    if proj not in _ACTIVATIONS:
        raise UserError(f"{file}: feed_forward_proj is {proj!r}; known: {', '.join(_ACTIVATIONS)}")
    activation = "gelu_new" if proj == "gated-gelu" else proj.removeprefix("gated-")
    derived = {"is_gated_act": proj.startswith("gated-"), "dense_act_fn": activation}
    check_keys(file, hub, _READ, _ONLY | derived, _REASONS)
    for key in ("tie_word_embeddings", "scale_decoder_outputs"):
        if not isinstance(hub.get(key, True), bool):
            raise UserError(f"{file}: {key} is {hub[key]!r}; it must be true or false")
    needed = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    if missing := [name for name in needed if name not in hub]:
        raise UserError(f"{file} lacks {', '.join(missing)}")
    # T5 1.0 ties input and output embeddings and scales the outputs by 1/sqrt(d_model). transformers 5 marks every T5
    # as tied, and `scale_decoder_outputs` tells whether it is scaled. mT5 is never scaled. UMT5 is scaled if the file
    # says tied; transformers 5 scales every UMT5, also Google's, whose files say untied, so its logits are smaller by
    # sqrt(d_model).
    tied = hub.get("tie_word_embeddings", True)
    scaled = {"t5": hub.get("scale_decoder_outputs", tied), "mt5": False, "umt5": tied}[kind]
    return T5Config(
        d_model=hub["d_model"],
        d_ff=hub["d_ff"],
        num_heads=hub["num_heads"],
        head_dim=hub["d_kv"],
        num_encoder_layers=hub["num_layers"],
        num_decoder_layers=hub.get("num_decoder_layers") or hub["num_layers"],
        mlp_activations=_ACTIVATIONS[proj],
        tie_embeddings=scaled,
        vocab_size=hub["vocab_size"],
        relative_bias="per_layer" if kind == "umt5" else "shared",
        relative_buckets=hub.get("relative_attention_num_buckets", 32),
        relative_max_distance=hub.get("relative_attention_max_distance", 128),
        dropout_rate=hub.get("dropout_rate", 0.1),
    )


def described(config: T5Config) -> dict[str, Any]:
    """Return config.json. Raises UserError if Hugging Face has no such T5."""
    if config.decoder_only:
        raise UserError("Hugging Face has no decoder-only T5 (num_encoder_layers=0): convert it --to=t5x_lite")
    projections = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if config.adapter_size:
        raise UserError(
            f"Hugging Face's T5 has no adapters (adapter_size={config.adapter_size}, parameters "
            "encoder/layers/adapter and decoder/layers/adapter): convert it --to=t5x_lite"
        )
    if config.mlp_activations not in projections:
        raise UserError(
            f"mlp_activations={config.mlp_activations} has no name in a Hugging Face config; supported: "
            f"{', '.join(map(str, projections))}"
        )
    umt5 = config.relative_bias == "per_layer"
    return {
        "architectures": ["UMT5ForConditionalGeneration" if umt5 else "T5ForConditionalGeneration"],
        "model_type": "umt5" if umt5 else "t5",
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "d_kv": config.head_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "vocab_size": config.vocab_size,
        "feed_forward_proj": projections[config.mlp_activations],
        "tie_word_embeddings": config.tie_embeddings,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "dropout_rate": config.dropout_rate,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
