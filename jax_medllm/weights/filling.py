"""An array of the model that is filled piece by piece, each device with its own part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_medllm.mesh.layout import in_use, placement


class Stack:
    """The array of a parameter, zero until it is filled.

    Args:
        variable: The parameter; abstract.
        path: Where it is in the model.

    Raises:
        UserError: the layout in use does not fit the parameter.
    """

    def __init__(self, variable: nnx.Variable, path: Sequence[Any]):
        self.shape = tuple(variable.shape)
        self._sharding = placement(variable, path)
        everywhere = self._sharding.addressable_devices_indices_map(self.shape)
        self._parts = [_Part(device if in_use() else None, index, self.shape) for device, index in everywhere.items()]
        for part in self._parts:
            part.array = jnp.zeros([stop - start for start, stop in part.bounds], variable.dtype, device=part.device)

    def put(self, value: Any, layer: int | None, row: int = 0) -> None:
        """Write consecutive rows of one layer (None: the array has no layers), beginning with ``row``."""
        leading = [] if layer is None else [layer]
        starts = [*leading, row, *[0] * len(self.shape)][: len(self.shape)]
        value = value.reshape((1,) * (len(self.shape) - value.ndim) + value.shape)
        for part in self._parts:
            part.put(value, starts)

    def array(self) -> jax.Array:
        """The whole, as the model holds it."""
        parts = [part.array for part in self._parts]
        return parts[0] if in_use() is None else jax.make_array_from_single_device_arrays(self.shape, self._sharding, parts)


class _Part:
    """What one device (None: the default one) holds: for each axis, from where to where."""

    def __init__(self, device: jax.Device | None, index: Sequence[slice], shape: Sequence[int]):
        self.device = device
        self.bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        self.array: Any = None

    def put(self, value: Any, starts: Sequence[int]) -> None:
        overlap = [
            (max(start, low), min(start + size, high))
            for start, size, (low, high) in zip(starts, value.shape, self.bounds, strict=True)
        ]
        if any(first >= last for first, last in overlap):
            return
        piece = value[tuple(slice(first - start, last - start) for (first, last), start in zip(overlap, starts, strict=True))]
        own = tuple(first - low for (first, _), (low, _) in zip(overlap, self.bounds, strict=True))
        self.array = _write(self.array.block_until_ready(), jax.device_put(piece, self.device), own)


@partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, value: jax.Array, start: tuple[jax.Array, ...]) -> jax.Array:
    """``array`` with ``value`` written into it, in place."""
    bits = jnp.dtype(f"uint{8 * array.dtype.itemsize}")  # XLA on a CPU copies 16-bit floats one by one
    held, given = (jax.lax.bitcast_convert_type(part, bits) for part in (array, value.astype(array.dtype)))
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice(held, given, start), array.dtype)
