"""A linear layer of a transformer: base weight (dense or NF4) + LoRA, stacked over the layers of the model.

    y = x Wᵀ (+ b) + scaling · (x Aᵀ) Bᵀ          W [out, in]   A [rank, in]   B [out, rank]

Every array has a leading layer axis; the model scans over it and each layer sees its own slice. An array is declared once, by
``declare``: shape, logical axes, type and initializer. Abstract shapes come from ``nnx.eval_shape`` over the declarations and
shardings from the logical axes they carry.

A NF4 weight is dequantized where it is used, and again in the backward pass: between the two only the packed codes stay in
memory, never the dense weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_medllm.attention import matmul_precision
from jax_medllm.nf4 import NF4Weight, dequantize, quantize, weight_shapes
from medllm.config import ALL_LINEAR, LoraConfig

Quantization = Literal["none", "nf4"]
Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


class LoraParam(nnx.Param):
    """A matrix of the adapter that is trained."""


class FrozenLoraParam(nnx.Variable):
    """A matrix of an adapter that is part of the model and not trained."""


class PackedParam(nnx.Variable):
    """A part of a NF4 weight. Not trainable."""


@dataclass(frozen=True)
class Axis:
    """One logical axis of an array: the name that sharding rules use, and its size."""

    name: str
    size: int


def declare(
    kind: type[nnx.Variable], axes: tuple[Axis, ...], dtype: jnp.dtype, initializer: Initializer, key: jax.Array
) -> nnx.Variable:
    """The one declaration of an array: an NNX variable whose ``axes`` metadata names its logical axes."""
    shape = tuple(axis.size for axis in axes)
    return kind(initializer(key, shape, dtype), axes=tuple(axis.name for axis in axes))


def scaling(lora: LoraConfig) -> float:
    """What an adapter's update is multiplied by: alpha / rank, or alpha / sqrt(rank) with rslora (arXiv 2312.03732)."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


class Lora(nnx.Module):
    """The two matrices of a low-rank update, in PEFT's shapes."""

    def __init__(
        self,
        kind: type[nnx.Variable],
        target: str,
        config: LoraConfig,
        layers: Axis,
        out_axis: Axis,
        in_axis: Axis,
        dtype: jnp.dtype,
    ):
        rank = Axis("rank", config.rank)
        key = jax.random.fold_in(jax.random.key(config.seed), ALL_LINEAR.index(target))
        # fp32 masters whatever the computation's type; float64 only where everything is.
        master = jnp.promote_types(dtype, jnp.float32)
        self.A = declare(kind, (layers, rank, in_axis), master, _uniform(1 / math.sqrt(in_axis.size)), key)
        self.B = declare(kind, (layers, out_axis, rank), master, nnx.initializers.zeros, key)
        self.scaling = scaling(config)

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        """scaling · (x Aᵀ) Bᵀ in the type of ``x``."""
        return self.scaling * matmul(matmul(x, self.A[...].astype(x.dtype)), self.B[...].astype(x.dtype))


class Linear(nnx.Module):
    """Base weight, optional bias, optional frozen adapter and optional trained adapter.

    Args:
        target: PEFT's name of the module (``q_proj`` …).
        lora: The trained adapter, where it targets this module.
        frozen_lora: An adapter that belongs to the model: it stays on when the trained one is switched off.
    """

    def __init__(
        self,
        target: str,
        layers: Axis,
        out_axis: Axis,
        in_axis: Axis,
        *,
        bias: bool = False,
        lora: LoraConfig | None,
        frozen_lora: LoraConfig | None,
        quantization: Quantization,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        normal = nnx.initializers.normal(0.02)
        packed = quantization == "nf4"
        axes = (layers, out_axis, in_axis)
        self.weight = None if packed else declare(nnx.Param, axes, dtype, normal, rngs.params())
        self.quantized = PackedWeight(*axes, normal, rngs.params()) if packed else None
        self.bias = declare(nnx.Param, (layers, out_axis), dtype, nnx.initializers.zeros, rngs.params()) if bias else None

        def adapter(kind: type[nnx.Variable], config: LoraConfig | None) -> Lora | None:
            if config is None or target not in config.targets:
                return None
            return Lora(kind, target, config, layers, out_axis, in_axis, dtype)

        self.lora = adapter(LoraParam, lora)
        self.frozen_lora = adapter(FrozenLoraParam, frozen_lora)

    def __call__(self, x: Float[Array, "*b in"], *, adapter: bool = True) -> Float[Array, "*b out"]:
        """Apply the layer; ``adapter=False`` leaves the trained adapter out, at trace time."""
        if self.quantized is not None:
            y = nf4_matmul(x, self.quantized.value())
        else:
            assert self.weight is not None
            y = matmul(x, self.weight[...])
        if self.bias is not None:
            y = y + self.bias[...]
        if self.frozen_lora is not None:
            y = y + self.frozen_lora(x)
        if self.lora is not None and adapter:
            y = y + self.lora(x)
        return y


class PackedWeight(nnx.Module):
    """The parts of a NF4 weight, each stacked over the layers."""

    def __init__(self, layers: Axis, out_axis: Axis, in_axis: Axis, initializer: Initializer, key: jax.Array):
        shapes = weight_shapes(out_axis.size, in_axis.size)
        dense = initializer(key, (layers.size, out_axis.size, in_axis.size), jnp.float32)
        parts = jax.lax.map(quantize, dense)
        nested = Axis("absmax_blocks", shapes.nested_absmax.shape[0])

        def part(name: str, *axes: Axis) -> nnx.Variable:
            return declare(PackedParam, (layers, *axes), getattr(shapes, name).dtype, lambda *_: getattr(parts, name), key)

        self.packed = part("packed", out_axis, Axis(in_axis.name, in_axis.size // 2))
        self.absmax_codes = part("absmax_codes", out_axis, Axis(in_axis.name, shapes.absmax_codes.shape[1]))
        self.nested_absmax = part("nested_absmax", nested)
        self.offset = part("offset")

    def value(self) -> NF4Weight:
        """The parts as one pytree (of one layer, or of all where the stack is whole)."""
        return NF4Weight(self.packed[...], self.absmax_codes[...], self.nested_absmax[...], self.offset[...])


def matmul(x: Float[Array, "*b in"], weight: Float[Array, "out in"]) -> Float[Array, "*b out"]:
    """x Wᵀ with a weight in Hugging Face's orientation, at full precision for fp32 and float64."""
    return jnp.einsum("...i,oi->...o", x, weight, precision=matmul_precision(x.dtype))


@jax.custom_vjp
def nf4_matmul(x: Float[Array, "*b in"], weight: NF4Weight) -> Float[Array, "*b out"]:
    """x Wᵀ with a quantized weight, dequantized to the type of ``x``. Only ``x`` has a gradient."""
    return matmul(x, dequantize(weight, x.dtype))


def _nf4_matmul_forward(x: Float[Array, "*b in"], weight: NF4Weight) -> tuple[Float[Array, "*b out"], NF4Weight]:
    return nf4_matmul(x, weight), weight


def _nf4_matmul_backward(weight: NF4Weight, g: Float[Array, "*b out"]) -> tuple[Float[Array, "*b in"], None]:
    dense = dequantize(weight, g.dtype)
    return jnp.einsum("...o,oi->...i", g, dense, precision=matmul_precision(g.dtype)), None


nf4_matmul.defvjp(_nf4_matmul_forward, _nf4_matmul_backward)


def _uniform(bound: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
