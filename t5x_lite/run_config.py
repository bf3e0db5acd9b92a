"""`RunConfig`: the parts and options of one run of any mode, and the checks of options that depend on one another.

This module knows nothing of gin: a `RunConfig` can be made in Python just as well.
"""

import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import Any, Literal

from t5x_lite import storage
from t5x_lite.errors import MissingFileError, UserError
from t5x_lite.inference.decode_config import Decoding
from t5x_lite.model import families
from t5x_lite.model.config import ModelConfig
from t5x_lite.options import (
    CheckpointOptions,
    DataOptions,
    DeviceOptions,
    EvaluationOptions,
    FilesOptions,
    GinReference,
    MixingOptions,
    TrainingOptions,
)
from t5x_lite.training.loss_config import LossConfig
from t5x_lite.training.optim import Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(
    DeviceOptions, CheckpointOptions, EvaluationOptions, TrainingOptions, MixingOptions, FilesOptions, DataOptions
):
    """One run of any mode: its parts, and the options that are no part's own.

    Raises:
      UserError: an option is out of range, or two do not go together; names them.
    """

    model: ModelConfig
    optimizer: Optimizer
    loss: LossConfig

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelConfig):
            names = " or ".join(f"@{name}()" for name in families.config_types())
            raise UserError(f"Run.model = {self.model!r} is not a model: set it to {names}, with the parentheses")
        if isinstance(self.eval_batch_size, GinReference):
            object.__setattr__(self, "eval_batch_size", self.batch_size)
        for field in dataclasses.fields(self):
            if field.metadata.get("path"):
                object.__setattr__(self, field.name, _expanded(getattr(self, field.name)))
            value, check = getattr(self, field.name), field.metadata.get("check")
            if check is not None and value is not None and not check.holds(value):
                raise UserError(f"{field.name.upper()} = {value} {check.text}")
            choices = typing.get_args(field.type) if typing.get_origin(field.type) is Literal else ()
            if choices and value not in choices:
                raise UserError(f"{field.name.upper()} = {value!r}: use {' or '.join(map(repr, choices))}")
        if self.batch_size % self.num_microbatches:
            raise UserError(
                f"BATCH_SIZE = {self.batch_size} does not divide into NUM_MICROBATCHES = {self.num_microbatches} parts"
            )
        if self.infer_output and storage.is_url(self.infer_output):
            raise UserError(f"INFER_OUTPUT = {self.infer_output!r} must be a local file, to be added to line by line")
        _ = self.decoding  # checks settings that depend on one another
        if self.eval_files and not self.train_files and not isinstance(self.mixture_or_task_name, list):
            raise UserError(
                "EVAL_FILES is set without TRAIN_FILES: name files to train on; or to evaluate on these beside "
                f"registered tasks, set MIXTURE_OR_TASK_NAME = [{self.mixture_or_task_name or 'a task'!r}]"
            )
        if self.mixing == "temperature" and self.mixing_temperature == 1:
            raise UserError("MIXING = 'temperature' needs MIXING_TEMPERATURE, such as 2.0 (1.0 is 'proportional')")
        if self.keep_best_metric and (self.eval_period == 0 or self.checkpoint_period % self.eval_period):
            raise UserError(
                "KEEP_BEST_METRIC needs an evaluation at each checkpoint: CHECKPOINT_PERIOD = "
                f"{self.checkpoint_period} must be a multiple of EVAL_PERIOD = {self.eval_period}"
            )
        if self.train_steps is not None and self.total_train_steps is not None:
            raise UserError(
                f"TRAIN_STEPS = {self.train_steps} and TOTAL_TRAIN_STEPS = {self.total_train_steps} (which includes "
                "those of INITIAL_CHECKPOINT_PATH) are both set: keep one, and set the other to None"
            )

    @property
    def mixes(self) -> bool:
        """Whether the run makes a mixture of its own."""
        corpora = [self.train_files, self.eval_files]
        return isinstance(self.mixture_or_task_name, list) or any(isinstance(files, Mapping) for files in corpora)

    @property
    def decoding(self) -> Decoding:
        return Decoding(
            method=self.decode_method,
            num_decodes=self.num_decodes,
            beam_size=self.beam_size,
            alpha=self.beam_alpha,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


def _expanded(paths: Any) -> Any:
    if isinstance(paths, Mapping):
        return {name: _expanded(files) for name, files in paths.items()}
    if isinstance(paths, (list, tuple)):
        return [_expanded(path) for path in paths]
    return os.path.expanduser(paths) if isinstance(paths, str) else paths


def last_step(config: RunConfig) -> int:
    """The number of the last step of a run, which counts from 0."""
    if config.train_steps is not None:
        return config.train_steps
    if config.total_train_steps is None:
        raise UserError("TRAIN_STEPS is not set: say how many steps to train, --gin.TRAIN_STEPS=1000")
    return steps_of_run(config.total_train_steps, config.initial_checkpoint_path)


def steps_of_run(total_train_steps: int, initial_checkpoint_path: str | None) -> int:
    """TOTAL_TRAIN_STEPS without the steps of INITIAL_CHECKPOINT_PATH; a converted checkpoint may have none."""
    if initial_checkpoint_path is None:
        return total_train_steps
    from t5x_lite import checkpoint, convert  # imports Orbax, which --help does not need
    from t5x_lite.convert import hub

    folder = checkpoint.find_checkpoint(initial_checkpoint_path)
    if folder is None:
        before = convert.step_of(hub.located(initial_checkpoint_path))  # T5X's
    else:
        before = int(folder.name) if folder.name.isdecimal() else int(checkpoint.read_info(folder).get("step", 0))
    if before is None:
        raise MissingFileError(
            f"TOTAL_TRAIN_STEPS counts from the step of INITIAL_CHECKPOINT_PATH = {initial_checkpoint_path!r}, "
            "which holds no checkpoint with a step: set TRAIN_STEPS instead"
        )
    if before >= total_train_steps:
        raise UserError(
            f"TOTAL_TRAIN_STEPS = {total_train_steps} must be above the {before} steps of "
            "INITIAL_CHECKPOINT_PATH, which it includes"
        )
    return total_train_steps - before
