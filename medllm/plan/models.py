"""Models that can be planned for: those that are published, by name and without a file, and any folder."""

from __future__ import annotations

import difflib
from pathlib import Path

from medllm.architecture import Architecture
from medllm.errors import UserError
from medllm.model.directory import ModelDirectory
from medllm.published import PUBLISHED


def planned_model(name: str) -> Architecture:
    """A model known by name, or that of a folder, of which nothing but ``config.json`` is read.

    Raises:
        UserError: neither a known name nor a model folder, or its config is not one of a supported model.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    if not Path(name).is_dir():
        near = difflib.get_close_matches(name.lower(), PUBLISHED, 1)
        hint = f"did you mean {near[0]}?" if near else f"known by name are {', '.join(PUBLISHED)}"
        raise UserError(f"--model {name}: neither a known name nor a folder; {hint}")
    return ModelDirectory(name).described


def dense_layers(name: str) -> dict[str, tuple[int, ...]]:
    """Of a folder in 4 bits, the layers of each linear kind that its ``config.json`` leaves dense; of any other model none.

    Raises:
        UserError: its config is not one of a supported model.
    """
    return {} if name in PUBLISHED else ModelDirectory(name).left_dense
