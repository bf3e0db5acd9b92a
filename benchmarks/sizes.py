"""The published model sizes as `gin_configs/` has them, read without gin, JAX or torch."""

import ast
import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


def gin_values(file: str) -> dict[str, Any]:
    """Returns the plain values of the model's config, and the macros, in a file of gin_configs/."""
    text = (ROOT / "gin_configs" / f"{file}.gin").read_text()
    pairs = re.findall(r"^\s*(?:\w+Config\.)?([A-Za-z_]+) = ([^%@\n]+)$", text, re.MULTILINE)
    return {key: ast.literal_eval(value.strip()) for key, value in pairs}
