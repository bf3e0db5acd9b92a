"""`T5Config`: the sizes of a T5 and how it is computed, validated. BERT's config shares some of its choices.

This module handles no arrays and imports no JAX. The letters of dimensions are defined in t5.py.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from t5x_lite.errors import UserError

if TYPE_CHECKING:
    import jax.numpy as jnp

    from t5x_lite.model.t5 import T5

Dtype = Literal["float32", "bfloat16"]
StoredDtype = Literal["float32", "bfloat16", "int8"]
Remat = Literal["none", "minimal", "full"]
Implementation = Literal["batch", "blocks", "flash", "cudnn"]
RelativeBias = Literal["shared", "per_layer"]
Activation = Literal["relu", "gelu", "silu", "linear"]


class ModelConfig:
    """Base class of model configs.

    `dtype`, `remat`, `scan_layers` and `attention` are documented in `T5Config`. These and `dropout_rate` may
    change between runs; the other fields determine the parameters.

    meaning: names of fields that change what parameters compute, but not their shapes.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    meaning: ClassVar[tuple[str, ...]] = ("num_heads",)
    d_model: int
    vocab_size: int
    dropout_rate: float
    dtype: Dtype
    remat: Remat
    scan_layers: bool

    def for_task(self, name: str, features: Mapping[str, Any]) -> "ModelConfig":
        """Return the config with the details of a SeqIO task, such as the names of its classes.

        Args:
          name: name of the task or mixture, for error messages.
          features: `output_features` of the task or mixture.

        Raises:
          UserError: the model does not fit the task.
        """
        return self

    @property
    def compute_dtype(self) -> "jnp.dtype":
        import jax.numpy as jnp

        return jnp.dtype(self.dtype)


class EncoderDecoderConfig(ModelConfig):
    """Base class of the configs of models that generate text, whose network derives from `t5.T5`."""

    decoder_only: bool
    prefix_lm: bool
    end_tokens: Sequence[int] = (1,)  # decoding ends at any of these

    @abc.abstractmethod
    def network(self, train: bool = False) -> "T5": ...


@dataclasses.dataclass(frozen=True)
class T5Config(EncoderDecoderConfig):
    """Architecture of one T5. The published sizes are in `gin_configs/models/`.

    num_encoder_layers: 0 gives a decoder-only model, with inputs and targets concatenated in one row.
    prefix_lm: in a decoder-only model, all tokens of the inputs attend to one another (no causal mask among them).
    relative_bias: one table shared by all layers of a stack, or one per layer (UMT5).
    adapter_size: hidden units of the adapter after each MLP (`layers.Adapter`); 0 adds none.
    lora_rank: rank of the LoRA updates of kernels (`layers.LowRank`); 0 adds none.
    lora_targets: the kernels that LoRA updates: "query", "key", "value", "out" of each attention; "wi" (wi_0 and wi_1)
      and "wo" of each MLP.
    dtype: dtype of activations; parameters, norms, softmax, logits and loss are always float32.
    scan_layers: run a stack as one compiled loop (quick to compile) or unrolled (XLA may optimise across layers).
    remat: recomputed in the backward pass: "none", "minimal" (all but matrix products and attention), "full" (layers).
    attention: attention implementation, if it supports the shapes; None selects by platform and shape (attention.py).
    """

    fewest_decoder_layers: ClassVar[int] = 1
    meaning: ClassVar[tuple[str, ...]] = (
        *("mlp_activations", "tie_embeddings", "prefix_lm", "relative_max_distance", "num_heads", "head_dim"),
    )

    d_model: int
    d_ff: int
    num_heads: int
    head_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    tie_embeddings: bool = False
    vocab_size: int = 32128
    prefix_lm: bool = False
    relative_bias: RelativeBias = "shared"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    adapter_size: int = 0
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ("query", "value")
    dropout_rate: float = 0.0
    dtype: Dtype = "float32"
    scan_layers: bool = True
    remat: Remat = "minimal"
    attention: Implementation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        sizes = {"d_model": 1, "d_ff": 1, "num_heads": 1, "head_dim": 1, "vocab_size": 1}
        sizes |= {"num_encoder_layers": 0, "num_decoder_layers": self.fewest_decoder_layers}
        for name, least in {**sizes, "adapter_size": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{type(self).__name__}.{name} must be at least {least}, got {getattr(self, name)}")
        if self.prefix_lm and not self.decoder_only:
            raise UserError(
                f"T5Config.prefix_lm needs a decoder-only model, num_encoder_layers=0; got {self.num_encoder_layers}"
            )
        if unknown := [a for a in self.mlp_activations if a not in get_args(Activation)]:
            raise UserError(f"T5Config.mlp_activations has {unknown}; known: {sorted(get_args(Activation))}")
        check_lora(self)
        if not self.mlp_activations:
            raise UserError("T5Config.mlp_activations is empty; T5 1.0 has ('relu',), T5 1.1 ('gelu', 'linear')")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise UserError(f"T5Config.dropout_rate must be in [0, 1), got {self.dropout_rate}")
        if self.relative_buckets < 4 or self.relative_buckets % 4 or self.relative_max_distance < self.relative_buckets:
            raise UserError(
                f"T5Config.relative_buckets={self.relative_buckets} must be a multiple of 4 and at most "
                f"relative_max_distance={self.relative_max_distance}"
            )
        check_choices(self, dtype=Dtype, remat=Remat, relative_bias=RelativeBias)

    @property
    def lora(self) -> tuple[str, ...]:
        """Return the kernels that LoRA updates."""
        return self.lora_targets if self.lora_rank else ()

    @property
    def decoder_only(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.num_encoder_layers == 0

    def network(self, train: bool = False) -> "T5":
        from t5x_lite.model.t5 import T5

        return T5(self, train)


def check_lora(config: Any) -> None:
    """Raise UserError if `lora_rank` or `lora_targets` are not possible."""
    kind = type(config).__name__
    if config.lora_rank < 0:
        raise UserError(f"{kind}.lora_rank must be at least 0, got {config.lora_rank}")
    if (unknown := set(config.lora_targets) - set(LORA_TARGETS)) or (config.lora_rank and not config.lora_targets):
        raise UserError(f"{kind}.lora_targets has {sorted(unknown) or 'none'}; known: {', '.join(LORA_TARGETS)}")


def check_labels(config: Any) -> None:
    """Raise UserError if `num_labels` or `labels`, the names of the classes if known, are not possible."""
    kind = type(config).__name__
    if config.num_labels < 1:
        raise UserError(f"{kind}.num_labels must be at least 1, got {config.num_labels}")
    if config.labels and len(config.labels) != config.num_labels:
        raise UserError(f"{kind}.labels={config.labels} must name num_labels={config.num_labels} classes")


def with_labels(config: Any, name: str, features: Mapping[str, Any], option: str) -> Any:
    """Return a config with the names of a task's classes; a task of regression has one, without a name.

    Raises UserError if `config.num_labels`, which the gin option sets, is not their number, or the config has others.
    """
    labels = features["label"].vocabulary
    words, kind = tuple(getattr(labels, "words", ())), type(config).__name__
    if config.labels and words and config.labels != words:
        raise UserError(
            f"{name} has the classes {', '.join(words)}, the model {', '.join(config.labels)}: its class 0 is another "
            f"one. --gin.{kind}.labels=() trains it on the task's classes, in their order"
        )
    if labels.vocab_size != config.num_labels:
        raise UserError(
            f"{name} has {labels.vocab_size} classes ({labels}), but {option} = {config.num_labels}: "
            f"set --gin.{option}={labels.vocab_size}"
            + ("" if option.startswith(kind) else f", or {kind}.num_labels where Run.model is @{kind}()")
        )
    return dataclasses.replace(config, labels=words)


def check_choices(config: Any, **kinds: Any) -> None:
    """Raise UserError if a field is not one of its type's literals, or `attention` is not an implementation."""
    choices = {name: get_args(kind) for name, kind in kinds.items()} | {"attention": (*get_args(Implementation), None)}
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"{type(config).__name__}.{name} must be one of {allowed}, got {getattr(config, name)!r}")


LORA_TARGETS = ("query", "key", "value", "out", "wi", "wo")
# Matches the names of the parameters that adapter_size and lora_rank add.
ADAPTER_PARAMS = r"/adapter/|_lora/"
