"""What of an annotation is checked when a test runs: the shapes and element types of arrays. The rest is for mypy."""

from __future__ import annotations

import functools
import operator
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

_INT_IS_FLOAT = BeartypeConf(is_pep484_tower=True)
"""As type checkers have it."""


def shapes_checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``beartype`` for those annotations of ``function`` in which there is the shape of an array."""
    hints = {name: _either(hint) for name, hint in function.__annotations__.items() if _has_shape(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype(function, conf=_INT_IS_FLOAT)


def _has_shape(hint: Any) -> bool:
    return _is_shape(hint) or any(map(_has_shape, typing.get_args(hint)))


def _is_shape(hint: Any) -> bool:
    return isinstance(hint, type) and not typing.get_args(hint) and issubclass(hint, AbstractArray)


def _either(hint: Any) -> Any:
    """``hint`` with numpy's arrays beside those of JAX, whose functions take both."""
    if _is_shape(hint):
        return hint.dtype[jax.Array | np.ndarray, hint.dim_str] if hint.array_type is jax.Array else hint
    arguments = tuple(map(_either, typing.get_args(hint)))
    if not arguments:
        return hint
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return functools.reduce(operator.or_, arguments)
    return typing.get_origin(hint)[arguments]
