"""Write the model card of a model for the Hugging Face hub, from its run's settings and metrics.

What is not known is left out. Local paths are reduced to names. Must not depend on gin or on how models are uploaded.
"""

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5x_lite import convert
from t5x_lite.convert import tensors
from t5x_lite.report import analysis

Settings = Mapping[str, Any]  # a run's macros by name

# What the card quotes; config.gin has the rest.
_FILES = ("TRAIN_FILES", "EVAL_FILES", "VOCABULARY", "INITIAL_CHECKPOINT_PATH")
_TEMPLATES = ("FILES_INPUTS_TEMPLATE", "FILES_TARGETS_TEMPLATE", "FILES_OBJECTIVE")  # without TRAIN_FILES, not used
_SHOWN = """MIXTURE_OR_TASK_NAME TRAIN_FILES EVAL_FILES FILES_INPUTS_TEMPLATE FILES_TARGETS_TEMPLATE FILES_OBJECTIVE
    VOCABULARY TASK_FEATURE_LENGTHS INITIAL_CHECKPOINT_PATH TRAIN_STEPS BATCH_SIZE OPTIMIZER SCHEDULE LEARNING_RATE
    WARMUP_STEPS DTYPE RANDOM_SEED""".split()
_PUBLIC = ("hf://", "http://", "https://")

_STRING = r"""(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""
_STRINGS = rf"{_STRING}(?:\s+{_STRING})*"  # gin breaks long strings
_NO_PATHS = rf"#[^\n]*|\b(?:FILES_\w+_TEMPLATE|TRAINABLE) = [\\\s(]*{_STRINGS}"


def settings(gin: str) -> dict[str, Any]:
    """Return the macros of a config.gin: literals as values, references such as @adamw() as text."""
    macros = {}
    for name, text in re.findall(r"^([A-Z][A-Z0-9_]*) = (.*(?:\n[ \t].*)*)", gin, re.MULTILINE):
        try:
            macros[name] = ast.literal_eval(text.replace("\\\n", " ").strip())
        except (ValueError, SyntaxError):
            macros[name] = " ".join(text.split())
    return macros


def without_paths(gin: str) -> str:
    """Return a config.gin with each path outside the current folder, local or in a bucket, reduced to its last part."""

    def reduced(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        path = ast.literal_eval(f"({match[1]})")
        return repr(_name(path)) if _is_elsewhere(path) else match[0]

    return re.sub(rf"{_NO_PATHS}|({_STRINGS})", reduced, gin)


def _is_elsewhere(path: str) -> bool:
    return path.startswith(("/", "~", "..", "file:")) or ("://" in path and not path.startswith(_PUBLIC))


def _name(path: str) -> str:
    return path if path.startswith(_PUBLIC) else Path(path).name


def _names(value: Any) -> Any:
    """Return the names of files in a path, a list or a dict of paths; what is none of these is not shown."""
    if isinstance(value, str):
        return _name(value)
    if isinstance(value, Mapping):
        return {name: _names(paths) for name, paths in value.items()}
    return [_names(path) for path in value] if isinstance(value, (list, tuple)) else None


def card(
    folder: Path,
    config: Any,
    *,
    name: str,
    to: str,
    base: str | None,
    revision: str | None,
    step: int | None,
    settings: Settings,
    records: Sequence[Mapping[str, Any]],
) -> str:
    """Return README.md of the model in `folder`, a Hugging Face or PEFT folder that is about to be uploaded.

    Args:
      config: the model's config in this project.
      name, revision: the repository and its branch.
      to: "huggingface" or "peft".
      base: name on the hub of the model that training started from, if known.
      step: the step of the checkpoint, if known.
      settings: those of the run, without paths; empty if there is no run.
      records: rows of metrics.jsonl.
    """
    at = f"{name}@{revision}" if revision else name
    sections = (
        _front_matter(folder, to, base, settings),
        f"# {name.split('/')[1]}",
        _summary(folder, config, to, base, step),
        "## Use",
        _usage(folder, name, to, base, revision),
        f"```python\nimport t5x_lite\n\nmodel = t5x_lite.load({at!r})\n```",
        _training(settings),
        _evaluation(records, step),
        _reproduction(at, settings),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(folder: Path, to: str, base: str | None, settings: Settings) -> str:
    task = settings.get("MIXTURE_OR_TASK_NAME")
    tags = [_hub_config(folder).get("model_type", "t5"), "t5x_lite", *([task] if isinstance(task, str) else [])]
    datasets = sorted(set(re.findall(r"hf://datasets/([\w.-]+/[\w.-]+)", str(settings.get("TRAIN_FILES")))))
    fields = {
        "library_name": "peft" if to == "peft" else "transformers",
        "base_model": base and base.split("@")[0],
        "datasets": datasets,
        "tags": tags,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value]  # JSON is YAML
    return "\n".join(("---", *lines, "---"))


def _hub_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _transformers_class(folder: Path) -> str:
    return _hub_config(folder).get("architectures", ["AutoModelForSeq2SeqLM"])[0]


def _summary(folder: Path, config: Any, to: str, base: str | None, step: int | None) -> str:
    files = folder.glob("*.safetensors")
    parameters = sum(math.prod(t.shape) for file in files for t in tensors.read_safetensors(file).values())
    kind = f"LoRA parameters of {base}" if to == "peft" else _transformers_class(folder)
    origin = "converted with t5x_lite" if step is None else f"from step {step:,} of a run of t5x_lite"
    own = {key: value for key, value in vars(config).items() if key not in convert.RUN_SETTINGS and value}
    if to != "peft":
        own.pop("lora_rank", None)  # the weights have it in them
    return f"{kind}: {parameters:,} parameters, {origin}.\n\n{_table(('size', 'value'), own.items())}"


def _usage(folder: Path, name: str, to: str, base: str | None, revision: str | None) -> str:
    at = repr(name) if revision is None else f"{name!r}, revision={revision!r}"
    if to == "peft":
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForSeq2SeqLM",
            "",
            f"model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained({base!r}), {at})",
        ]
    else:
        kind = _transformers_class(folder)
        lines = [f"from transformers import {kind}", "", f"model = {kind}.from_pretrained({at})"]
        if any((folder / file).is_file() for file in (*convert.TOKENIZER_FILES, "tokenizer.json", "vocab.txt")):
            lines[0] = f"from transformers import AutoTokenizer, {kind}"
            lines.append(f"tokenizer = AutoTokenizer.from_pretrained({at})")
    return "\n".join(("```python", *lines, "```"))


def _training(settings: Settings) -> str:
    shown = {}
    for key in _SHOWN:
        value = _names(settings.get(key)) if key in _FILES else settings.get(key)
        if value is not None and not (key in _TEMPLATES and settings.get("TRAIN_FILES") is None):
            shown[key] = value
    return f"## Training\n\n{_table(('setting', 'value'), shown.items())}" if shown else ""


def _evaluation(records: Sequence[Mapping[str, Any]], step: int | None) -> str:
    """Return a table of each metric at the last evaluation and at its best, without those after `step`."""
    _, tasks = analysis.curves([record for record in records if step is None or record["step"] <= step])
    rows = []
    for task, metrics in tasks.items():
        for metric, curve in metrics.items():
            last, best = max(curve.items()), analysis.best(metric, curve)
            rows.append((task, metric, *(f"{value:.4g} (step {at:,})" for at, value in (last, best))))
    return f"## Evaluation\n\n{_table(('task', 'metric', 'last', 'best'), rows)}" if rows else ""


def _reproduction(name: str, settings: Settings) -> str:
    if not settings:
        return ""
    return f"""## Reproduce

`config.gin` has every option of the run; paths outside its folder are reduced to names, so set them to yours:

```sh
python run.py --gin_file=config.gin
```

To train on from these parameters:

```sh
python -m t5x_lite.convert {name} start --to=t5x_lite
python run.py --gin_file=config.gin --gin.INITIAL_CHECKPOINT_PATH="'start'" --gin.MODEL_DIR="'runs/continued'"
```"""


def _table(head: Sequence[str], rows: Any) -> str:
    """Return a Markdown table; text that Markdown would change is shown as code."""
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join([f"| {' | '.join(line)} |" for line in lines])


def _cell(value: Any) -> str:
    text = str(value).replace("|", "\\|").replace("\n", "\\n")
    return f"`` {text} ``" if "`" in text else f"`{text}`" if re.search(r"[{}\[\]*<>\\@]", text) else text
