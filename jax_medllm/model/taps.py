"""Listening to a decoder layer: its submodules and its attention context keep what passes through them.

Nothing of the layer is written anew; what is read where is :mod:`medllm.model.quantities`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from jax_medllm.model.decoder import Layer
from medllm.architecture import Architecture
from medllm.model.quantities import taps


def tap(layer: Layer, config: Architecture, record: dict[str, Array]) -> None:
    """Have the submodules of ``layer`` write their quantities into ``record`` when they are computed."""
    for name, sides in taps(config).items():
        parent, _, leaf = name.rpartition(".")
        setattr(submodule(layer, parent), leaf, _Tap(submodule(layer, name), sides, record))


def submodule(module: Any, path: str) -> Any:
    """The part of a module at a dotted path; itself for an empty one."""
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


class _Tap:
    """A submodule that keeps what goes into it and comes out, where the table of quantities asks for it."""

    def __init__(self, module: Any, sides: Mapping[str, str], record: dict[str, Array]):
        self._module, self._sides, self._record = module, sides, record

    def __call__(self, x: Array, **settings: Any) -> Array:
        y = self._module(x, **settings)
        self._record |= {self._sides[side]: value for side, value in (("in", x), ("out", y)) if side in self._sides}
        return y


class OverheardContext:
    """An attention context that keeps the rotated heads it is handed."""

    def __init__(self, context: Any, record: dict[str, Array]):
        self._context, self._record = context, record

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        """As the context does."""
        self._record |= {"q after rotary": q, "k after rotary": k}
        return self._context.attend(q, k, v)
