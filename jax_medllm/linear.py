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
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jax_medllm.attention import matmul_precision
from jax_medllm.nf4 import NF4Weight, dequantize, quantize, weight_shapes
from medllm.adapter_directory import module_name
from medllm.config import ALL_LINEAR, LoraConfig

Quantization = Literal["none", "nf4"]
Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


class LoraParam(nnx.Param):
    """A matrix of the adapter that is trained."""


class FrozenLoraParam(nnx.Variable):
    """A matrix of an adapter that is part of the model and not trained."""


class LoraScaling(nnx.Variable):
    """What an adapter's update is multiplied by, in each layer. Not trained."""


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


class Lora(nnx.Module):
    """The two matrices of a low-rank update, in PEFT's shapes, and its scaling.

    Layers may differ in rank: the stack is as wide as the widest, and the rows of A and columns of B beyond a layer's rank are
    zero. The product of the two has no gradient there, so they stay zero.
    """

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
        modules = [module_name(layer, target) for layer in range(layers.size)]
        ranks = np.array([config.rank_of(module) for module in modules])
        rank = Axis("rank", int(ranks.max()))
        key = jax.random.fold_in(jax.random.key(config.seed), ALL_LINEAR.index(target))
        # fp32 masters whatever the computation's type; float64 only where everything is.
        master = jnp.promote_types(dtype, jnp.float32)
        used = (np.arange(rank.size) < ranks[:, None])[:, :, None]
        uniform = _uniform(1 / math.sqrt(in_axis.size))
        self.A = declare(kind, (layers, rank, in_axis), master, lambda *given: jnp.where(used, uniform(*given), 0), key)
        self.B = declare(kind, (layers, out_axis, rank), master, nnx.initializers.zeros, key)
        scaling = np.array([config.scaling_of(module) for module in modules])
        self.scaling = declare(LoraScaling, (layers,), master, lambda *_: jnp.asarray(scaling, master), key)

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        """scaling · (x Aᵀ) Bᵀ in the type of ``x``."""
        update = matmul(matmul(x, self.A[...].astype(x.dtype)), self.B[...].astype(x.dtype))
        return (self.scaling[...] * update).astype(x.dtype)


class Linear(nnx.Module):
    """Base weight, optional bias, frozen adapters and optional trained adapter.

    Args:
        target: PEFT's name of the module (``q_proj`` …).
        lora: The trained adapter, where it targets this module.
        frozen_loras: Adapters that belong to the model: they stay on when the trained one is switched off.
        reference: Beside the trained adapter stands a frozen one of its shape, which is on exactly when the trained one is off.
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
        frozen_loras: tuple[LoraConfig, ...],
        reference: bool,
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
            if config is None or not any(config.covers(module_name(layer, target)) for layer in range(layers.size)):
                return None
            return Lora(kind, target, config, layers, out_axis, in_axis, dtype)

        self.lora = adapter(LoraParam, lora)
        self.reference_lora = adapter(FrozenLoraParam, lora) if reference else None
        self.frozen_loras = nnx.List([adapter(FrozenLoraParam, config) for config in frozen_loras])

    def __call__(self, x: Float[Array, "*b in"], *, adapter: bool = True) -> Float[Array, "*b out"]:
        """Apply the layer; ``adapter=False`` leaves the trained adapter out, at trace time."""
        if self.quantized is not None:
            y = nf4_matmul(x, self.quantized.value())
        else:
            assert self.weight is not None
            y = matmul(x, self.weight[...])
        if self.bias is not None:
            y = y + self.bias[...]
        for lora in (*self.frozen_loras, self.lora if adapter else self.reference_lora):
            if lora is not None:
                y = y + lora(x)
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
