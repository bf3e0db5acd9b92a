"""`Model`: what training, data and tools may ask of a model of any family.

The families are listed in families.py, and their configs derive from `config.ModelConfig`. This module must not depend
on any family, nor on training, data or files.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Key, Num

from t5x_lite.model.feature_converter import FeatureConverter

if TYPE_CHECKING:
    from t5x_lite.inference.decode import Decoding
    from t5x_lite.inference.predictor import Predictor
    from t5x_lite.training.partitioner import Partitioner

Batch = Mapping[str, Array]


@runtime_checkable
class Model(Protocol):
    """A model of one family. Outputs and targets are dicts keyed by head; T5 has one head, ""."""

    @property
    def head_params(self) -> str:
        """Return a regular expression for the names of task-specific parameters.

        When a run starts from another checkpoint, those that are missing there or have another shape are initialised at
        random, and those that only the checkpoint has are not read; all others must match.
        """
        ...

    def init(self, key: Key[Array, ""]) -> Any:
        """Return random parameters, each in a flax box with its logical axes."""
        ...

    def logits(
        self, params: Any, batch: Batch, dropout_key: Key[Array, ""] | None = None
    ) -> Mapping[str, Float[Array, "..."]]:
        """Return the output of each head for a batch, float32; dropout is on if a key is given.

        The output of a head in `targets` has the shape of its targets plus a last axis of classes (1 for regression).
        """
        ...

    def targets(self, batch: Batch) -> Mapping[str, tuple[Num[Array, "B _"], Num[Array, "B _"]]]:
        """Return targets and loss weights of each head that is trained. Float targets mean regression.

        All arrays have B rows, which are split into micro-batches. Padding rows, all 0, have weight 0.

        Raises:
          UserError: no head of the model has targets in such a batch.
        """
        ...

    def feature_converter(self, pack: bool) -> FeatureConverter: ...

    def flops(self, batch_size: int, lengths: Mapping[str, int]) -> float:
        """Return the matrix-product FLOPs of one training step, padding included: the useful work in MFU.

        A multiply-add counts as two, the backward pass as twice the forward pass, and recomputation (remat) is not
        counted. Attention counts whole rows, without a discount for the causal mask (PaLM, appendix B).
        """
        ...

    def predictor(
        self, partitioner: "Partitioner", decoding: "Decoding", max_decode_length: int, seed: int
    ) -> "Predictor":
        """Return the compiled functions for evaluation and inference; the last three arguments are for generation."""
        ...

    def pretrained(self, params: Any, path: Any, mesh: Any) -> Any:
        """Return the object that `t5x_lite.load` gives for these parameters, with the tokenizer at `path`."""
        ...


NO_PARAMS = r"(?!)"  # matches nothing
