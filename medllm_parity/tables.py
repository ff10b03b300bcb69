"""Rows of a table of the vocabulary as each stack multiplies with them. The output matrix may be in 4 bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch
from bitsandbytes import functional as bnb

from jax_medllm.model.quantized_weight import dequantize_rows
from jax_medllm.weights.bnb_files import read_packed, stored
from medllm.model.directory import ModelDirectory
from medllm_parity.torch_layer import packed_weight, to_torch


class JaxTable:
    """The JAX stack's; of a packed one memory holds the codes.

    Args:
        directory: Where it is.
        name: Of its tensor.
        dtype: Type of the computation.
    """

    def __init__(self, directory: ModelDirectory, name: str, dtype: Any):
        self.shape = directory.logical_shape(name)
        self._directory, self._name, self._dtype = directory, name, jnp.dtype(dtype)
        self._packed = None
        if stored(directory, name):
            packed = jax.tree.map(jnp.asarray, read_packed(directory, name))
            self._packed = packed.packed, packed.scales()

    def rows(self, start: int, stop: int) -> jax.Array:
        """Those from ``start`` to ``stop``."""
        if self._packed is not None:
            codes, scales = self._packed
            return dequantize_rows(codes[start:stop], scales[start:stop], self._dtype)
        return jnp.asarray(self._directory.read_slice(self._name, slice(start, stop))).astype(self._dtype)


class TorchTable:
    """The torch stack's; of a packed one memory holds what bitsandbytes makes of it as a whole.

    Args:
        directory: Where it is.
        name: Of its tensor.
        dtype: Type of the computation.
    """

    def __init__(self, directory: ModelDirectory, name: str, dtype: torch.dtype):
        self.shape = directory.logical_shape(name)
        self._directory, self._name, self._dtype = directory, name, dtype
        packed = packed_weight(directory, name, dtype)
        self._dense = None if packed is None else bnb.dequantize_4bit(packed.data, packed.quant_state)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Those from ``start`` to ``stop``."""
        if self._dense is not None:
            return self._dense[start:stop]
        return to_torch(self._directory.read_slice(self._name, slice(start, stop)), self._dtype)
