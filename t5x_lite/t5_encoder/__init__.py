"""Sentence embeddings from T5's encoder (Sentence-T5, Ni et al. 2021), and their config, `T5EncoderConfig`.

The other modules are the network, the `interface.Model` (model.py), evaluation and inference, and Hugging Face
conversion. No module outside this folder imports them: `families.FAMILIES` names them, so the folder is optional.
"""

import dataclasses
from typing import ClassVar

from t5x_lite.errors import UserError
from t5x_lite.model.config import T5Config


@dataclasses.dataclass(frozen=True)
class T5EncoderConfig(T5Config):
    """Architecture of the encoder of a T5, and of the embedding made of its outputs. T5Config has the other fields.

    embed_dim: size of an embedding, by a projection of the mean output; 0: the mean itself, of size d_model.
    temperature: of the softmax over similarities that is trained; Sentence-T5 has 0.01.
    """

    fewest_decoder_layers: ClassVar[int] = 0

    num_decoder_layers: int = 0
    embed_dim: int = 0
    temperature: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_decoder_layers or not self.num_encoder_layers:
            raise UserError(
                "T5EncoderConfig describes an encoder: num_encoder_layers must be at least 1, got "
                f"{self.num_encoder_layers} (models/decoder_only.gin has none), and num_decoder_layers 0, got "
                f"{self.num_decoder_layers}"
            )
        if self.embed_dim < 0:
            raise UserError(f"T5EncoderConfig.embed_dim must be at least 0, got {self.embed_dim}")
        if self.temperature <= 0:
            raise UserError(f"T5EncoderConfig.temperature must be above 0, got {self.temperature}")


def t5_encoder(t5: T5Config, embed_dim: int = 0, temperature: float = 0.01) -> T5EncoderConfig:
    """Return the encoder of a T5, so that every model file of a T5 also describes its encoder."""
    fields = {field.name: getattr(t5, field.name) for field in dataclasses.fields(t5)}
    return T5EncoderConfig(**fields | {"num_decoder_layers": 0, "embed_dim": embed_dim, "temperature": temperature})
