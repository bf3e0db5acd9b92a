"""Templates: text with {column} for the values of a row. "{answers.text.0}" is a value inside of a column.

Must not import: files, tasks, SeqIO.
"""

import functools
import string
from collections.abc import Iterable, Mapping
from typing import Any

from tasks import readers
from tasks.errors import UserError

Templates = Mapping[str, str]  # feature -> template


@functools.cache
def columns(feature: str, template: str) -> tuple[str, ...]:
    """Return the columns of a template. Raises UserError if it has none, or anything but columns in braces."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"{feature} template {template!r}: {error}; write a literal brace as '{{{{' or '}}}}'"
        ) from error
    fields = [(column, spec, conversion) for _, column, spec, conversion in parts if column is not None]
    if not fields or any(not column or spec or conversion for column, spec, conversion in fields):
        raise UserError(
            f"{feature} template {template!r}: it needs at least one {{column}}, and nothing else in braces"
        )
    return tuple(column for column, _, _ in fields)


def in_file(templates: Templates) -> set[str]:
    """Return what the columns may be called in a file: "answers.text.0" is that, or inside of "answers"."""
    names = {column for feature, template in templates.items() for column in columns(feature, template)}
    return names | {name.split(".")[0] for name in names}


def has(row: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Return whether a row has all of these columns."""
    try:
        for name in names:
            value("", row, name)
    except readers.BadRow:
        return False
    return True


def fill(where: str, row: Mapping[str, Any], templates: Templates) -> list[str]:
    """Return the text of each feature. Raises BadRow if a column is missing, or has neither text nor a number."""
    return [substitute(where, row, template) for template in templates.values()]


def substitute(where: str, row: Mapping[str, Any], template: str) -> str:
    """Return the template with the row's values in place of its columns; `where` begins the errors."""
    pieces = []
    for literal, column, _, _ in string.Formatter().parse(template):
        pieces.append(literal)
        if column is not None:
            pieces.append(readers.as_text(where, column, value(where, row, column)))
    return "".join(pieces)


def value(where: str, row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, or inside of one. Raises BadRow, with what there is instead, if it is missing."""
    if column in row:
        return row[column]
    inner: Any = row
    path = column.split(".")
    for depth, part in enumerate(path):
        inside = ".".join(path[:depth])
        if isinstance(inner, Mapping) and part in inner:
            inner = inner[part]
        elif isinstance(inner, list) and part.isdecimal() and int(part) < len(inner):
            inner = inner[int(part)]
        elif isinstance(inner, Mapping):
            names = ", ".join(map(str, inner)) or "none"
            raise readers.BadRow(f"{where}: no column {column}; {inside or 'it'} has: {names}")
        elif isinstance(inner, list):
            raise readers.BadRow(f"{where}: no column {column}; {inside} is a list of {len(inner)}, from {inside}.0 on")
        else:
            is_what = "null" if inner is None else repr(str(inner)[:40])
            raise readers.BadRow(f"{where}: no column {column}; {inside} is {is_what}")
    return inner
