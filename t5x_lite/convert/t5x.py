"""T5X's checkpoints: T5X's names are ours, with `layers_{}` in place of `layers`. They are read, not written.

Knows T5X's trees, scanned and unscanned, and what their shapes say of a config; not how its files are made
(tensors.py), nor where parameters will lie (convert.py).
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

from t5x_lite.convert import tensors
from t5x_lite.convert.tensors import Source, Tensor
from t5x_lite.errors import UserError
from t5x_lite.model.t5 import T5Config


def read(path: Path) -> Source:
    """The config is inferred from shapes, for T5X saves none: what they do not show is T5's.

    A decoder alone is taken for a prefix language model, as T5X decodes it, and which a plain one is where nothing says
    what the inputs are.

    Raises ValueError: no T5.
    """
    state = tensors.read_t5x(path)
    root = next((r for r in ("optimizer/target/", "target/", "params/") if any(n.startswith(r) for n in state)), None)
    if root is None:
        held = ", ".join(sorted({name.split("/")[0] for name in state})) or "nothing"
        raise UserError(f"{path} has no parameters under optimizer/target, target or params; it has {held}")
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(root):
            found |= _unscanned(name.removeprefix(root), tensor)
    config = _inferred(path, found)
    return Source(config, found, functools.partial(name_of, config))


def name_of(config: T5Config, name: str) -> str:
    if config.decoder_only and name.startswith("token_embedder/"):
        name = f"decoder/{name}"
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
            raise UserError(f"{path} has no {name}: it is no T5. It has " + ", ".join(sorted(found)[:12]))
        return found[name].shape

    def layers(stack: str) -> int:
        numbers = [int(m[1]) for name in found if (m := re.match(rf"{stack}/layers_(\d+)/", name))]
        return max(numbers, default=-1) + 1

    decoder_only = "decoder/token_embedder/embedding" in found
    stack, attention = ("decoder", "self_attention") if decoder_only else ("encoder", "attention")
    vocab_size, d_model = shape("decoder/token_embedder/embedding" if decoder_only else "token_embedder/embedding")
    per_layer = f"{stack}/layers_0/relpos_bias/rel_embedding" in found
    num_heads, buckets = shape(f"{stack}/{'layers_0/' * per_layer}relpos_bias/rel_embedding")
    _, joined = shape(f"{stack}/layers_0/{attention}/query/kernel")
    d_ff, _ = shape(f"{stack}/layers_0/mlp/wo/kernel")
    return T5Config(
        d_model=d_model,
        d_ff=d_ff,
        num_heads=num_heads,
        head_dim=joined // num_heads,
        num_encoder_layers=layers("encoder"),
        num_decoder_layers=layers("decoder"),
        mlp_activations=("relu",) if f"{stack}/layers_0/mlp/wi/kernel" in found else ("gelu", "linear"),
        tie_embeddings="decoder/logits_dense/kernel" not in found,
        vocab_size=vocab_size,
        prefix_lm=decoder_only,
        relative_bias="per_layer" if per_layer else "shared",
        relative_buckets=buckets,
    )
