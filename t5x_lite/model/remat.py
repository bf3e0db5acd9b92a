"""What the backward pass finds kept of the forward pass, and what it computes anew: the option REMAT.

"minimal" keeps what a matrix product or an attention kernel has given, and computes anew what is cheap. Such results
are kept by a name that they get here; this module must not know layers or models.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from t5x_lite.model.interface import Remat

PRODUCT = "product"
# What cuDNN's backward pass wants of its forward pass has no name, and would cost that pass once more.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"


def keep(x: Any) -> Array:
    """`x`, marked as dear: "minimal" keeps it."""
    return checkpoint_name(x, PRODUCT)


def _of_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == CUDNN_FORWARD


def checkpointed(layer: type[nn.Module], remat: Remat, *, scanned: bool) -> type[nn.Module]:
    """`layer` with its backward pass as `remat` says. scanned: it is the body of a loop."""
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    # JAX's own policies for products do not see into functions with a backward pass of their own, as `project` is.
    minimal = policies.save_from_both_policies(policies.save_only_these_names(PRODUCT), _of_cudnn)
    # A loop already keeps XLA from merging the recomputation with the first pass; unrolled layers need the barrier.
    return nn.remat(layer, policy=minimal if remat == "minimal" else None, prevent_cse=not scanned)
