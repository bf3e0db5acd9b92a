"""The interface of models to training, data and tools, and the list of model families.

A family is a frozen dataclass derived from `ModelConfig` and a `Model` built from it. All families are listed in
`FAMILIES`. Their modules are imported when first needed, and a family whose package is missing is left out. Apart from
that list this module must not depend on any family, nor on training, data or files.
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
    """Base class of model configs.

    `dtype`, `remat`, `scan_layers` and `attention` are documented in `config.T5Config`. These and `dropout_rate` may
    change between runs; the other fields determine the parameters.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
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
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


@runtime_checkable
class Model(Protocol):
    """A model of one family. Outputs and targets are dicts keyed by head; T5 has one head, ""."""

    # Matches the names of task-specific parameters. When a run starts from another checkpoint, those that are missing
    # there or have another shape are initialised at random; the others are loaded.
    head_params: ClassVar[str]

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


class _Family(NamedTuple):
    """A model family. config and model are given as "module:class".

    hub: module that reads and writes Hugging Face directories, or None.
    hub_types: values of model_type in config.json that `hub` reads.
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
    """Return the config class of each installed family by its name."""
    return {name: kind for name, (_, kind) in _installed().items()}


def hub_modules() -> dict[str, str]:
    """Return the Hugging Face model types that can be read, and the modules that read them."""
    return {kind: family.hub for family, _ in _installed().values() if family.hub for kind in family.hub_types}


def model_of(config: ModelConfig) -> Model:
    """Return the model that a config describes.

    Raises:
      UserError: its family is not in `FAMILIES`.
    """
    return pkgutil.resolve_name(_family_of(config).model)(config)


def hub_module(config: ModelConfig) -> Any:
    """Return the family's Hugging Face module, with `source`, `described`, `name_of` and `is_transposed`."""
    hub = _family_of(config).hub
    if hub is None:
        raise UserError(f"Hugging Face has no model like {type(config).__name__}: convert it --to=t5x_lite")
    return importlib.import_module(hub)


def _family_of(config: ModelConfig) -> _Family:
    families = {kind: family for family, kind in _installed().values()}
    for kind in type(config).__mro__:  # the nearest class, if one family's config is derived from another's
        if kind in families:
            return families[kind]
    raise UserError(f"{type(config).__name__} is not of a known model family: {', '.join(config_types())}")
