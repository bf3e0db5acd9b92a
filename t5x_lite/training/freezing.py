"""Select the parameters that train: rules over parameter names, and gradual unfreezing.

A name is a parameter's path, such as ``encoder/layers/mlp/wo/kernel``. Frozen parameters have no gradient and no
optimizer state; the training step, the checkpoints and the log all use the `ParameterFilter` of the optimizer.
This module must not depend on the model, the optimizer or the mesh.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Bool, Float

from t5x_lite.errors import UserError
from t5x_lite.model import quantization

Rules = Sequence[tuple[str, bool]]


@dataclasses.dataclass(frozen=True)
class ParameterFilter:
    """The parameters that train.

    Attributes:
      rules: pairs (regular expression, whether matching parameters train). The first that matches a name (re.search)
        decides; a parameter without a match is frozen. None means that all parameters train, () that none does.
      layers: (step, L) -> bool [L], the layers of a stack of L that train in the step after `step` updates; None means
        all layers in all steps. One compiled program serves all steps: a frozen layer keeps its parameters, but its
        gradient is computed and updates the optimizer's moments. Its first updates are therefore of normal size.
    """

    rules: Rules | None = None
    layers: Callable[[Any, int], Bool[Array, " L"]] | None = None

    def __post_init__(self) -> None:
        for pattern, _ in self.rules or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"TRAINABLE: {pattern!r} is not a regular expression: {error}") from None

    def partition(self, params: Any) -> tuple[Any, Any]:
        """Split `params` into two trees, of the trained and of the frozen parameters.

        Raises ValueError if a rule matches no name, or no parameter trains.
        """
        if self.rules is None:
            return params, {}
        leaves = traverse_util.flatten_dict(params, sep="/")
        for pattern, _ in self.rules:
            if not any(re.search(pattern, quantization.plain_name(name)) for name in leaves):
                nearest = difflib.get_close_matches(pattern, leaves, n=3, cutoff=0.3) or sorted(leaves)[:3]
                raise UserError(f"TRAINABLE: {pattern!r} matches no parameter's name; nearest: {', '.join(nearest)}")
        trained = {name: leaf for name, leaf in leaves.items() if self._trains(name)}
        if not trained and self.rules:
            raise UserError(
                f"TRAINABLE = {self.rules!r} trains nothing: parameters that match no rule are frozen, so end with "
                f"('', True) to train the rest, such as {', '.join(sorted(leaves)[:3])}"
            )
        frozen = {name: leaf for name, leaf in leaves.items() if name not in trained}
        return traverse_util.unflatten_dict(trained, sep="/"), traverse_util.unflatten_dict(frozen, sep="/")

    def _trains(self, name: str) -> bool:
        name = quantization.plain_name(name)
        return next((trains for pattern, trains in self.rules or () if re.search(pattern, name)), False)

    def apply_mask(self, step: Any, new: Any, old: Any) -> Any:
        """Return the updated parameters `new`, with the layers that do not train at `step` taken from `old`."""
        if self.layers is None:
            return new

        def mask(path: Sequence[Any], new: Array, old: Array) -> Array:
            if not is_layer_stack(path):
                return new
            return jnp.where(self._mask(step, new), new, old)

        return jax.tree_util.tree_map_with_path(mask, new, old)

    def _mask(self, step: Any, leaf: Any) -> Bool[Array, "..."]:
        assert self.layers is not None
        return self.layers(step, leaf.shape[0]).reshape(-1, *(1,) * (leaf.ndim - 1))

    def count(self, params: Any, step: Any = None) -> Float[Array, ""] | int:
        """Count the trained parameters; at `step`, if it is given and layers unfreeze gradually."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.partition(params)[0])
        if self.layers is None or step is None:
            return sum(leaf.size for _, leaf in leaves)
        parts = (
            jnp.mean(self._mask(step, leaf), dtype=jnp.float32) * leaf.size if is_layer_stack(path) else leaf.size
            for path, leaf in leaves
        )
        return jnp.asarray(sum(parts), jnp.float32)


ALL_PARAMETERS, NO_PARAMETERS = ParameterFilter(), ParameterFilter(())


def combine(trained: Any, frozen: Any) -> Any:
    """Merge the two trees of `ParameterFilter.partition`."""
    if not frozen:
        return trained
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(trained))


def gradual_unfreezing(total_steps: int, episodes: int = 12) -> ParameterFilter:
    """Unfreeze encoder and decoder in parallel, from the top, in `episodes` equal parts of the run (T5 paper 3.5.1).

    In episode k = 0, 1, ... the top (k+1) L / episodes of L blocks train, rounded up: k+1 blocks if L equals
    `episodes`, as in T5 base. Embeddings and output train throughout, as in the paper. The paper does not mention final
    norms and shared relative-bias tables; here they train throughout as well, because the norms are above the top block
    and the tables, like the embeddings, belong to no block. UMT5's tables, one in each block, unfreeze with it.

    Raises ValueError if there are no steps, or more episodes than steps.
    """
    if not 1 <= episodes <= total_steps:
        raise UserError(f"gradual_unfreezing: 1 <= episodes = {episodes} <= total_steps = {total_steps} must hold")

    def layers(step: Any, count: int) -> Bool[Array, " L"]:
        # The first step of each episode, computed with Python integers, which do not overflow.
        starts = jnp.asarray([-(-k * total_steps // episodes) for k in range(episodes)], jnp.int32)
        episode = jnp.sum(jnp.asarray(step) >= starts) - 1
        unfrozen = jnp.minimum(-(-(episode + 1) * count // episodes), count)
        return jnp.arange(count) >= count - unfrozen

    return ParameterFilter(layers=layers)


def is_layer_stack(path: Sequence[Any]) -> bool:
    """Return whether a parameter with this key path has a leading layer axis: a component of the path is `layers`."""
    return any(getattr(key, "key", getattr(key, "name", None)) == "layers" for key in path)
