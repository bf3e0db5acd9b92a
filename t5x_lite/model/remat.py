"""Rematerialisation, option REMAT: which results are saved for the backward pass and which are recomputed.

"minimal" saves the results of matrix products and attention kernels, and recomputes everything else. `keep` marks the
results to save by name. This module must not depend on layers or models.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from t5x_lite.model.config import Remat

PRODUCT = "product"
# The residuals of cuDNN's forward pass have no name; recomputing them would repeat the whole pass.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"


def keep(x: Any) -> Array:
    """Mark `x` as expensive, so that "minimal" saves it."""
    return checkpoint_name(x, PRODUCT)


def _is_cudnn_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == CUDNN_FORWARD


def checkpointed(layer: type[nn.Module], remat: Remat, *, scanned: bool) -> type[nn.Module]:
    """Return `layer` with the remat policy `remat`. scanned: the layer is the body of a scan."""
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    # JAX's own policies for products do not apply inside functions with a custom backward pass, such as `project`.
    minimal = policies.save_from_both_policies(policies.save_only_these_names(PRODUCT), _is_cudnn_forward)
    # In a loop XLA cannot merge the recomputation with the forward pass; unrolled layers need the CSE barrier.
    return nn.remat(layer, policy=minimal if remat == "minimal" else None, prevent_cse=not scanned)
