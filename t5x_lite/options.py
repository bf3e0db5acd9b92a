"""What a run is: `Run`, all its options in one place, checked as far as they can be without reading anything.

gin_configs/defaults.gin explains each option under its name in capitals, and holds the defaults. This module knows
nothing of gin: a `Run` can be made in Python just as well.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from t5x_lite import checkpoint, decode, sharding
from t5x_lite.bert import BertConfig
from t5x_lite.losses import LossConfig
from t5x_lite.model import T5Config
from t5x_lite.optim import Optimizer

Names = str | list[str]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training, evaluation, inference or scoring run."""

    model: T5Config | BertConfig
    optimizer: Optimizer
    loss: LossConfig
    model_dir: str
    task_feature_lengths: Mapping[str, int]
    mixture_or_task_name: str | None
    mixture_or_task_module: Names | None
    vocabulary: str | None
    bad_rows: Literal["refuse", "skip"]
    use_cached_tasks: bool
    seqio_additional_cache_dirs: Names | None
    shuffle_train_examples: bool
    pack: bool
    data_shards: int | None
    random_seed: int
    train_files: Names | None
    eval_files: Names | None
    files_objective: Literal["text_to_text", "span_corruption"]
    files_inputs_template: str
    files_targets_template: str
    files_text_template: str
    train_steps: int | None
    total_train_steps: int | None
    batch_size: int
    num_microbatches: int
    max_skipped_steps: int
    initial_checkpoint_path: str | None
    rng_impl: Literal["threefry2x32", "rbg", "unsafe_rbg"]
    eval_period: int
    eval_steps: int | None
    eval_examples: int | None
    eval_batch_size: int
    eval_split: str
    max_decode_length: int | None
    decode_method: decode.Method
    num_decodes: int
    beam_size: int
    beam_alpha: float
    temperature: float
    top_k: int
    top_p: float
    infer_input: str | None
    infer_output: str | None
    checkpoint_period: int
    keep_last: int | None
    keep_best_metric: Names | None
    keep_best: int
    keep_best_mode: Literal["max", "min"]
    strict: bool
    log_period: int
    mesh: Mapping[str, int]
    logical_axis_rules: sharding.Rules | None

    def __post_init__(self) -> None:
        positive = ("batch_size", "num_microbatches", "eval_batch_size", "log_period", "checkpoint_period")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name.upper()} = {getattr(self, name)} must be at least 1")
        if self.max_skipped_steps < 0:
            raise ValueError(f"MAX_SKIPPED_STEPS = {self.max_skipped_steps} must be at least 0")
        if self.batch_size % self.num_microbatches:
            raise ValueError(
                f"BATCH_SIZE = {self.batch_size} does not divide into NUM_MICROBATCHES = {self.num_microbatches} parts"
            )
        if self.bad_rows not in ("refuse", "skip"):
            raise ValueError(f"BAD_ROWS = {self.bad_rows!r}: use 'refuse' or 'skip'")
        if self.infer_output and "://" in self.infer_output:
            raise ValueError(f"INFER_OUTPUT = {self.infer_output!r} must be a local file, to be added to line by line")
        _ = self.decoding  # refuses settings out of range
        if self.eval_files and not self.train_files:
            raise ValueError(
                "EVAL_FILES is set without TRAIN_FILES: a task of your own files begins with those to train on"
            )
        if self.keep_best_metric and (self.eval_period == 0 or self.checkpoint_period % self.eval_period):
            raise ValueError(
                "KEEP_BEST_METRIC needs an evaluation at each checkpoint: CHECKPOINT_PERIOD = "
                f"{self.checkpoint_period} must be a multiple of EVAL_PERIOD = {self.eval_period}"
            )
        if self.eval_period < 0:
            raise ValueError(f"EVAL_PERIOD = {self.eval_period} must be 0 (only after the last step) or more")
        if self.train_steps is not None and self.total_train_steps is not None:
            raise ValueError(
                f"TRAIN_STEPS = {self.train_steps} and TOTAL_TRAIN_STEPS = {self.total_train_steps} (which includes "
                "those of INITIAL_CHECKPOINT_PATH) are both set: keep one, and set the other to None"
            )

    @property
    def decoding(self) -> decode.Decoding:
        return decode.Decoding(
            method=self.decode_method,
            num_return=self.num_decodes,
            beam_size=self.beam_size,
            alpha=self.beam_alpha,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


def last_step(run: Run) -> int:
    """The number of the last step of a run, which counts from 0."""
    if run.train_steps is not None:
        return run.train_steps
    if run.total_train_steps is None:
        raise ValueError("TRAIN_STEPS is not set: say how many steps to train, --gin.TRAIN_STEPS=1000")
    if run.initial_checkpoint_path is None:
        return run.total_train_steps
    folder = checkpoint.find_checkpoint(run.initial_checkpoint_path)
    if folder is None:
        raise FileNotFoundError(
            f"TOTAL_TRAIN_STEPS counts from the step of INITIAL_CHECKPOINT_PATH = {run.initial_checkpoint_path!r}, "
            "which holds no checkpoint: set TRAIN_STEPS instead"
        )
    before = int(folder.name)
    if before >= run.total_train_steps:
        raise ValueError(
            f"TOTAL_TRAIN_STEPS = {run.total_train_steps} must be above the {before} steps of INITIAL_CHECKPOINT_PATH, "
            "which it includes"
        )
    return run.total_train_steps - before
