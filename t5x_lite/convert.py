"""Parameters from Hugging Face and T5X into our tree, and back to Hugging Face: one key table.

    python -m t5x_lite.convert SOURCE DEST --to=huggingface|t5x_lite

SOURCE is a Hugging Face T5 directory (T5 1.0 and 1.1, Flan, mT5, ByT5), a T5X checkpoint (one msgpack file, a folder of
msgpack and zarr, or Orbax's), or our own: a MODEL_DIR or one of its checkpoints. DEST is a Hugging Face directory, or a
folder that INITIAL_CHECKPOINT_PATH takes. A tokenizer's file goes along where SOURCE has one.

Every tensor of a source is used once, with the shape that the model asks for, or refused by name. They are read one
stack of layers at a time, straight onto the mesh: the host holds one parameter and what lies on its devices. This
module knows names, layouts and configs; not how files are made (tensors.py), nor what a tokenizer does.
"""

import argparse
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from t5x_lite import checkpoint, sharding, tensors
from t5x_lite.model import T5, T5Config
from t5x_lite.tensors import Tensor

Format = Literal["huggingface", "t5x_lite"]

_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_MLP = ("wi", "wi_0", "wi_1", "wo")

# Our parameters and Hugging Face's; {} is the layer. T5X's names are ours with `layers_{}` in place of `layers`.
# Hugging Face has kernels as [out, in] and relative biases as [buckets, heads].
HUGGING_FACE = {
    "token_embedder/embedding": "shared.weight",
    "encoder/relpos_bias/rel_embedding": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder/layers/pre_attention_layer_norm/scale": "encoder.block.{}.layer.0.layer_norm.weight",
    **{
        f"encoder/layers/attention/{ours}/kernel": f"encoder.block.{{}}.layer.0.SelfAttention.{theirs}.weight"
        for ours, theirs in _ATTENTION.items()
    },
    "encoder/layers/pre_mlp_layer_norm/scale": "encoder.block.{}.layer.1.layer_norm.weight",
    **{f"encoder/layers/mlp/{w}/kernel": f"encoder.block.{{}}.layer.1.DenseReluDense.{w}.weight" for w in _MLP},
    "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
    "decoder/relpos_bias/rel_embedding": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
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

# What Hugging Face's T5 directories hold beside: copies of other tensors, and one that its own code never reads.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of shared.weight
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

# Hugging Face's names for the MLP; its "gelu" of a gated layer is the tanh approximation, which is ours and T5X's.
_ACTIVATIONS = {
    "relu": ("relu",),
    "gelu_new": ("gelu",),
    "silu": ("silu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}

TOKENIZER_FILES = ("spiece.model", "sentencepiece.model")
_HUB_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


# What lies where


def abstract_params(
    config: T5Config, mesh: sharding.AnyMesh | None = None, rules: sharding.Rules = sharding.RULES
) -> dict[str, Any]:
    """Shapes and shardings of a model's parameters; without a mesh, on the first device."""
    mesh = mesh or sharding.make_mesh(1, devices=jax.local_devices()[:1])
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    boxed = jax.eval_shape(lambda key, token: T5(config).init(key, token, token)["params"], key, token)
    return sharding.shard_state(nn.unbox(boxed), boxed, mesh, rules)


def read(
    path: str | Path,
    mesh: sharding.AnyMesh | None = None,
    rules: sharding.Rules = sharding.RULES,
    **changes: Any,
) -> tuple[T5Config, dict[str, Any]]:
    """The config and the parameters, on the mesh, of whatever `path` holds.

    Args:
      changes: values for fields of the config that do not touch parameters, such as dtype.

    Raises:
      FileNotFoundError: nothing there that is known.
      ValueError: a tensor is unknown, missing, twice there or of the wrong shape; a config that no T5Config can say.
    """
    path = Path(path).expanduser()
    if (path / "config.json").exists():
        config, parts = from_hugging_face(path)
    elif checkpoint.find_checkpoint(path) is not None:
        config = dataclasses.replace(_own_config(path), **changes)
        return config, checkpoint.restore_params(path, abstract_params(config, mesh, rules))
    elif path.exists() and tensors.is_t5x(path):
        config, parts = from_t5x(path)
    else:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:12]) if path.is_dir() else "it does not exist"
        raise FileNotFoundError(
            f"{path} is no model: expected a Hugging Face directory (config.json), a MODEL_DIR or one of its "
            f"checkpoints, or a T5X checkpoint; found: {there or 'an empty folder'}"
        )
    config = dataclasses.replace(config, **changes)
    return config, _placed(parts, abstract_params(config, mesh, rules))


def _own_config(path: Path) -> T5Config:
    info = checkpoint.read_info(path)
    if "model" not in info:
        raise ValueError(f"{path}: the checkpoint's info says no model config, so it cannot be built")
    known = {field.name for field in dataclasses.fields(T5Config)}
    if unknown := set(info["model"]) - known:
        raise ValueError(f"{path}: its model config has {sorted(unknown)}, which no T5 has: it is of another kind")
    return T5Config(**{**info["model"], "mlp_activations": tuple(info["model"]["mlp_activations"])})


# Each parameter is a list of the source's tensors: one, or one for each layer.

Parts = Mapping[str, list[Tensor]]


def _placed(parts: Parts, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Reads each parameter and puts it on its devices before the next is read: of it, only what lies on this host."""
    placed = {}
    for name, leaf in _flat(abstract).items():
        layers = parts[name]

        def part(index: Any, layers: list[Tensor] = layers, leaf: Any = leaf) -> np.ndarray:
            if len(layers[0].shape) == len(leaf.shape):
                return layers[0].read(index).astype(leaf.dtype)
            chosen = range(len(layers))[index[0]]
            shape = [len(range(size)[i]) for size, i in zip(leaf.shape, index, strict=True)]
            stack = np.empty(shape, leaf.dtype)
            for row, layer in enumerate(chosen):
                stack[row] = layers[layer].read(index[1:])
            return stack

        placed[name] = jax.block_until_ready(jax.make_array_from_callback(leaf.shape, leaf.sharding, part))
    return traverse_util.unflatten_dict(placed, sep="/")


def _claim(
    source: Path, config: T5Config, found: Mapping[str, Tensor], key: Callable[[str], str], transpose: bool
) -> dict[str, list[Tensor]]:
    """The tensors of each parameter.

    Args:
      key: a parameter's name to the source's, with {} for the layer.
      transpose: whether the source has kernels and relative biases transposed.

    Raises ValueError: one is missing, not asked for, or of the wrong shape; all are named.
    """
    parts: dict[str, list[Tensor]] = {}
    missing, wrong, used = [], [], set()
    for name, leaf in _flat(abstract_params(config)).items():
        stacked = "/layers/" in name
        shape = leaf.shape[1:] if stacked else leaf.shape
        parts[name] = []
        for layer in range(leaf.shape[0] if stacked else 1):
            theirs = key(name).format(layer)
            used.add(theirs)
            if theirs not in found:
                missing.append(f"{theirs} {list(shape)}")
                continue
            tensor = found[theirs]
            tensor = tensor.transposed if transpose and _is_transposed(name) else tensor
            if tensor.shape != shape:
                wrong.append(f"{theirs}: {list(tensor.shape)}, the model has {list(shape)} ({name})")
            parts[name].append(tensor)
    unknown = sorted(f"{name} {list(found[name].shape)}" for name in found.keys() - used)
    problems = {"missing": missing, "unknown": unknown, "of another shape": wrong}
    if any(problems.values()):
        lines = [f"{source} does not hold the tensors of {config}."]
        for what, names in problems.items():
            if names:
                lines += [f"  {what}: {len(names)}", *(f"    {name}" for name in names[:12])]
        raise ValueError("\n".join(lines))
    return parts


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(dict(tree), sep="/"))


def _is_transposed(name: str) -> bool:
    return name.endswith(("/kernel", "/rel_embedding"))


# Hugging Face


def from_hugging_face(folder: Path) -> tuple[T5Config, dict[str, list[Tensor]]]:
    """Raises ValueError or FileNotFoundError, with what to do."""
    file = folder / "config.json"
    hub = json.loads(file.read_text())
    found = tensors.read_hub(folder)
    config = _config_of(file, hub)
    found.pop(_UNUSED, None)
    shared = "shared.weight"
    for copy in (*_COPIES, *(["lm_head.weight"] if config.tie_embeddings else [])):
        if copy not in found:
            continue
        tensor = found.pop(copy)
        if not _equal(tensor, found.setdefault(shared, tensor)):
            raise ValueError(f"{folder}: {copy} differs from {shared}, and a T5 of this config has them as one")
    if not config.tie_embeddings and hub.get("tie_word_embeddings", True) and shared in found:
        found.setdefault("lm_head.weight", found[shared])  # one table, and yet no scale: transformers 5 writes such
    return config, _claim(folder, config, found, HUGGING_FACE.__getitem__, transpose=True)


def _equal(a: Tensor, b: Tensor, rows: int = 4096) -> bool:
    blocks = ((slice(start, start + rows), slice(None)) for start in range(0, a.shape[0], rows))
    return a.shape == b.shape and all(np.array_equal(a.read(block), b.read(block)) for block in blocks)


def _config_of(file: Path, hub: Mapping[str, Any]) -> T5Config:
    kind = hub.get("model_type")
    if kind == "umt5":
        raise ValueError(f"{file}: UMT5 has a relative bias in every layer; this T5 has one for all layers of a stack")
    if kind not in ("t5", "mt5"):
        raise ValueError(f"{file}: model_type is {kind!r}; T5, Flan, ByT5 ('t5') and mT5 ('mt5') are read")
    proj = hub.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    if proj not in _ACTIVATIONS:
        raise ValueError(f"{file}: feed_forward_proj is {proj!r}; known: {', '.join(_ACTIVATIONS)}")
    if hub.get("layer_norm_epsilon", 1e-6) != 1e-6:
        raise ValueError(f"{file}: layer_norm_epsilon is {hub['layer_norm_epsilon']}; T5's is 1e-06")
    needed = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    if missing := [name for name in needed if name not in hub]:
        raise ValueError(f"{file} does not say {', '.join(missing)}")
    # T5 1.0 has one table for inputs and outputs, and scales the outputs. transformers 5 writes every T5 as tied, and
    # `scale_decoder_outputs` has the old meaning; mT5 is never scaled.
    scaled = kind == "t5" and hub.get("scale_decoder_outputs", hub.get("tie_word_embeddings", True))
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
        relative_buckets=hub.get("relative_attention_num_buckets", 32),
        relative_max_distance=hub.get("relative_attention_max_distance", 128),
        dropout_rate=hub.get("dropout_rate", 0.1),
    )


def write_hugging_face(folder: Path, config: T5Config, params: Mapping[str, Any]) -> None:
    """config.json and model.safetensors (float32) of a model that lies on this host.

    Raises ValueError: the config is none of Hugging Face's T5s.
    """
    projections = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if config.mlp_activations not in projections:
        raise ValueError(
            f"mlp_activations={config.mlp_activations} cannot be said in a Hugging Face config; these can: "
            f"{', '.join(map(str, projections))}"
        )
    hub = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
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
    found: dict[str, Tensor] = {}
    for name, leaf in _flat(params).items():
        whole = tensors.in_memory(np.asarray(leaf))  # no copy, where the device is the host
        for layer in range(leaf.shape[0] if "/layers/" in name else 1):
            tensor = whole.at(layer, 0) if "/layers/" in name else whole
            found[HUGGING_FACE[name].format(layer)] = tensor.transposed if _is_transposed(name) else tensor
    (folder / "config.json").write_text(json.dumps(hub, indent=1) + "\n")
    tensors.write_safetensors(folder / "model.safetensors", dict(sorted(found.items())))


# T5X


def from_t5x(path: Path) -> tuple[T5Config, dict[str, list[Tensor]]]:
    """The config is inferred from shapes, for T5X saves none: what they do not show is T5's.

    Raises ValueError: no encoder-decoder T5 with one relative bias a stack.
    """
    state = tensors.read_t5x(path)
    root = next((r for r in ("optimizer/target/", "target/", "params/") if any(n.startswith(r) for n in state)), None)
    if root is None:
        held = ", ".join(sorted({name.split("/")[0] for name in state})) or "nothing"
        raise ValueError(f"{path} has no parameters under optimizer/target, target or params; it has {held}")
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(root):
            found |= _unscanned(name.removeprefix(root), tensor)
    return (config := _inferred(path, found)), _claim(path, config, found, _t5x_key, transpose=False)


def _t5x_key(name: str) -> str:
    return name.replace("/layers/", "/layers_{}/")


def _unscanned(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """T5X's scanned stacks have the layers on axis 1, under `layers`, or under the stack's name a second time."""
    match = re.fullmatch(r"(encoder|decoder)/(?:layers|\1)/(.*)", name)
    if match is None or len(tensor.shape) < 2:
        return {name: tensor}
    stack, rest = match.groups()
    return {f"{stack}/layers_{i}/{rest}": tensor.at(i, 1) for i in range(tensor.shape[1])}


def _inferred(path: Path, found: Mapping[str, Tensor]) -> T5Config:
    def shape(name: str) -> tuple[int, ...]:
        if name not in found:
            raise ValueError(
                f"{path} has no {name}: it is no encoder-decoder T5 with one relative bias for each stack. It has "
                + ", ".join(sorted(found)[:12])
            )
        return found[name].shape

    def layers(stack: str) -> int:
        numbers = [int(m[1]) for name in found if (m := re.match(rf"{stack}/layers_(\d+)/", name))]
        return max(numbers, default=-1) + 1

    vocab_size, d_model = shape("token_embedder/embedding")
    num_heads, buckets = shape("encoder/relpos_bias/rel_embedding")
    _, joined = shape("encoder/layers_0/attention/query/kernel")
    d_ff, _ = shape("encoder/layers_0/mlp/wo/kernel")
    return T5Config(
        d_model=d_model,
        d_ff=d_ff,
        num_heads=num_heads,
        head_dim=joined // num_heads,
        num_encoder_layers=layers("encoder"),
        num_decoder_layers=layers("decoder"),
        mlp_activations=("relu",) if "encoder/layers_0/mlp/wi/kernel" in found else ("gelu", "linear"),
        tie_embeddings="decoder/logits_dense/kernel" not in found,
        vocab_size=vocab_size,
        relative_buckets=buckets,
    )


# The command


def tokenizer_file(path: str | Path) -> Path | None:
    """The SentencePiece model that goes with a model: beside it, or what the config.gin of its run names."""
    path = Path(path).expanduser()
    found = None if (path / "config.json").exists() else checkpoint.find_checkpoint(path)
    run = Path(found).parent.parent if found is not None and found.parent.name == checkpoint.FOLDER else path
    for folder in (path, run):
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                return folder / name
    gin = run / "config.gin"
    said = re.search(r"^VOCABULARY = (['\"])(.+)\1$", gin.read_text(), re.MULTILINE) if gin.is_file() else None
    return Path(said[2]) if said and Path(said[2]).is_file() else None


def convert(source: str | Path, dest: str | Path, to: Format) -> T5Config:
    """Writes the model in `source` to the folder `dest`; returns its config.

    Raises FileExistsError: `dest` holds something; and what `read` raises.
    """
    source, dest = Path(source).expanduser(), Path(dest).expanduser()
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise FileExistsError(f"{dest} is there and not empty: name a new folder")
    host = sharding.make_mesh(1, devices=jax.local_devices(backend="cpu")[:1])
    config, params = read(source, host)
    if to == "t5x_lite":
        checkpoint.save_params(dest, params, info={"model": dataclasses.asdict(config)})
    else:
        dest.mkdir(parents=True, exist_ok=True)
        write_hugging_face(dest, config, params)
    if (tokenizer := tokenizer_file(source)) is not None:
        shutil.copyfile(tokenizer, dest / "spiece.model")
    for name in _HUB_TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, dest / name)
    return config


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m t5x_lite.convert", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", help="Hugging Face directory, T5X checkpoint, MODEL_DIR or checkpoint")
    parser.add_argument("dest", help="folder to make")
    parser.add_argument("--to", required=True, choices=get_args(Format))
    asked = parser.parse_args(arguments)
    try:
        config = convert(asked.source, asked.dest, asked.to)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"t5x_lite.convert: {error}", file=sys.stderr)
        return 1
    print(f"{asked.dest}: {config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
