"""Every option of a run, declared once: name, type, default, one line of text, and its check.

The sections below are those of docs/reference/options.md. The options of `ModelOptions` and `OptimizerOptions` belong
to the parts of a run (T5Config, make_optimizer ...), and say which parameters they set; the others are the fields of
`run_config.RunConfig`. Each option is a gin macro of the same name in capitals: `gin_defaults` binds them all. This
module imports no JAX, so that `--help` and a misspelt name are answered at once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from t5x_lite import sharding_rules
from t5x_lite.inference.decode_config import Decoding, Method
from t5x_lite.model import families
from t5x_lite.model.config import Dtype, Implementation, Remat, StoredDtype, T5Config
from t5x_lite.training.loss_config import LossConfig, NamedFactor

Names = str | list[str]
Number = int | float
Files = Names | Mapping[str, Names]  # a mapping has the files of several corpora, by name


Objective = Literal[
    "text_to_text",
    "span_corruption",
    "iid_denoising",
    "iid_drop_tokens",
    "bert_style_denoising",
    "mass_style_denoising",
    "deshuffling",
    "prefix_lm",
    "lm",
    "full_lm",
    "ul2",
    "ul2r",
]  # as tasks.user_files has them
Strategy = Literal["proportional", "temperature", "equal", "unimax"]  # as tasks.mixtures has them


class GinReference(str):
    """A default that is another gin value, such as "@adafactor()" or "%BATCH_SIZE"."""


@dataclasses.dataclass(frozen=True)
class Check:
    holds: Callable[[Any], bool]
    text: str


def at_least(least: int) -> Check:
    return Check(lambda value: value >= least, f"must be at least {least}")


def above(bound: int) -> Check:
    return Check(lambda value: value > bound, f"must be above {bound}")


def option(default: Any, text: str, check: Check | None = None, sets: tuple[str, ...] = (), path: bool = False) -> Any:
    """Declare an option.

    Args:
      default: an option of a part has the part's own default.
      text: one line: what it does, its units, and what None means.
      check: of values other than None; types and literals are checked by the annotation.
      sets: parameters of gin configurables that take its value, besides `Run`'s own.
      path: whether the value is a path, or a list of them, in which "~" is the home folder.
    """
    metadata = {"default": default, "text": text, "check": check, "sets": sets, "path": path}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _of_models(parameter: str) -> tuple[str, ...]:
    """The parameter of every model that has it."""
    types = families.config_types().items()
    return tuple(f"{name}.{parameter}" for name, kind in types if parameter in kind.__dataclass_fields__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What to train on"""

    mixture_or_task_name: Names | None = option(
        None, 'SeqIO task or mixture, such as "glue_v002_proportional"; a list of tasks is mixed; or use TRAIN_FILES'
    )
    mixture_or_task_module: Names | None = option(
        None, 'your modules that register tasks: "my.tasks", or a list of such names'
    )
    task_feature_lengths: Mapping[str, int] = option(
        {"inputs": 512, "targets": 114}, "length of each feature in tokens; longer examples are cut"
    )
    vocabulary: str | None = option(
        None, "a SentencePiece model, a BERT's vocab.txt, or \"bytes\"; None: T5's 32,000 pieces", path=True
    )
    vocabulary_extra_ids: int | None = option(
        None,
        "sentinels after the pieces; None: the model's own, those of tokenizer_config.json beside it, or 100; of "
        '"bytes": none, the last byte values mark spans, as in ByT5',
        at_least(0),
    )
    use_cached_tasks: bool = option(False, "read SeqIO's offline caches, made with `make cache`")
    seqio_additional_cache_dirs: Names | None = option(None, "folders of those caches: a path or a list", path=True)
    bad_rows: Literal["refuse", "skip"] = option(
        "refuse", 'a row that cannot be read stops the run; "skip": leave such rows out and log how many'
    )
    shuffle_train_examples: bool = option(True, "shuffle the training examples")
    pack: bool = option(True, "put several examples into a row; they do not see one another")
    group_by_length: bool = option(
        False,
        "without PACK: batches of examples of similar length, padded to one of eight widths (each compiled once)",
    )
    data_shards: int | None = option(
        None,
        "independent parts in which data is read, the same on any number of hosts; None: one a host",
        at_least(1),
    )
    resume_with_other_data: bool = option(
        False,
        "resume although files, templates, vocabulary, lengths or batch size differ from the checkpoint's: parameters "
        "and optimizer are kept, and the data begins anew",
    )
    random_seed: int = option(0, "seed of parameters, dropout and the order of the data")
    model_dir: str = option(
        None, "folder of the run, local or gs://; None: runs/<name of the last gin file>", path=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesOptions:
    """Your own files as tasks: text, JSON, CSV, TSV, Parquet, Arrow; a path, a pattern, hf://datasets/... or a list"""

    train_files: Files | None = option(
        None,
        'such as "my/*.jsonl", the task "files"; or {"news": "news/*.parquet", "chat": "chat.jsonl"}, a task each and '
        "their mixture; instead of MIXTURE_OR_TASK_NAME, or mixed with those in a list there",
        path=True,
    )
    eval_files: Files | None = option(
        None, "files to evaluate on, likewise; each corpus is scored on its own. None: nothing is evaluated", path=True
    )
    files_objective: Objective | Mapping[str, Objective] = option(
        "text_to_text",
        "rows become inputs and targets by the templates; or an objective of pre-training on their text: "
        '"span_corruption", "ul2", "prefix_lm" ... This and the next options may be a dict by the names of the corpora',
    )
    files_inputs_template: str | Mapping[str, str] = option("{inputs}", "{column} stands for a column")
    files_targets_template: str | Mapping[str, str] = option("{targets}", "likewise")
    files_text_template: str | Mapping[str, str] = option(
        "{text}", "for span corruption; a line of a .txt file is {text}"
    )
    noise_density: Number | Mapping[str, Number] | None = option(
        None, "part of the tokens that an objective corrupts; None: its own, 0.15 of span corruption"
    )
    mean_noise_span_length: Number | Mapping[str, Number] | None = option(
        None, "of span corruption, in tokens; None: 3"
    )
    join_texts: bool | Mapping[str, bool] | None = option(
        None,
        "whether an objective joins short texts to fill the inputs; None: its own choice, True of span corruption, UL2 "
        "and lm",
    )
    ul2_mode_tokens: Mapping[str, str] | None = option(
        None, 'texts that begin the inputs of UL2\'s modes: {"R": "[R]", "S": "[S]", "X": "[X]"}; None: none'
    )
    metrics: Names | Mapping[str, Names] | None = option(
        None,
        'of EVAL_FILES: "exact_match", "f1", "squad", "accuracy", "f1_macro", "matthews", "pearson", "spearman", '
        '"rouge", "bleu", or a list of them; None: exact match and F1 of words',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixingOptions:
    """Mixing several corpora and tasks: TRAIN_FILES with names, a list in MIXTURE_OR_TASK_NAME, or both"""

    mixing: Strategy | Mapping[str, Number] = option(
        "proportional",
        'to the number of examples; "temperature"; "equal"; "unimax": equal, but nothing is seen more than '
        'MIXING_MAX_EPOCHS times; or the rate of each, {"news": 0.7, "chat": 0.3}',
    )
    mixing_limit: Number | None = option(
        None, "examples that a corpus counts for at most, T5's K; None: no limit", above(0)
    )
    mixing_temperature: Number = option(1.0, '"temperature": rates are examples^(1 / T)', above(0))
    mixing_max_epochs: Number | None = option(
        None, '"unimax": passes over a corpus at most, in TRAIN_STEPS; None: 1', above(0)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model: its sizes are in models/*.gin"""

    dropout_rate: float = option(
        T5Config.dropout_rate, "T5 has 0 for pre-training 1.1, and 0.1 for fine-tuning", sets=_of_models("dropout_rate")
    )
    dtype: Dtype = option(
        "bfloat16",
        'of activations, or "float32"; parameters, norms and loss are always float32',
        sets=_of_models("dtype"),
    )
    scan_layers: bool = option(
        T5Config.scan_layers,
        "layers as a loop, which compiles quickly; False: unrolled. Checkpoints are the same",
        sets=_of_models("scan_layers"),
    )
    remat: Remat = option(
        T5Config.remat,
        'what the backward pass computes anew: "none", "minimal" (what is cheap) or "full" (all)',
        sets=_of_models("remat"),
    )
    attention: Implementation | None = option(
        T5Config.attention,
        '"batch", "blocks", "flash" (TPU) or "cudnn" (GPU); None: by platform, shape and a check on the device',
        sets=_of_models("attention"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training"""

    train_steps: int | None = option(
        None,
        "steps of this run; those of INITIAL_CHECKPOINT_PATH do not count",
        at_least(0),
        sets=("linear.total_steps", "cosine.total_steps", "gradual_unfreezing.total_steps"),
    )
    total_train_steps: int | None = option(
        None, "instead of TRAIN_STEPS, as T5X counts: includes the steps of INITIAL_CHECKPOINT_PATH", at_least(1)
    )
    batch_size: int = option(128, "rows in a batch, of all hosts together", at_least(1))
    num_microbatches: int = option(1, "parts of a batch that run one after the other, to save memory", at_least(1))
    max_skipped_steps: int = option(
        10, "stop after so many consecutive steps whose loss or gradients are not finite", at_least(0)
    )
    initial_checkpoint_path: str | None = option(
        None,
        "parameters to start from: a MODEL_DIR or one of its checkpoints; a Hugging Face folder or name on the hub, a "
        "LoRA folder of PEFT, a T5X checkpoint",
        path=True,
    )
    base_checkpoint_path: str | None = option(
        None,
        "where the frozen parameters of a run are that saves the trained ones alone; None: where they were",
        path=True,
    )
    rng_impl: Literal["threefry2x32", "rbg", "unsafe_rbg"] = option(
        "threefry2x32", '"unsafe_rbg": the hardware\'s generator, quicker on TPU; not the same on every mesh'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer and loss"""

    optimizer: Any = option(
        GinReference("@adafactor()"),
        "or @adamw(), @muon(); set its parameters by --gin.adamw.weight_decay=0.1",
        sets=("make_optimizer.transform",),
    )
    schedule: Any = option(
        GinReference("@optim.rsqrt_decay()"),
        "or @optim.warmup_rsqrt_decay(), @optim.constant(), @optim.linear(), @optim.cosine()",
        sets=("make_optimizer.schedule",),
    )
    learning_rate: float = option(
        1.0,
        "the schedule's factor: 1.0 with rsqrt_decay, 0.001 with constant",
        sets=("rsqrt_decay.base", "warmup_rsqrt_decay.base", "optim.constant.value", "linear.base", "cosine.base"),
    )
    warmup_steps: int = option(
        10000,
        "rsqrt_decay is constant until then; the others rise until then",
        sets=(
            *("rsqrt_decay.warmup_steps", "warmup_rsqrt_decay.warmup_steps", "optim.constant.warmup_steps"),
            *("linear.warmup_steps", "cosine.warmup_steps"),
        ),
    )
    clip_norm: float | None = option(None, "clip gradients to this global norm", sets=("make_optimizer.clip_norm",))
    trainable: Any = option(
        None,
        'what trains: None (all); rules (("^encoder/", False), ("", True)), of which the first that matches a '
        "parameter's name decides; or @gradual_unfreezing(). See adapt/*.gin",
        sets=("make_optimizer.trainable",),
    )
    frozen_dtype: StoredDtype = option(
        "float32",
        'dtype in which parameters that do not train are stored, in --mode=infer, score and eval all: "bfloat16" takes '
        'half of the memory, "int8" a quarter (kernels; the others in bfloat16)',
        sets=("make_optimizer.frozen_dtype",),
    )
    z_loss: float = option(LossConfig.z_loss, "coefficient of log(Z)^2 in the loss", sets=("LossConfig.z_loss",))
    label_smoothing: float = option(
        LossConfig.label_smoothing,
        "probability taken from the target and spread over the vocabulary",
        sets=("LossConfig.label_smoothing",),
    )
    loss_normalizing_factor: float | NamedFactor | None = option(
        LossConfig.normalizing_factor,
        'divisor of the loss: None (a sum, as T5), a number, "NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS" or '
        '"AVERAGE_PER_SEQUENCE"',
        sets=("LossConfig.normalizing_factor",),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Evaluation, decoding, scoring"""

    eval_period: int = option(1000, "steps between evaluations; 0: only after the last step", at_least(0))
    eval_steps: int | None = option(
        None, "batches of each task, packed as PACK says, for the validation loss; None: all"
    )
    eval_examples: int | None = option(None, "examples of each task that are decoded; None: all")
    eval_batch_size: int = option(GinReference("%BATCH_SIZE"), "rows in a batch", at_least(1))
    eval_split: str = option("validation", "split of the tasks")
    max_decode_length: int | None = option(
        None, "tokens to decode at most; None: the targets' length in TASK_FEATURE_LENGTHS"
    )
    decode_method: Method = option(Decoding.method, '"greedy", "beam" or "sample"')
    num_decodes: int = option(
        Decoding.num_decodes,
        'results for each input, the best first: "beam" up to BEAM_SIZE, "sample" any number',
    )
    beam_size: int = option(Decoding.beam_size, "candidates at each step")
    beam_alpha: float = option(Decoding.alpha, "beams are ranked by log-probability / ((5 + length) / 6)^alpha")
    temperature: float = option(Decoding.temperature, '"sample" draws from softmax(logits / temperature)')
    top_k: int = option(Decoding.top_k, "of that, only the so many most likely tokens; 0: all")
    top_p: float = option(Decoding.top_p, "of those, only the fewest that together have this probability")
    infer_input: str | None = option(
        None,
        'infer, score: a text file, an input a line, or .jsonl with "inputs" (and "targets" to score), instead of '
        "EVAL_SPLIT; inspect: a batch in .npz",
        path=True,
    )
    infer_output: str | None = option(
        None, "the .jsonl to write; None: MODEL_DIR/infer/ or MODEL_DIR/score/", path=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Checkpoints and logs"""

    checkpoint_period: int = option(1000, "steps between checkpoints", at_least(1))
    keep_last: int | None = option(3, "newest checkpoints kept; None: all", at_least(1))
    keep_best_metric: Names | None = option(
        None, 'also keep the best by this metric, "task/metric"; or by each of a list of them'
    )
    keep_best: int = option(1, "how many of the best are kept, by each metric", at_least(1))
    keep_best_mode: Literal["max", "min"] = option("max", "whether the largest or smallest value is best")
    strict: bool = option(False, "an error if the newest checkpoint is damaged, instead of using the one before it")
    log_period: int = option(10, "steps between training records in metrics.jsonl", at_least(1))
    wandb_project: str | None = option(
        None, "also log to this project of Weights & Biases; needs `pip install wandb`. None: do not"
    )
    profile_steps: tuple[int, int] | None = option(
        None,
        "first and last training step of a JAX profiler trace in MODEL_DIR/profile, such as (10, 15)",
        Check(lambda steps: 1 <= steps[0] <= steps[1], "must be a first and a last step, 1 <= first <= last"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Devices: mesh/*.gin has the usual meshes"""

    mesh: Mapping[str, int] = option(
        {"data": -1, "fsdp": 1, "tensor": 1}, "devices along each axis; one may be -1: what the others leave"
    )
    logical_axis_rules: sharding_rules.Rules | None = option(
        None, "which logical axis of an array lies on which mesh axis; None: t5x_lite.sharding.RULES"
    )


SECTIONS = (
    *(DataOptions, FilesOptions, MixingOptions, ModelOptions, TrainingOptions, OptimizerOptions),
    *(EvaluationOptions, CheckpointOptions, DeviceOptions),
)
OF_PARTS = (ModelOptions, OptimizerOptions)  # the others are fields of RunConfig


# Which make RunConfig's other fields.
PARTS = {"model": "T5Config", "optimizer": "make_optimizer", "loss": "LossConfig"}


def options(section: type) -> Iterator[dataclasses.Field]:
    return (field for field in dataclasses.fields(section) if "text" in field.metadata)


def _gin_value(field: dataclasses.Field) -> str:
    default = field.metadata["default"]
    return str(default) if isinstance(default, GinReference) else repr(default)


def gin_defaults() -> str:
    """Every macro with its default, and what it sets, as a gin file that comes before all others."""
    lines = [f"Run.{field} = @{part}()" for field, part in PARTS.items()]
    for section in SECTIONS:
        for field in options(section):
            macro = field.name.upper()
            lines.append(f"{macro} = {_gin_value(field)}")
            if section not in OF_PARTS:
                lines.append(f"Run.{field.name} = %{macro}")
            lines.extend(f"{parameter} = %{macro}" for parameter in field.metadata["sets"])
    return "\n".join(lines) + "\n"


def option_lines() -> str:
    """All options with their defaults and texts, for `--help`."""
    lines = []
    for section in SECTIONS:
        lines.append(f"\n{section.__doc__}:")
        for field in options(section):
            default = _gin_value(field)
            lines.append(f"  {field.name.upper()} = {default}\n      {field.metadata['text']}")
    return "\n".join(lines)


def reference_page() -> str:
    """docs/reference/options.md."""
    page = [
        "# Options",
        "",
        "Each option is a gin macro. Set it in a gin file (`NAME = VALUE`) or on the command line (`--gin.NAME=VALUE`;",
        "strings need both quotes: `--gin.NAME=\"'text'\"`). This page is made from t5x_lite/options.py by",
        "`python -m t5x_lite.options`.",
    ]
    for section in SECTIONS:
        page += ["", f"## {section.__doc__}", "", "| option | default | |", "| --- | --- | --- |"]
        for field in options(section):
            default = _gin_value(field)
            text = field.metadata["text"].replace("|", "\\|")
            page.append(f"| `{field.name.upper()}` | `{default}` | {text} |")
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    print(reference_page(), end="")
