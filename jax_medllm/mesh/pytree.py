"""Dataclasses as pytrees.

JAX rebuilds a pytree around whatever became of its leaves: tracers, shapes, partition specs, placeholders. Here it does so
without the constructor: what that checks, where types are checked, are the arrays somebody makes a dataclass of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T", bound=type)
Leaf = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
"""What a pytree of arrays may hold: an array on a device or on the host, or the shape of one."""


def pytree(cls: T) -> T:
    """Register a dataclass whose fields are all children; a class decorator above ``dataclass``."""
    names = tuple(field.name for field in fields(cls))
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)

    def children(node: Any) -> tuple[tuple[Any, ...], None]:
        return tuple(getattr(node, name) for name in names), None

    def with_keys(node: Any) -> tuple[tuple[Any, ...], None]:
        return tuple(zip(keys, children(node)[0], strict=True)), None

    def rebuilt(_: None, values: Iterable[Any]) -> Any:
        node: Any = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(node, name, value)  # frozen
        return node

    jax.tree_util.register_pytree_with_keys(cls, with_keys, rebuilt, children)
    return cls
