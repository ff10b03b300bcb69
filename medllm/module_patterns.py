"""Patterns of module names, by PEFT's rule (``peft.utils.get_pattern_key``): expressions for their end, from a dot on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def names(pattern: str, module: str) -> bool:
    """Whether a pattern names a module."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def by_pattern(values: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that names a module."""
    return next((value for pattern, value in values.items() if names(pattern, module)), default)


def is_regex(expression: str) -> bool:
    """Whether it is a regular expression."""
    try:
        re.compile(expression)
    except re.error:
        return False
    return True
