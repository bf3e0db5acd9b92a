"""Read and write Hugging Face directories (config.json and tensors) for any model family.

Each family has a module for its names, layouts and config.json (`families.FAMILIES`). File formats are in tensors.py,
placement on devices is in convert.
"""

import importlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from t5x_lite.convert import tensors
from t5x_lite.convert.tensors import Source, Tensor
from t5x_lite.errors import UserError
from t5x_lite.model import families
from t5x_lite.model.config import ModelConfig

# Keys of config.json that do not change what a model computes, with the reason. A family adds what it reads itself, and
# the values that it insists on; any other key with a value is an error.
_HARMLESS_FOR = {
    "names": "architectures model_type transformers_version _name_or_path tokenizer_class finetuning_task",
    "dtype is an option here": "torch_dtype dtype use_bfloat16 torchscript tf_legacy_loss",
    "how transformers runs, not what it computes": """use_cache output_attentions output_hidden_states output_past
        return_dict gradient_checkpointing chunk_size_feed_forward problem_type id2label label2id num_labels
        _attn_implementation_autoset""",
    "initial values; the file has others": "initializer_factor initializer_range",
    "dropout is an option here": """dropout_rate classifier_dropout hidden_dropout_prob
        attention_probs_dropout_prob""",
    "decoding is an option here": """bad_words_ids begin_suppress_tokens suppress_tokens bos_token_id sep_token_id
        diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
        forced_bos_token_id forced_eos_token_id length_penalty max_length min_length max_new_tokens
        no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix
        remove_invalid_values repetition_penalty return_dict_in_generate task_specific_params temperature top_k top_p
        typical_p""",
    "transformers does not read it": """n_positions scalable_attention directionality pooler_fc_size
        pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type""",
}
HARMLESS = {key: reason for reason, keys in _HARMLESS_FOR.items() for key in keys.split()}
_ONLY = {
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "quantization_config": None,
}


def check_keys(
    file: Path,
    hub: Mapping[str, Any],
    used: Collection[str],
    only: Mapping[str, Any],
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Check every key of config.json.

    Args:
      used: keys that the family reads.
      only: the single value that the family supports, by key.
      reasons: why there is only one, by key, for the error.

    Raises:
      UserError: a key has another value, or is not known.
    """
    required = {**_ONLY, **only}
    for key, value in hub.items():
        if key in required:
            if value != required[key] and value is not None:
                reason = f": {reasons[key]}" if key in reasons else ""
                raise UserError(f"{file}: {key} is {value!r}; only {required[key]!r} is supported{reason}")
        elif key not in used and key not in HARMLESS and value not in (None, False, [], {}):
            raise UserError(
                f"{file}: the key {key!r} ({str(value)[:60]!r}) is not known, and may change what the model computes. "
                "If it does not, remove it from the file"
            )


def labels_of(file: Path, hub: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """Return the names of a model's classes; none if config.json only numbers them.

    Raises UserError if a text may have several classes at once.
    """
    if hub.get("problem_type") == "multi_label_classification":
        raise UserError(f"{file}: problem_type is 'multi_label_classification'; a text has one class here")
    labels = tuple(str(hub.get("id2label", {}).get(str(i), "LABEL_")) for i in range(count))
    return () if any(label.startswith("LABEL_") for label in labels) else labels


def described_labels(labels: Sequence[str], count: int) -> dict[str, Any]:
    """Return the keys of config.json for the classes."""
    names = labels or [f"LABEL_{i}" for i in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def read(folder: Path) -> Source:
    """Return the config and tensors of a directory. Raises UserError or MissingFileError."""
    file = folder / "config.json"
    hub = json.loads(file.read_text(encoding="utf-8"))
    modules = families.hub_modules()
    kind = next((name for name in hub.get("architectures") or () if name in modules), hub.get("model_type"))
    if kind not in modules:
        raise UserError(
            f"{file}: model_type is {hub.get('model_type')!r}; supported: {', '.join(map(repr, modules))} ('t5' also "
            "for Flan and ByT5)"
        )
    return importlib.import_module(modules[kind]).source(folder, hub, tensors.read_hub(folder))


def write(folder: Path, config: ModelConfig, params: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors (float32) of a model whose parameters are on this host.

    Raises UserError if Hugging Face has no such model.
    """
    family = families.hub_module(config)
    hub = family.described(config)
    by_name: dict[str, dict[str, Tensor]] = {}  # in the folder itself, "", or in one of its folders
    for name, leaf in tensors.flat(params).items():
        whole = tensors.in_memory(np.asarray(leaf))  # no copy if the device is the CPU
        for layer in range(leaf.shape[0] if "/layers/" in name else 1):
            tensor = whole.at(layer, 0) if "/layers/" in name else whole
            place, _, theirs = family.name_of(config, name).format(layer).rpartition("/")
            by_name.setdefault(place, {})[theirs] = tensor.transposed if family.is_transposed(name) else tensor
    by_name[""] |= getattr(family, "other_tensors", lambda config: {})(config)
    others = getattr(family, "other_files", lambda config: {})(config)
    for path, values in {"config.json": hub, **others}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(values, indent=1) + "\n")
    for place, of_place in by_name.items():
        tensors.write_safetensors(folder / place / "model.safetensors", dict(sorted(of_place.items())))
