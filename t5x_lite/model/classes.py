"""What models with a head for classes share: targets, and the names of predictions. Must not depend on a family."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num


def targets(tokens_BS: Int[Array, "B S"], label_B1: Num[Array, "B 1"]) -> tuple[Num[Array, "B 1"], Float[Array, "B 1"]]:
    """Return targets and weights of labels: class ids, or floats for regression.

    A label below 0 is unknown and has weight 0, as rows of padding have.
    """
    is_real_B1 = jnp.any(tokens_BS != 0, axis=-1, keepdims=True)
    return jnp.maximum(label_B1, 0), jnp.float32(is_real_B1 & (label_B1 >= 0))


def predicted(config: Any, logits_BN: Float[np.ndarray, "B N"]) -> list[str] | list[float]:
    """Return the name of each row's best class, its id if `config.labels` is empty, or the number of regression."""
    if config.num_labels == 1:
        return logits_BN[:, 0].tolist()
    return [config.labels[i] if config.labels else str(i) for i in logits_BN.argmax(-1).tolist()]
