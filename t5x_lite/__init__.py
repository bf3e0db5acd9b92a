"""t5x_lite: trains T5 on TPU and GPU meshes.

The names below are loaded when they are first used: importing the package loads neither JAX nor TensorFlow.
"""

import importlib
from typing import Any

_PUBLIC = {
    "T5": "model",
    "T5Config": "model",
    "Bert": "bert.network",
    "BertConfig": "bert",
    "LoadedBert": "bert.pretrained",
    "Optimizer": "optim",
    "adafactor": "optim",
    "make_optimizer": "optim",
    "LossConfig": "losses",
    "TrainState": "step",
    "abstract_state": "step",
    "init_state": "step",
    "train_step": "step",
    "eval_step": "step",
    "Compiler": "step",
    "make_mesh": "sharding",
    "shard_batch": "sharding",
    "shard_state": "sharding",
    "load": "pretrained",
    "LoadedModel": "pretrained",
    "Vocabulary": "convert.tokenizer",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"t5x_lite.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 't5x_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
