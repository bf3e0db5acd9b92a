"""Stands for jaxtyping where that is not installed: the shapes in annotations are dropped, nothing is checked.

`child.py` puts this folder at the end of the path only where the real package is missing.
"""

from typing import Any

import jax

Array = jax.Array


class _Shaped:
    def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
        return item[0]


Bool = Float = Int = Key = Num = UInt32 = _Shaped
