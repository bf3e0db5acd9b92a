"""The BERT model family (Devlin et al. 2019) and its config, `BertConfig`.

The other modules are the network, the `interface.Model` (model.py), predictions and Hugging Face conversion. No
module outside this folder imports them: `families.FAMILIES` names them, so the folder is optional.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from t5x_lite.errors import UserError
from t5x_lite.model.config import Dtype, Implementation, ModelConfig, Remat, check_choices, check_labels, with_labels

Head = Literal["pooler", "mlm", "nsp", "classify"]


@dataclasses.dataclass(frozen=True)
class BertConfig(ModelConfig):
    """Architecture of one BERT.

    max_length: number of position embeddings, the maximum length of a row.
    heads: "pooler" (a dense layer on [CLS]); "mlm" (masked tokens); and on top of the pooler "nsp" (whether the second
      segment follows the first) and "classify" (`num_labels` classes, or a number).
    labels: names of the classes if known; in a checkpoint, those of the task that it was trained on.
    dtype, scan_layers, remat, attention: see T5Config. Dropout is applied as published, except that the mask of the
      attention weights is shared by the queries of a row, as in T5.
    """

    d_model: int
    d_ff: int
    num_heads: int
    num_layers: int
    vocab_size: int = 30522
    max_length: int = 512
    num_segments: int = 2
    heads: tuple[Head, ...] = ("pooler", "mlm", "nsp")
    num_labels: int = 2
    labels: tuple[str, ...] = ()
    dropout_rate: float = 0.1
    dtype: Dtype = "float32"
    scan_layers: bool = True
    remat: Remat = "minimal"
    attention: Implementation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(self.heads))
        object.__setattr__(self, "labels", tuple(self.labels))
        sizes = ("d_model", "d_ff", "num_heads", "num_layers", "vocab_size", "max_length", "num_segments")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"BertConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.num_heads:
            raise UserError(f"BertConfig.d_model={self.d_model} must be a multiple of num_heads={self.num_heads}")
        if unknown := [head for head in self.heads if head not in get_args(Head)]:
            raise UserError(f"BertConfig.heads has {unknown}; known: {get_args(Head)}")
        if "pooler" not in self.heads and (above := {"nsp", "classify"} & set(self.heads)):
            raise UserError(f"BertConfig.heads={self.heads}: {', '.join(sorted(above))} needs the pooler")
        check_labels(self)
        if not 0.0 <= self.dropout_rate < 1.0:
            raise UserError(f"BertConfig.dropout_rate must be in [0, 1), got {self.dropout_rate}")
        check_choices(self, dtype=Dtype, remat=Remat)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    def for_task(self, name: str, features: Mapping[str, Any]) -> "BertConfig":
        if "classify" not in self.heads:
            return self
        return with_labels(self, name, features, "BertConfig.num_labels")
