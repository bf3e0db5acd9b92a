"""Import TensorFlow and TensorFlow Text without Keras, which takes as long as the rest and which SeqIO does not use.

Keras is imported when it is first used, as `tf.keras` or `tensorflow_text.keras`, so a user's module may use it.
"""

import importlib
import importlib.util
import os
import sys
import types
from typing import Any

VARIABLE = "TF_USE_LEGACY_KERAS"  # TensorFlow then imports Keras 2 (the package tf_keras) when it is used, not Keras 3
TEXT_LAYERS = "tensorflow_text.python.keras"


class _TextLayers(types.ModuleType):
    """Stands for `tensorflow_text.python.keras` until an attribute of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(TEXT_LAYERS) is self:
            del sys.modules[TEXT_LAYERS]
        return getattr(importlib.import_module(TEXT_LAYERS), name)


def import_tensorflow() -> None:
    """Imports both packages; does nothing if TensorFlow has been imported or the user has chosen a Keras."""
    if "tensorflow" in sys.modules or VARIABLE in os.environ:
        return
    os.environ[VARIABLE] = "1"
    sys.modules[TEXT_LAYERS] = layers = _TextLayers(TEXT_LAYERS)
    try:
        import tensorflow  # noqa: F401

        if importlib.util.find_spec("tensorflow_text"):
            import tensorflow_text  # noqa: F401  # pyright: ignore[reportMissingImports]
    finally:
        del os.environ[VARIABLE]  # so that tf.keras is Keras 3
        if sys.modules.get(TEXT_LAYERS) is layers:
            del sys.modules[TEXT_LAYERS]
