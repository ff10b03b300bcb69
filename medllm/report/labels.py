"""What models are called in tables, as much of their paths as tells them apart; and where labels stand in a drawing."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

_LONG = 28  # characters beside an axis
_PARTS = " + "
_OF_EVERY_RUN = ("merged", "adapter")
"""Folders that every training leaves: they tell no model from another."""


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """For every label the name it is shown under; a label without a path in it is its own.

    A label may be paths joined by ``+``, a model and its adapters: each keeps as many of its last folders as are needed.

    >>> short_names(["models/Qwen2.5-72B", "models/Qwen2.5-72B + runs/cpt/adapter", "CPT"])
    {'models/Qwen2.5-72B': 'Qwen2.5-72B', 'models/Qwen2.5-72B + runs/cpt/adapter': 'Qwen2.5-72B + cpt', 'CPT': 'CPT'}
    """
    every = dict.fromkeys(labels)
    longest = max((label.count("/") for label in every), default=0) + 1
    found = {}
    for label in every:
        shorter = (_last(label, length) for length in range(1, longest + 1))
        found[label] = next(
            (short for length, short in enumerate(shorter, 1) if [_last(other, length) for other in every].count(short) == 1),
            label,
        )
    return found if len(set(found.values())) == len(found) else {label: label for label in every}


def _last(label: str, length: int) -> str:
    """The last ``length`` folders of every path in a label."""
    parts = []
    for part in label.split(_PARTS):
        folders = [folder for folder in part.split("/") if folder]
        while len(folders) > 1 and folders[-1] in _OF_EVERY_RUN:
            folders.pop()
        named = re.search(r"\s", part) is not None  # "RPO w/o CPT" is no path
        parts.append("/".join(folders[-length:]) if "/" in part and not named else part)
    return _PARTS.join(parts)


def wrapped(label: str) -> str:
    """In lines short enough to stand beside an axis."""
    return "\n".join(textwrap.wrap(label, _LONG)) or label


def shortened(label: str) -> str:
    """In one line, with both ends of it."""
    return label if len(label) <= _LONG + 8 else f"{label[: _LONG // 2]}…{label[-_LONG // 2 - 4 :]}"


def spread(values: Sequence[float], apart: float) -> list[float]:
    """Heights for labels at ``values``: at least ``apart`` from each other, and each crowd centred on its own values."""
    order = sorted(range(len(values)), key=values.__getitem__)
    crowds: list[list[int]] = []
    for index in order:
        crowds.append([index])
        while (
            len(crowds) > 1
            and _bottom(crowds[-1], values, apart) < _bottom(crowds[-2], values, apart) + len(crowds[-2]) * apart
        ):
            last = crowds.pop()
            crowds[-1] += last
    return [
        _bottom(crowd, values, apart) + crowd.index(index) * apart
        for index in range(len(values))
        for crowd in crowds
        if index in crowd
    ]


def _bottom(crowd: Sequence[int], values: Sequence[float], apart: float) -> float:
    return sum(values[index] for index in crowd) / len(crowd) - apart * (len(crowd) - 1) / 2
