"""JSON that every program can read: without the words NaN and Infinity, which are not JSON.

Python writes them and reads them. Other readers refuse the whole file. So a number that is not finite is written as
null, and these words are read as null.
"""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps`, with null for numbers that are not finite."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """`json.loads`, with None for NaN and Infinity.

    Raises `ValueError` for everything that cannot be read, also for thousands of nested lists (where Python raises
    `RecursionError`), for a number of thousands of digits, and for bytes that are not UTF-8.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, parse_constant=_none)
    except RecursionError as e:
        raise ValueError("too many lists or objects inside each other") from e


def _none(word: str) -> None:
    return None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    return [_finite(child) for child in value] if isinstance(value, (list, tuple)) else value
