"""The list of model families.

A family is a frozen dataclass derived from `config.ModelConfig` and an `interface.Model` built from it. Their modules
are imported when first needed, and a family whose package is missing is left out. This module imports no JAX.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from t5x_lite.errors import UserError
from t5x_lite.model.config import ModelConfig

if TYPE_CHECKING:
    from t5x_lite.model.interface import Model


class _Family(NamedTuple):
    """A model family. config and model are given as "module:class".

    hub: module that reads and writes Hugging Face directories, or None.
    hub_types: values of model_type in config.json that `hub` reads, or of its architectures, which come first.
    makers: functions that make a config from other values, for gin files.
    """

    config: str
    model: str
    hub: str | None = None
    hub_types: tuple[str, ...] = ()
    makers: tuple[str, ...] = ()


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
    _Family(
        config="t5x_lite.t5_encoder:T5EncoderConfig",
        model="t5x_lite.t5_encoder.model:T5EncoderModel",
        hub="t5x_lite.t5_encoder.huggingface",
        hub_types=(
            *("T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel"),
            *("T5ForSequenceClassification", "MT5ForSequenceClassification", "UMT5ForSequenceClassification"),
        ),
        makers=("t5x_lite.t5_encoder:t5_encoder",),
    ),
    _Family(
        config="t5x_lite.t5gemma:T5GemmaConfig",
        model="t5x_lite.t5gemma.model:T5GemmaModel",
        hub="t5x_lite.t5gemma.huggingface",
        hub_types=("t5gemma", "t5gemma2"),
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


def makers() -> list[Callable[..., ModelConfig]]:
    """Return the functions that make configs from other values."""
    return [pkgutil.resolve_name(name) for family, _ in _installed().values() for name in family.makers]


def hub_modules() -> dict[str, str]:
    """Return the Hugging Face model types and architectures that can be read, and the modules that read them."""
    return {kind: family.hub for family, _ in _installed().values() if family.hub for kind in family.hub_types}


def model_of(config: ModelConfig) -> "Model":
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
