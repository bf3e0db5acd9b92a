"""Convert parameter names and config.json between T5GemmaConfig and Hugging Face's T5Gemma and T5Gemma 2.

The vision tower of T5Gemma 2 is not read. Must not handle file formats.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5x_lite.convert import tensors
from t5x_lite.convert.huggingface import check_keys
from t5x_lite.convert.tensors import Source, Tensor
from t5x_lite.errors import UserError
from t5x_lite.t5gemma import LayerType, Sizes, T5GemmaConfig

log = logging.getLogger(__name__)

_ATTENTION = {
    **{
        f"{ours}/kernel": f"{theirs}_proj"
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
    },
    "query_norm/scale": "q_norm",
    "key_norm/scale": "k_norm",
}
_LAYER = {
    **{f"self_attention/{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"encoder_decoder_attention/{ours}": f"cross_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{
        f"{when}_{ours}_layer_norm/scale": f"{when}_{theirs}_layernorm"
        for when in ("pre", "post")
        for ours, theirs in (("self_attention", "self_attn"), ("cross_attention", "cross_attn"), ("mlp", "feedforward"))
    },
    **{
        f"mlp/{ours}/kernel": f"mlp.{theirs}_proj"
        for ours, theirs in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
    },
}
# Parameter names here -> Hugging Face names; {} is the layer.
NAMES = {
    **{
        f"{side}/layers/{ours}": f"model.{side}.layers.{{}}.{theirs}.weight"
        for side in ("encoder", "decoder")
        for ours, theirs in _LAYER.items()
    },
    **{f"{side}/{side}_norm/scale": f"model.{side}.norm.weight" for side in ("encoder", "decoder")},
    "decoder/logits_dense/kernel": "lm_head.out_proj.weight",
    "encoder_embedder/embedding": "model.encoder.embed_tokens.weight",
    "eoi_embedding": "model.encoder.embed_tokens.eoi_embedding",
}
_TABLES = {1: "model.decoder.embed_tokens.weight", 2: "model.encoder.embed_tokens.weight"}
_OUTPUT = "lm_head.out_proj.weight"
_VISION = ("model.encoder.vision_tower.", "model.encoder.multi_modal_projector.")
_TYPES: Mapping[str, LayerType] = {"sliding_attention": "sliding", "full_attention": "global"}
_TYPE_NAMES = {ours: theirs for theirs, ours in _TYPES.items()}

_SIZES = dict(
    zip(
        Sizes._fields,
        (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "num_hidden_layers",
        ),
        strict=True,
    )
)
_READ_STACK = (
    *(
        *_SIZES.values(),
        "vocab_size",
        "layer_types",
        "sliding_window",
        "sliding_window_pattern",
        "query_pre_attn_scalar",
    ),
    *("attn_logit_softcapping", "final_logit_softcapping", "rope_parameters", "rope_theta", "rope_local_base_freq"),
    *("rope_scaling", "_sliding_window_pattern", "eos_token_id", "tie_word_embeddings", "cross_attention_hidden_size"),
    *("max_position_embeddings", "cache_implementation", "attention_dropout", "classifier_dropout_rate"),
    *("is_encoder_decoder", "is_decoder"),
)
_ONLY_STACK = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "pad_token_id": 0,
}
_READ = (
    *("encoder", "decoder", "vocab_size", "tie_word_embeddings", "eos_token_id", "attention_dropout"),
    *("classifier_dropout_rate", "image_token_index", "eoi_token_index", "decoder_start_token_id"),
)
_ONLY = {"pad_token_id": 0, "is_encoder_decoder": True}
_READ_OUTER = (
    *("text_config", "vision_config", "boi_token_index", "eoi_token_index", "image_token_index"),
    *("mm_tokens_per_image", "vocab_size", "attention_dropout", "tie_word_embeddings"),
)
_ARCHITECTURES = ("T5GemmaForConditionalGeneration", "T5Gemma2ForConditionalGeneration")


def source(folder: Path, hub: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Source:
    """Return the config and tensors. Raises UserError for an unsupported config, or copies that differ."""
    generation_config = folder / "generation_config.json"
    if generation_config.is_file():  # which has the tokens at which transformers ends
        ends = json.loads(generation_config.read_text(encoding="utf-8")).get("eos_token_id")
        hub = {**hub, "eos_token_id": ends or hub.get("eos_token_id")}
    values = _values_of(folder / "config.json", hub)
    try:
        config = T5GemmaConfig(**values)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    by_name = {name.replace(".encoder.text_model.", ".encoder."): tensor for name, tensor in stored.items()}
    if len(by_name) < len(stored):
        raise UserError(f"{folder} has tensors under two names: with `text_model.` and without")
    if vision := [name for name in by_name if name.startswith(_VISION)]:
        log.info("%s: %d tensors of the vision tower are left out: images are not supported", folder, len(vision))
        by_name = {name: tensor for name, tensor in by_name.items() if name not in vision}
    copies = {_OUTPUT: _TABLES[config.generation]} if config.tie_embeddings else {}
    if config.generation == 2:
        for name in ("weight", "eoi_embedding"):
            copies[f"model.decoder.embed_tokens.{name}"] = f"model.encoder.embed_tokens.{name}"
    tensors.drop_copies(folder, by_name, copies)
    return Source(config, by_name, lambda name: name_of(config, name), is_transposed)


def is_transposed(name: str) -> bool:
    return name.endswith("/kernel")


def name_of(config: T5GemmaConfig, name: str) -> str:
    """Return Hugging Face's name of a parameter; {} is the layer."""
    return _TABLES[config.generation] if name == "token_embedder/embedding" else NAMES[name]


def module_of(config: T5GemmaConfig, name: str) -> str:
    """Return the name of a tensor in transformers' model: T5Gemma 2's files leave out that its encoder is for text."""
    return name.replace("model.encoder.", "model.encoder.text_model.") if config.generation == 2 else name


def _values_of(file: Path, hub: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the config's fields."""
    if others := [name for name in hub.get("architectures") or () if name not in _ARCHITECTURES]:
        raise UserError(f"{file}: {', '.join(others)} is not supported; {' and '.join(_ARCHITECTURES)} are")
    check_keys(file, hub, _READ, _ONLY)
    if lacking := [name for name in ("encoder", "decoder") if not isinstance(hub.get(name), dict)]:
        raise UserError(f"{file} lacks {' and '.join(lacking)}: the sizes of each")
    generation = 2 if hub["model_type"] == "t5gemma2" else 1
    outer, decoder = hub["encoder"], hub["decoder"]
    encoder = outer.get("text_config", {}) if generation == 2 else outer
    if generation == 2:
        check_keys(Path(f"{file}, encoder"), outer, _READ_OUTER, {})
    stacks: Mapping[str, Mapping[str, Any]] = {"encoder": encoder, "decoder": decoder}
    for side, stack in stacks.items():
        place = Path(f"{file}, {side}")
        # These two say what each is, and are None or False in _ONLY of every family.
        rest = {k: v for k, v in stack.items() if k not in ("is_decoder", "cross_attention_hidden_size")}
        check_keys(place, rest, _READ_STACK, _ONLY_STACK)
        for name in (*_SIZES.values(), "vocab_size"):
            if type(stack.get(name)) is not int:
                raise UserError(f"{place}: {name} is {stack.get(name)!r}; it must be a whole number")

    def common(name: str, values: Sequence[Any]) -> Any:
        if values[0] != values[1]:
            raise UserError(f"{file}: {name} is {values[0]!r} in the encoder, {values[1]!r} in the decoder")
        return values[0]

    def same(key: str, default: Any) -> Any:
        return common(key, [stack.get(key, default) for stack in stacks.values()])

    theta, global_theta, factor = common(
        "rope_parameters", [_rope(Path(f"{file}, {side}"), stack, generation) for side, stack in stacks.items()]
    )
    types = [_layer_types(Path(f"{file}, {side}"), stack, generation) for side, stack in stacks.items()]
    own, other = ({ours: stack[theirs] for ours, theirs in _SIZES.items()} for stack in (decoder, encoder))
    sizes: dict[str, Any] = own | {f"encoder_{name}": size for name, size in other.items() if size != own[name]}
    sizes |= {"num_decoder_layers": sizes.pop("num_layers"), "num_encoder_layers": other["num_layers"]}
    sizes.pop("encoder_num_layers", None)
    scale = same("query_pre_attn_scalar", 256)
    if not isinstance(scale, int | float):
        raise UserError(f"{file}: query_pre_attn_scalar is {scale!r}; it must be a number")
    ends = hub.get("eos_token_id") or decoder.get("eos_token_id") or 1
    return {
        **sizes,
        "generation": generation,
        "vocab_size": same("vocab_size", None),
        "tie_embeddings": hub.get("tie_word_embeddings") is not False,
        "query_scale": 0.0 if {scale} == {own["head_dim"], other["head_dim"]} else float(scale),
        "sliding_window": same("sliding_window", 4096) or 4096,
        "layer_pattern": _pattern(file, types),
        "rope_theta": theta,
        "global_rope_theta": global_theta,
        "global_rope_factor": factor,
        # transformers does not apply that of T5Gemma 2
        "attention_softcap": float(same("attn_logit_softcapping", 50.0) or 0) if generation == 1 else 0.0,
        "logits_softcap": float(decoder.get("final_logit_softcapping", 30.0 if generation == 1 else None) or 0),
        "start_token": hub.get("decoder_start_token_id") or decoder.get("bos_token_id") or hub.get("bos_token_id") or 2,
        "end_tokens": tuple(ends) if isinstance(ends, list) else (ends,),
        "eoi_token": outer.get("eoi_token_index", 256000) if generation == 2 else 256000,
        "dropout_rate": hub.get("dropout_rate", 0.0),
    }


def _rope(place: Path, stack: Mapping[str, Any], generation: int) -> tuple[float, float, float]:
    """Return the bases of sliding and global layers, and the factor of the latter."""
    new, scaling = stack.get("rope_parameters") or {}, stack.get("rope_scaling") or {}
    if generation == 1:
        parts = [{"rope_theta": stack.get("rope_theta", 10000.0)} | scaling | new] * 2
    else:
        of_sliding, of_global = (new.get(name) or {} for name in ("sliding_attention", "full_attention"))
        parts = [
            {"rope_theta": stack.get("rope_local_base_freq", 10000.0)} | of_sliding,
            {"rope_theta": stack.get("rope_theta", 1000000.0)} | scaling | of_global,
        ]
    kinds = [part.get("rope_type", part.get("type", "default")) for part in parts]
    if kinds[0] != "default" or kinds[1] not in ("default", "linear"):
        raise UserError(f"{place}: rope_type is {kinds}; 'default' is supported, and 'linear' of global layers")
    local, everywhere = (float(part["rope_theta"]) for part in parts)
    return local, everywhere, float(parts[1].get("factor", 1.0)) if kinds[1] == "linear" else 1.0


def _layer_types(place: Path, stack: Mapping[str, Any], generation: int) -> list[str]:
    types, count = stack.get("layer_types"), stack["num_hidden_layers"]
    if types is None:
        every = stack.get("sliding_window_pattern") or stack.get("_sliding_window_pattern") or (6, 2)[generation == 1]
        return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
    if not isinstance(types, list) or len(types) != count:
        raise UserError(f"{place}: layer_types is {types!r}; it must be a list of num_hidden_layers={count} names")
    if "sliding_attention" in types and not stack.get("sliding_window", 4096):
        raise UserError(
            f"{place}: sliding_window is {stack['sliding_window']!r}, but layer_types has sliding_attention"
        )
    return types


def _pattern(file: Path, stacks: Sequence[Sequence[str]]) -> tuple[LayerType, ...]:
    """Return the shortest pattern whose repetition gives the layers of both stacks."""
    if unknown := {kind for types in stacks for kind in types} - set(_TYPES):
        raise UserError(f"{file}: layer_types has {', '.join(sorted(unknown))}; known: {', '.join(_TYPES)}")
    longest = max(stacks, key=len)
    for period in range(1, len(longest) + 1):
        pattern = longest[:period]
        if all(kind == pattern[i % period] for types in stacks for i, kind in enumerate(types)):
            return tuple(_TYPES[kind] for kind in pattern)
    raise UserError(f"{file}: layer_types of encoder and decoder do not begin alike")


def described(config: T5GemmaConfig) -> dict[str, Any]:
    """Return config.json. Raises UserError if Hugging Face has no such model."""
    if config.adapter_size:
        raise UserError(
            f"Hugging Face's T5Gemma has no adapters (adapter_size={config.adapter_size}): convert it --to=t5x_lite"
        )
    second = config.generation == 2
    tokens = {"pad_token_id": 0, "bos_token_id": config.start_token}
    shared = tokens | {
        "eos_token_id": 1 if set(config.end_tokens) == {1} else list(config.end_tokens),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "dropout_rate": config.dropout_rate,
        "attention_dropout": 0.0,
    }

    def stack(sizes: Sizes, **others: Any) -> dict[str, Any]:
        scale = config.query_scale or sizes.head_dim
        local, everywhere = (
            {"rope_type": "default", "rope_theta": theta} for theta in (config.rope_theta, config.global_rope_theta)
        )
        if config.global_rope_factor != 1:
            everywhere |= {"rope_type": "linear", "factor": config.global_rope_factor}
        return {
            **{theirs: getattr(sizes, ours) for ours, theirs in _SIZES.items()},
            **shared,
            **_ONLY_STACK,
            "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
            "attn_logit_softcapping": config.attention_softcap or None,
            "final_logit_softcapping": config.logits_softcap or None,
            "sliding_window": config.sliding_window,
            "layer_types": [_TYPE_NAMES[kind] for kind in config.layer_types(sizes.num_layers)],
            "rope_parameters": {"sliding_attention": local, "full_attention": everywhere} if second else local,
            "max_position_embeddings": 131072 if second else 8192,
            "initializer_range": 0.02,
            "use_cache": True,
            **others,
        }

    if not second and (config.global_rope_theta, config.global_rope_factor) != (config.rope_theta, 1):
        raise UserError("Hugging Face's first T5Gemma has one rope_theta for all layers: convert it --to=t5x_lite")
    encoder = stack(config.encoder, model_type="t5gemma2_text" if second else "t5_gemma_module")
    kind = "T5Gemma2" if second else "T5Gemma"
    hub = {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": kind.lower(),
        "is_encoder_decoder": True,
        **shared,
        "classifier_dropout_rate": 0.0,
        "initializer_range": 0.02,
    }
    if not second:
        width = {"is_decoder": True, "cross_attention_hidden_size": config.encoder.d_model}
        return hub | {
            "encoder": encoder | {"is_decoder": False},
            "decoder": stack(config.decoder, model_type="t5_gemma_module", **width),
        }
    images = {"eoi_token_index": config.eoi_token, "image_token_index": config.eoi_token + 1}
    return (
        hub
        | images
        | {
            "encoder": {
                "model_type": "t5gemma2_encoder",
                "text_config": encoder,
                "boi_token_index": config.eoi_token - 1,
                **images,
                **_NO_VISION,
            },
            "decoder": stack(config.decoder, model_type="t5gemma2_decoder"),
        }
    )


# transformers has no T5Gemma 2 without a vision tower. This is the smallest: no layer, and an output of 0.
_WIDTH, _PATCH = 8, 14
_NO_VISION: Mapping[str, Any] = {
    "mm_tokens_per_image": 1,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_attention_heads": 1,
        "num_hidden_layers": 0,
        "image_size": _PATCH,
        "patch_size": _PATCH,
        "num_channels": 3,
        "vision_use_head": False,
    },
}


def other_tensors(config: T5GemmaConfig) -> dict[str, Tensor]:
    """Return the tensors of the model that are not parameters here."""
    if config.generation == 1:
        return {}
    tower, projector = _VISION
    shapes = {
        f"{tower}embeddings.patch_embedding.weight": (_WIDTH, 3, _PATCH, _PATCH),
        f"{tower}embeddings.patch_embedding.bias": (_WIDTH,),
        f"{tower}embeddings.position_embedding.weight": (1, _WIDTH),
        f"{tower}post_layernorm.weight": (_WIDTH,),
        f"{tower}post_layernorm.bias": (_WIDTH,),
        f"{projector}mm_input_projection_weight": (_WIDTH, config.d_model),
        f"{projector}mm_soft_emb_norm.weight": (_WIDTH,),
    }
    log.warning("The model is written without a vision tower: the tensors in its place are 0, and images mean nothing")
    return {name: tensors.in_memory(np.zeros(shape, np.float32)) for name, shape in shapes.items()}
