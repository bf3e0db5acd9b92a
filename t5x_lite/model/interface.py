"""What training, data and tools may ask of any model, and which model families there are.

A family is a frozen dataclass derived from `ModelConfig` and a `Model` made from it. `FAMILIES` is the only list of
them: its modules are imported when first needed, and a family whose package is absent is left out. Beyond that list
this module must not know any family, nor training, data or files.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from t5x_lite.errors import UserError
from t5x_lite.model.feature_converter import FeatureConverter

if TYPE_CHECKING:
    from t5x_lite.inference.decode import Decoding
    from t5x_lite.inference.predictor import Predictor
    from t5x_lite.training.partitioner import Partitioner

Batch = Mapping[str, Array]
Remat = Literal["none", "minimal", "full"]
Dtype = Literal["float32", "bfloat16"]


class ModelConfig:
    """Base of the dataclasses that say what one model is.

    `dtype`, `remat`, `scan_layers` and `attention` mean what `config.T5Config` says; they, and `dropout_rate`, belong
    to a run. The other fields decide the parameters.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    d_model: int
    vocab_size: int
    dropout_rate: float
    dtype: Dtype
    remat: Remat
    scan_layers: bool

    def for_task(self, name: str, features: Mapping[str, Any]) -> "ModelConfig":
        """The config completed with what a SeqIO task says, such as the names of its classes.

        Args:
          name: of the task or mixture, for errors.
          features: its `output_features`.

        Raises:
          UserError: the task does not fit the model.
        """
        return self

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


@runtime_checkable
class Model(Protocol):
    """A model of one family. Outputs and targets are dicts keyed by head; T5 has one head, ""."""

    # Regular expression for the names of parameters that belong to a task. Where a run starts from another checkpoint,
    # those that the checkpoint lacks, or has in another shape, start at random; those that fit are loaded.
    head_params: ClassVar[str]

    def init(self, key: Key[Array, ""]) -> Any:
        """Parameters at random, each in a flax box with its logical axes."""
        ...

    def logits(
        self, params: Any, batch: Batch, dropout_key: Key[Array, ""] | None = None
    ) -> Mapping[str, Float[Array, "..."]]:
        """The output of each head for a batch, float32; with dropout if a key is given.

        The output of a head in `targets` has the shape of its targets and, behind it, the classes (or 1, of a number).
        """
        ...

    def targets(self, batch: Batch) -> Mapping[str, tuple[Num[Array, "B _"], Num[Array, "B _"]]]:
        """Targets and loss weights of each head that is trained. Targets that are floats are regressed.

        All arrays have B rows, which micro-batches are cut from. Rows of padding, all 0, have weight 0.

        Raises:
          UserError: the model learns nothing from such a batch.
        """
        ...

    def feature_converter(self, pack: bool) -> FeatureConverter: ...

    def flops(self, batch_size: int, lengths: Mapping[str, int]) -> float:
        """FLOPs of the matrix products in one training step, padding included: what MFU counts as useful work.

        A multiplication and its addition are two, the backward pass is twice the forward pass, and what remat repeats
        does not count. Attention is over whole rows, without a discount for the causal mask (PaLM, appendix B).
        """
        ...

    def predictor(
        self, partitioner: "Partitioner", decoding: "Decoding", max_decode_length: int, seed: int
    ) -> "Predictor":
        """The compiled functions that evaluation and inference use; the last three arguments are for generation."""
        ...

    def pretrained(self, params: Any, path: Any, mesh: Any) -> Any:
        """What `t5x_lite.load` returns for these parameters, with the tokenizer found at `path`."""
        ...


NO_PARAMS = r"(?!)"  # finds nothing


class _Family(NamedTuple):
    """config, model: "module:class".

    hub: the module that reads and writes Hugging Face's directories of these types (config.json's model_type), if any.
    """

    config: str
    model: str
    hub: str | None = None
    hub_types: tuple[str, ...] = ()


FAMILIES = (
    _Family(
        config="t5x_lite.model.config:T5Config",
        model="t5x_lite.t5_model:T5Model",
        hub="t5x_lite.convert.huggingface_t5",
        hub_types=("t5", "mt5", "umt5"),
    ),
    _Family(
        config="t5x_lite.bert:BertConfig",
        model="t5x_lite.bert.model:BertModel",
        hub="t5x_lite.bert.huggingface",
        hub_types=("bert",),
    ),
)


@functools.cache
def _installed() -> dict[str, tuple[_Family, type[ModelConfig]]]:
    families = {}
    for family in FAMILIES:
        module, _, name = family.config.partition(":")
        try:
            families[name] = family, pkgutil.resolve_name(family.config)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    return families


def config_types() -> dict[str, type[ModelConfig]]:
    """The config of each family that is installed, by its name."""
    return {name: kind for name, (_, kind) in _installed().items()}


def hub_modules() -> dict[str, str]:
    """Hugging Face's model types that can be read, and the modules that read them."""
    return {kind: family.hub for family, _ in _installed().values() if family.hub for kind in family.hub_types}


def model_of(config: ModelConfig) -> Model:
    """The model that a config describes.

    Raises:
      UserError: its family is not in `FAMILIES`.
    """
    return pkgutil.resolve_name(_family_of(config).model)(config)


def hub_module(config: ModelConfig) -> Any:
    """The module with the family's Hugging Face names: `source`, `described`, `name_of` and `is_transposed`."""
    hub = _family_of(config).hub
    if hub is None:
        raise UserError(f"Hugging Face has no model like {type(config).__name__}: convert it --to=t5x_lite")
    return importlib.import_module(hub)


def _family_of(config: ModelConfig) -> _Family:
    families = {kind: family for family, kind in _installed().values()}
    for kind in type(config).__mro__:  # the nearest, where one family's config is derived from another's
        if kind in families:
            return families[kind]
    raise UserError(f"{type(config).__name__} is of no model family; there are: {', '.join(config_types())}")
