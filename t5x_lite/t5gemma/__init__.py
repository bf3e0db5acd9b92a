"""The T5Gemma model families (Zhang et al. 2025: arXiv 2504.06225 and 2512.14856) and their config, `T5GemmaConfig`.

T5Gemma is Gemma 2 made an encoder-decoder, T5Gemma 2 is Gemma 3. The other modules are the network, the
`interface.Model` (model.py) and Hugging Face conversion. No module outside this folder imports them:
`families.FAMILIES` names them, so the folder is optional. Images, which T5Gemma 2 can read, are not supported.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

from t5x_lite.errors import UserError
from t5x_lite.model.config import Dtype, EncoderDecoderConfig, Implementation, Remat, check_choices, check_lora

if TYPE_CHECKING:
    from t5x_lite.t5gemma.network import T5Gemma

Generation = Literal[1, 2]
LayerType = Literal["sliding", "global"]


class Sizes(NamedTuple):
    """Sizes of the encoder or the decoder."""

    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int


@dataclasses.dataclass(frozen=True)
class T5GemmaConfig(EncoderDecoderConfig):
    """Architecture of one T5Gemma. The published sizes are in `gin_configs/models/t5gemma/`.

    generation: 1 has a cross-attention in each layer of the decoder, a table of embeddings each for encoder and
      decoder, and a limit on the attention's logits. 2 has one attention over the tokens of decoder and encoder in its
      place, one table for both, norms of queries and keys, and an embedding of its own for one token, `eoi_token`.
    num_kv_heads: heads of keys and values; each is used by num_heads / num_kv_heads heads of queries.
    encoder_*: sizes of the encoder; 0: those of the decoder.
    query_scale: attention logits are divided by its square root; 0: head_dim.
    layer_pattern: types of the layers from the first one on, repeated. "sliding" attends within `sliding_window`.
    rope_theta: base of the rotary positions; `global_rope_theta` is that of global layers, whose positions are divided
      by `global_rope_factor`.
    attention_softcap, logits_softcap: limits x on logits, x * tanh(logits / x); 0: none.
    start_token: the decoder's first input, Gemma's <bos>. In a batch it is 0, as with every model here.
    end_tokens: tokens at which decoding ends; in text and predictions all are the first, 1.
    adapter_size, lora_rank, lora_targets, dtype, scan_layers, remat, attention: see T5Config. Dropout is applied as in
      T5, except to attention weights.
    """

    decoder_only: ClassVar[bool] = False
    prefix_lm: ClassVar[bool] = False
    meaning: ClassVar[tuple[str, ...]] = (
        *("num_heads", "num_kv_heads", "head_dim", "query_scale", "sliding_window", "layer_pattern", "rope_theta"),
        *("global_rope_theta", "global_rope_factor", "attention_softcap", "logits_softcap", "start_token", "eoi_token"),
        "end_tokens",
    )

    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    generation: Generation = 1
    encoder_d_model: int = 0
    encoder_d_ff: int = 0
    encoder_num_heads: int = 0
    encoder_num_kv_heads: int = 0
    encoder_head_dim: int = 0
    vocab_size: int = 256000
    tie_embeddings: bool = True
    query_scale: float = 0.0
    sliding_window: int = 4096
    layer_pattern: tuple[LayerType, ...] = ("sliding", "global")
    rope_theta: float = 10000.0
    global_rope_theta: float = 10000.0
    global_rope_factor: float = 1.0
    attention_softcap: float = 50.0
    logits_softcap: float = 30.0
    start_token: int = 2
    end_tokens: tuple[int, ...] = (1,)
    eoi_token: int = 256000
    adapter_size: int = 0
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ("query", "value")
    dropout_rate: float = 0.0
    dtype: Dtype = "float32"
    scan_layers: bool = True
    remat: Remat = "minimal"
    attention: Implementation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_pattern", tuple(self.layer_pattern))
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        object.__setattr__(self, "end_tokens", tuple(self.end_tokens))
        for side, sizes in {"encoder": self.encoder, "decoder": self.decoder}.items():
            if small := [f"{name} is {size}" for name, size in sizes._asdict().items() if size < 1]:
                raise UserError(f"T5GemmaConfig: of the {side}, {', '.join(small)}: it must be at least 1")
            if sizes.num_heads % sizes.num_kv_heads or sizes.head_dim % 2:
                raise UserError(
                    f"T5GemmaConfig: the {side}'s num_heads={sizes.num_heads} must be a multiple of "
                    f"num_kv_heads={sizes.num_kv_heads}, and head_dim={sizes.head_dim} even"
                )
        if self.generation == 2 and (self.attention_softcap or self.encoder.d_model != self.d_model):
            raise UserError(
                "T5GemmaConfig.generation=2 has one width, and attention_softcap=0.0; got encoder_d_model="
                f"{self.encoder_d_model}, d_model={self.d_model}, attention_softcap={self.attention_softcap}"
            )
        if self.generation == 2 and self.encoder[2:5] != self.decoder[2:5]:
            raise UserError(
                "T5GemmaConfig.generation=2: the decoder's attention reads keys of the encoder: encoder_num_heads, "
                "encoder_num_kv_heads and encoder_head_dim must be 0, or those of the decoder"
            )
        if not self.layer_pattern or set(self.layer_pattern) - set(get_args(LayerType)):
            raise UserError(
                f"T5GemmaConfig.layer_pattern={self.layer_pattern}: give one or more of {get_args(LayerType)}"
            )
        at_least = {"vocab_size": 1, "adapter_size": 0, "sliding_window": 1, "start_token": 1}
        at_least |= {"query_scale": 0, "attention_softcap": 0, "logits_softcap": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"T5GemmaConfig.{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("rope_theta", "global_rope_theta", "global_rope_factor"):
            if getattr(self, name) <= 0:
                raise UserError(f"T5GemmaConfig.{name} must be above 0, got {getattr(self, name)}")
        if 1 not in self.end_tokens or not all(0 < token < self.vocab_size for token in self.end_tokens):
            raise UserError(
                f"T5GemmaConfig.end_tokens={self.end_tokens} must have 1, at which targets end, and ids below "
                f"vocab_size={self.vocab_size} (in config.json, eos_token_id)"
            )
        if self.start_token >= self.vocab_size:
            raise UserError(f"T5GemmaConfig.start_token={self.start_token} is not in vocab_size={self.vocab_size}")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise UserError(f"T5GemmaConfig.dropout_rate must be in [0, 1), got {self.dropout_rate}")
        check_lora(self)
        check_choices(self, dtype=Dtype, remat=Remat, generation=Generation)

    @property
    def decoder(self) -> Sizes:
        heads = self.num_heads, self.num_kv_heads, self.head_dim
        return Sizes._make((self.d_model, self.d_ff, *heads, self.num_decoder_layers))

    @property
    def encoder(self) -> Sizes:
        own: Any = (getattr(self, f"encoder_{name}") for name in Sizes._fields[:-1])
        sizes = (size or same for size, same in zip(own, self.decoder, strict=False))
        return Sizes._make((*sizes, self.num_encoder_layers))

    @property
    def lora(self) -> tuple[str, ...]:
        """Return the kernels that LoRA updates."""
        return self.lora_targets if self.lora_rank else ()

    def layer_types(self, count: int) -> list[LayerType]:
        """Return the types of the first `count` layers."""
        return [self.layer_pattern[i % len(self.layer_pattern)] for i in range(count)]

    def network(self, train: bool = False) -> "T5Gemma":
        from t5x_lite.t5gemma.network import T5Gemma

        return T5Gemma(self, train)
