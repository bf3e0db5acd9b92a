"""Heads on T5's encoder: sentence embeddings (Sentence-T5, Ni et al. 2021) and classes; `T5EncoderConfig`.

The other modules are the network, the `interface.Model` (model.py), evaluation and inference, and Hugging Face
conversion. No module outside this folder imports them: `families.FAMILIES` names them, so the folder is optional.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from t5x_lite.errors import UserError
from t5x_lite.model.config import T5Config, check_choices, check_labels, with_labels

Head = Literal["embed", "classify"]


@dataclasses.dataclass(frozen=True)
class T5EncoderConfig(T5Config):
    """Architecture of the encoder of a T5, and of the head on its outputs. T5Config has the other fields.

    head: "embed" (an embedding of the text) or "classify" (`num_labels` classes, or with 1 a number).
    num_decoder_layers: 0, and the head reads the mean output of the encoder; else, for classes, it reads the output at
      the last end token of a decoder that reads the inputs too, as in Hugging Face's T5ForSequenceClassification.
    embed_dim: size of an embedding, by a projection of the mean output; 0: the mean itself, of size d_model.
    temperature: of the softmax over similarities that is trained; Sentence-T5 has 0.01.
    labels: names of the classes if known; in a checkpoint, those of the task that it was trained on.
    """

    fewest_decoder_layers: ClassVar[int] = 0

    num_decoder_layers: int = 0
    head: Head = "embed"
    embed_dim: int = 0
    temperature: float = 0.01
    num_labels: int = 2
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "labels", tuple(self.labels))
        check_choices(self, head=Head)
        check_labels(self)
        if not self.num_encoder_layers or (self.num_decoder_layers and self.head == "embed"):
            raise UserError(
                "T5EncoderConfig describes an encoder: num_encoder_layers must be at least 1, got "
                f"{self.num_encoder_layers} (models/decoder_only.gin has none), and num_decoder_layers 0 unless head "
                f"is 'classify', got {self.num_decoder_layers}"
            )
        if self.embed_dim < 0:
            raise UserError(f"T5EncoderConfig.embed_dim must be at least 0, got {self.embed_dim}")
        if self.temperature <= 0:
            raise UserError(f"T5EncoderConfig.temperature must be above 0, got {self.temperature}")

    def for_task(self, name: str, features: Mapping[str, Any]) -> "T5EncoderConfig":
        if self.head != "classify":
            return self
        if "segments" in features:
            raise UserError(f"{name} has BERT's rows, [CLS] first [SEP] second [SEP]: see tasks named glue_..._classes")
        return with_labels(self, name, features, "t5_encoder.num_labels")


def t5_encoder(
    t5: T5Config,
    head: Head = "embed",
    embed_dim: int = 0,
    temperature: float = 0.01,
    num_labels: int = 2,
    labels: tuple[str, ...] = (),
) -> T5EncoderConfig:
    """Return the encoder of a T5, so that every model file of a T5 also describes its encoder."""
    fields = {field.name: getattr(t5, field.name) for field in dataclasses.fields(t5)}
    own = {"embed_dim": embed_dim, "temperature": temperature, "num_labels": num_labels, "labels": labels}
    return T5EncoderConfig(**fields | {"num_decoder_layers": 0, "head": head} | own)
