"""A model without numbers: its structure and shapes, and what a fresh adapter begins with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
from flax import nnx

from jax_medllm.mesh.layout import Layout, in_use, shardings
from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.model.linear import LoraParam, LoraScaling
from jax_medllm.weights.adapters import Path
from medllm.architecture import Architecture
from medllm.config import LoraConfig
from medllm.quantization import Quantization

_ADAPTERS = nnx.Any(LoraScaling, LoraParam)


@dataclass(frozen=True)
class Blueprint:
    """What a model is built from. Those of one blueprint, such as layers that are read one by one, are traced once.

    Attributes:
        architecture: Its sizes and family.
        lora: Of the adapter to train; None without one.
        frozen_loras: Of the adapters that belong to the model, in order.
        reference: The trained adapter has a frozen counterpart.
        quantization: How the linear kinds are held.
        dense: Kinds of which some layers stay dense, and which layers.
        dtype: Type of the other weights and of the computation.
    """

    architecture: Architecture
    lora: LoraConfig | None = None
    frozen_loras: tuple[LoraConfig, ...] = ()
    reference: bool = False
    quantization: Quantization = "none"
    dense: tuple[tuple[str, tuple[int, ...]], ...] = ()
    dtype: Any = "float32"

    def build(self) -> DenseDecoder:
        """The model with random numbers, to be traced."""
        settings = {name: getattr(self, name) for name in ("lora", "frozen_loras", "reference", "quantization", "dtype")}
        return DenseDecoder(self.architecture, **settings, dense=dict(self.dense), rngs=nnx.Rngs(0))

    def model(self) -> DenseDecoder:
        """An abstract one, the caller's own."""
        return nnx.merge(*_traced(self, (in_use(), jax.config.jax_enable_x64)), copy=True)

    def adapters(self, model: DenseDecoder) -> Iterable[tuple[Path, Any]]:
        """A fresh adapter's numbers and all scalings, laid out as in ``model``. Only these leave the compiled function: the
        random base weights are never computed."""
        where = shardings(nnx.state(model, _ADAPTERS)) if in_use() else None
        return nnx.to_flat_state(jax.jit(_first_numbers, static_argnums=0, out_shardings=where)(self))


@lru_cache(maxsize=32)
def _traced(blueprint: Blueprint, _seen: tuple[Layout | None, bool]) -> tuple[Any, Any]:
    """Structure and shapes. They depend on the layout and the width of numbers in use too, which tell them apart."""
    return nnx.split(nnx.eval_shape(blueprint.build))


def _first_numbers(blueprint: Blueprint) -> nnx.State:
    return nnx.state(blueprint.build(), _ADAPTERS)
