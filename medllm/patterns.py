"""Regular expressions for names of modules, as PEFT matches them, and how long they may take.

Python's matcher tries every way to read a name by an expression, and nothing stops it: ``(\\w+)+$`` has as many as there are
ways to cut the name up. So the ways are counted, from above, before an expression is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from re import _constants as sre  # type: ignore[attr-defined]  # nothing public says how an expression is built
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MOST_PATTERNS = 4096
"""More than one for each linear layer of the largest decoders."""

LONGEST_NAME = 100
"""Characters of a module's name: ``model.layers.125.self_attn.q_proj`` has 33."""

_MOST_WAYS = 10**8
_LENGTH = 64  # what a repetition may match of a name
_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)


def by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first expression that matches the end of ``module``, from a dot on (``peft.utils.get_pattern_key``)."""
    return next((value for key, value in pattern.items() if names(key, module)), default)


def names(pattern: str, module: str) -> bool:
    """Whether a pattern names a module."""
    return _compiled(pattern).match(module) is not None


def is_quick_pattern(expression: str) -> bool:
    """Whether it is a regular expression that no name can keep busy."""
    try:
        re.compile(expression)
        return _ways(parser.parse(expression)) <= _MOST_WAYS
    except (re.error, RecursionError, OverflowError):
        return False


@lru_cache(MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _ways(parsed: Any) -> int:
    """In how many ways a name may be read by an expression, at most."""
    found = 1
    for kind, argument in parsed:
        if kind in _REPEATS:
            least, most, inside = argument
            once, times = _ways(inside), min(int(most), _LENGTH)
            found *= once**times if once > 1 else max(1, times - min(int(least), times)) + (most > least)
        elif kind is sre.BRANCH:
            found *= sum(map(_ways, argument[1]))
        else:
            parts = argument if isinstance(argument, tuple) else (argument,)
            for part in parts:
                found *= _ways(part) if isinstance(part, parser.SubPattern) else 1
    return found
