"""`LossConfig`: the settings of losses.py, validated. This module imports no JAX."""

import dataclasses
import math
from typing import Literal, get_args

from t5x_lite.errors import UserError

NamedFactor = Literal["NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the training loss.

    Attributes:
      z_loss: coefficient of log(Z)^2, where Z is the softmax normaliser; keeps logits from drifting away from zero.
      label_smoothing: probability mass moved from the target to the rest of the vocabulary, evenly.
      normalizing_factor: divisor of the summed loss: None for no division (as in T5), a positive number, or
        NUM_REAL_TARGET_TOKENS (sum of the loss weights), NUM_TOTAL_TARGET_TOKENS (batch size times target length),
        AVERAGE_PER_SEQUENCE (every sequence, packed or not, has the same weight, whatever its length).

    Raises:
      ValueError: a value is out of range, or a name is unknown.
    """

    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    normalizing_factor: float | NamedFactor | None = None

    def __post_init__(self) -> None:
        if not (self.z_loss >= 0 and math.isfinite(self.z_loss)):
            raise UserError(f"LossConfig.z_loss must be a finite number >= 0, got {self.z_loss!r}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"LossConfig.label_smoothing must lie in [0, 1), got {self.label_smoothing!r}")
        factor = self.normalizing_factor
        if isinstance(factor, str):
            valid = factor in get_args(NamedFactor)
        else:
            valid = factor is None or (factor > 0 and math.isfinite(factor))
        if not valid:
            names = ", ".join(get_args(NamedFactor))
            raise UserError(
                f"LossConfig.normalizing_factor must be None, a finite number > 0, or one of {names}; got {factor!r}"
            )
