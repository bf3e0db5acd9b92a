"""T5Gemma's implementation of `interface.Model`: T5's, with another network."""

import dataclasses
from collections.abc import Mapping

from t5x_lite.t5_model import T5Model
from t5x_lite.t5gemma import Sizes, T5GemmaConfig


def _stack_flops(sizes: Sizes, length: int) -> int:
    """Return the FLOPs of the forward pass of self-attention and MLP in all layers, for a row of this length."""
    heads = 4 * sizes.d_model * sizes.head_dim * (sizes.num_heads + sizes.num_kv_heads)
    mlp = 6 * sizes.d_model * sizes.d_ff
    return sizes.num_layers * length * (heads + mlp + 4 * length * sizes.num_heads * sizes.head_dim)


@dataclasses.dataclass(frozen=True)
class T5GemmaModel(T5Model):
    config: T5GemmaConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def flops(self, batch_size: int, lengths: Mapping[str, int]) -> float:
        """Sliding layers count as if they had no window."""
        c, S, T = self.config, lengths["inputs"], lengths["targets"]
        own, other = c.decoder, c.encoder
        cross = S * 4 * other.d_model * own.head_dim * own.num_kv_heads + T * S * 4 * own.num_heads * own.head_dim
        if c.generation == 1:
            cross += T * 4 * own.d_model * own.head_dim * own.num_heads
        per_row = _stack_flops(other, S) + _stack_flops(own, T) + own.num_layers * cross
        return 3.0 * batch_size * (per_row + T * 2 * c.d_model * c.vocab_size)
