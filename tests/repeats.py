"""Which values of a test's parameter are run always; the others, which repeat the claim, are slow tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def fast(values: Iterable[Any], *always: str) -> list[Any]:
    """`values`, of which those whose text is not in `always` are slow. A mapping's keys are the ids of its values."""
    named = values.items() if isinstance(values, dict) else ((str(value), value) for value in values)
    return [pytest.param(v, id=name, marks=[] if name in always else [pytest.mark.slow]) for name, v in named]
