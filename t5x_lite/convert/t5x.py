"""Read T5X checkpoints. T5X uses the same parameter names, with `layers_{}` in place of `layers`.

This module handles T5X's trees, scanned and unscanned, and infers the config from shapes. File formats are in
tensors.py, placement on devices is in convert.
"""

import functools
import logging
import re
from collections.abc import Mapping

from t5x_lite.convert import tensors
from t5x_lite.convert.bucket import AnyPath
from t5x_lite.convert.tensors import Source, Tensor
from t5x_lite.errors import UserError
from t5x_lite.model.layers import ACTIVATIONS
from t5x_lite.model.t5 import T5Config

log = logging.getLogger(__name__)


def read(path: AnyPath) -> Source:
    """Return tensors and config. It is inferred from shapes and, for activations, from the config.gin of the
    run, if it is there; the other fields are T5's defaults.

    A decoder-only model is read as a prefix LM, which is how T5X decodes it. Without inputs it equals a causal LM.

    Raises UserError if the checkpoint is not a T5.
    """
    state = tensors.read_t5x(path)
    root = next((r for r in ("optimizer/target/", "target/", "params/") if any(n.startswith(r) for n in state)), None)
    if root is None:
        top_level = ", ".join(sorted({name.split("/")[0] for name in state})) or "nothing"
        raise UserError(f"{path} has no parameters under optimizer/target, target or params; it has {top_level}")
    tensors_by_name: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(root):
            tensors_by_name |= _unscanned(name.removeprefix(root), tensor)
    config = _inferred(path, tensors_by_name)
    return Source(config, tensors_by_name, functools.partial(name_of, config))


def name_of(config: T5Config, name: str) -> str:
    if config.decoder_only and name.startswith("token_embedder/"):
        name = f"decoder/{name}"
    return name.replace("/layers/", "/layers_{}/")


def _unscanned(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Split a scanned stack: T5X has its layers on axis 1, under `layers` or a second time under the stack's name."""
    match = re.fullmatch(r"(encoder|decoder)/(?:layers|\1)/(.*)", name)
    if match is None or len(tensor.shape) < 2:
        return {name: tensor}
    stack, rest = match.groups()
    return {f"{stack}/layers_{i}/{rest}": tensor.at(i, 1) for i in range(tensor.shape[1])}


def _inferred(path: AnyPath, stored: Mapping[str, Tensor]) -> T5Config:
    def shape(name: str) -> tuple[int, ...]:
        if name not in stored:
            raise UserError(f"{path} has no {name}: it is not a T5. It has " + ", ".join(sorted(stored)[:12]))
        return stored[name].shape

    def layers(stack: str) -> int:
        numbers = [int(m[1]) for name in stored if (m := re.match(rf"{stack}/layers_(\d+)/", name))]
        return max(numbers, default=-1) + 1

    decoder_only = "decoder/token_embedder/embedding" in stored
    stack, attention = ("decoder", "self_attention") if decoder_only else ("encoder", "attention")
    vocab_size, d_model = shape("decoder/token_embedder/embedding" if decoder_only else "token_embedder/embedding")
    per_layer = f"{stack}/layers_0/relpos_bias/rel_embedding" in stored
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
        mlp_activations=_activations(path, gated=f"{stack}/layers_0/mlp/wi/kernel" not in stored),
        tie_embeddings="decoder/logits_dense/kernel" not in stored,
        vocab_size=vocab_size,
        prefix_lm=decoder_only,
        relative_bias="per_layer" if per_layer else "shared",
        relative_buckets=buckets,
    )


def _activations(path: AnyPath, gated: bool) -> tuple[str, ...]:
    """Return the MLP's activations from the run's config.gin, or T5's own, with a warning where others are possible."""
    for folder in (path, *path.absolute().parents[:2]):
        gin = folder / "config.gin"
        text = gin.read_text(encoding="utf-8") if gin.is_file() else ""
        if match := re.search(r"mlp_activations\s*=\s*[(\[]([^)\]]*)[)\]]", text):
            names = tuple(re.findall(r"[\w-]+", match[1]))
            activations = tuple("silu" if name == "swish" else name for name in names)
            if unknown := [name for name in activations if name not in ACTIVATIONS]:
                raise UserError(f"{gin}: mlp_activations has {', '.join(unknown)}; known: {', '.join(ACTIVATIONS)}")
            if (len(activations) > 1) != gated:
                raise UserError(f"{gin}: mlp_activations = {names}, but the checkpoint's MLP is of another form")
            return activations
    if gated:
        log.warning(
            "%s does not say which activation its MLP has: GELU is taken, as in T5 1.1. If it is another one (SiLU in "
            "UL2), put the run's config.gin beside the checkpoint.",
            path,
        )
    return ("gelu", "linear") if gated else ("relu",)
