"""t5x_lite: trains T5 on TPU and GPU meshes.

The names below are loaded when they are first used: importing the package loads neither JAX nor TensorFlow.
"""

import importlib
from typing import Any

_PUBLIC = {
    "T5": "model.t5",
    "T5Config": "model.config",
    "Bert": "bert.network",
    "BertConfig": "bert",
    "LoadedBert": "bert.pretrained",
    "T5EncoderConfig": "t5_encoder",
    "T5Gemma": "t5gemma.network",
    "T5GemmaConfig": "t5gemma",
    "LoadedEncoder": "t5_encoder.pretrained",
    "Optimizer": "training.optim",
    "adafactor": "training.optim",
    "adamw": "training.optim",
    "muon": "training.optim",
    "constant": "training.optim",
    "rsqrt_decay": "training.optim",
    "make_optimizer": "training.optim",
    "LossConfig": "training.losses",
    "TrainState": "training.step",
    "abstract_state": "training.step",
    "init_state": "training.step",
    "train_step": "training.step",
    "eval_step": "training.step",
    "Compiler": "training.step",
    "make_mesh": "sharding",
    "batch_sharding": "sharding",
    "shard_batch": "sharding",
    "shard_state": "sharding",
    "load": "inference.pretrained",
    "LoadedModel": "inference.pretrained",
    "Vocabulary": "convert.tokenizer",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module = f"t5x_lite.{_PUBLIC[name]}"
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            raise AttributeError(f"t5x_lite.{name} needs {error.name}, which has been removed") from None
    raise AttributeError(f"module 't5x_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
