"""What a packed weight is: its arrays, their axes, how they are made, what they stand for, and where bitsandbytes keeps them.

A kind of quantization is a class. Who holds, reads, spreads, writes or compares packed weights asks :class:`QuantizedWeight`
and names none of their arrays; another kind is another class in this module. Two differ in their scales alone:

- ``nf4`` (:class:`NF4Weight`): NF4 with double quantization, 4.127 bits a weight.
- ``nf4-single`` (:class:`SingleNF4Weight`): NF4 whose scales stay fp32, 4.5 bits a weight.

The arithmetic is :mod:`jax_medllm.model.nf4`'s, files are :mod:`jax_medllm.weights.bnb_files`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from jax_medllm.mesh.pytree import Leaf, pytree
from jax_medllm.model.nf4 import (
    CODES,
    absmax_mean,
    byte_scales,
    check_width,
    dequantize_absmax,
    dequantize_halves,
    dynamic_map,
    quantize_absmax,
    quantize_blocks,
)
from medllm.axes import Axis
from medllm.quantization import BLOCK, NESTED_BLOCK, Quantization


@dataclass(frozen=True)
class Part:
    """The declaration of one array of a packed weight.

    Attributes:
        axes: Its logical axes, with their sizes, from those of the weight.
        dtype: Type of its numbers.
        suffix: What follows the weight's name in that of its tensor on disk; None for a number of the weight's description.
        key: Of that number.
        values: What an audit calls its numbers; empty where they depend on the order of a sum, and cannot be compared.
    """

    axes: Callable[[Axis, Axis], tuple[Axis, ...]]
    dtype: Any
    suffix: str | None = None
    key: str = ""
    values: str = ""


def code_axes(out_axis: Axis, in_axis: Axis) -> tuple[Axis, Axis]:
    """Axes of the codes of a weight, two in a byte."""
    return out_axis, replace(in_axis, size=in_axis.size // 2)


def scale_axes(out_axis: Axis, in_axis: Axis) -> tuple[Axis, Axis]:
    """Axes of the scales of a weight, one a block.

    Where devices share a row so that a block of 64 is cut between two of them (the 29,568 inputs of 72B's down_proj over 4),
    each of them keeps the scales of the whole row.
    """
    return out_axis, Axis(in_axis.name, in_axis.size // BLOCK, may_stay_whole=True)


def _nested_axes(out_axis: Axis, in_axis: Axis) -> tuple[Axis]:
    """Axis of the scales of the scales: their blocks cross rows, so every device has all of them."""
    return (Axis("absmax_blocks", -(-out_axis.size * (in_axis.size // BLOCK) // NESTED_BLOCK)),)


def dequantize_rows(
    packed: UInt8[Leaf, "rows half_in"], scales: Float[Leaf, "rows blocks"], dtype: jnp.dtype
) -> Float[Array, "rows in"]:
    """What some rows of codes stand for, given the scales of their blocks: see :meth:`QuantizedWeight.dequantize`."""
    halves = dequantize_halves(packed, byte_scales(scales, 0, packed.shape[1]), dtype)
    return jnp.stack(halves, axis=-1).reshape(packed.shape[0], -1)


@dataclass(frozen=True)
class QuantizedWeight(ABC):
    """A packed weight of shape [out, in]. The fields of a kind, a registered pytree, are its arrays, in numpy or JAX.

    Attributes:
        packed: Two codes a byte, the earlier value in the high half. Every kind has it.
        name: The setting that asks for the kind.
        parts: Declaration of each array.
        tables: What is the same in every weight of the kind and stored with each, by the suffix of its tensor's name.
        described: What its description says beside what all kinds' say.
    """

    packed: UInt8[Leaf, "*l out half_in"]
    name: ClassVar[Quantization]
    parts: ClassVar[Mapping[str, Part]]
    tables: ClassVar[Mapping[str, np.ndarray]]
    described: ClassVar[Mapping[str, Any]]

    @classmethod
    def quantize(cls, weight: Float[Array, "out in"]) -> Self:
        """Quantize a weight of finite values as bitsandbytes does on CUDA.

        Equal values give equal bytes whatever their type, and on every backend: all arithmetic is fp32, in a fixed order.

        Raises:
            UserError: the input width is not a multiple of 64.
        """
        return cls.of_blocks(*quantize_blocks(weight), rows=weight.shape[0])

    @classmethod
    @abstractmethod
    def of_blocks(cls, packed: UInt8[Array, "blocks half_block"], absmax: Float[Array, " blocks"], rows: int) -> Self:
        """The weight of ``rows`` rows that all of its blocks make, in order (:func:`jax_medllm.model.nf4.quantize_blocks`)."""

    @classmethod
    @abstractmethod
    def typical(cls, scale: float) -> Mapping[str, float]:
        """Values, for the arrays that are no codes, which make scales of about ``scale`` whatever the codes are."""

    @abstractmethod
    def scales(self) -> Float[Array, "out blocks"]:
        """The scale of each block of 64."""

    def dequantize(self, dtype: jnp.dtype) -> Float[Array, "out in"]:
        """The weight the codes stand for: code · absmax in fp32, rounded once to ``dtype``."""
        return dequantize_rows(self.packed, self.scales(), dtype)

    @abstractmethod
    def finite(self) -> Bool[Array, ""]:
        """Whether all numbers of the weight that was quantized were finite."""

    @classmethod
    def shapes(cls, out_features: int, in_features: int) -> Self:
        """Shapes and types of the arrays of a weight [out, in], as ``ShapeDtypeStruct``.

        Raises:
            UserError: the input width is not a multiple of 64.
        """
        check_width(in_features)
        axes = Axis("out", out_features), Axis("in", in_features)
        sizes = {name: tuple(axis.size for axis in part.axes(*axes)) for name, part in cls.parts.items()}
        return cls(**{name: jax.ShapeDtypeStruct(shape, cls.parts[name].dtype) for name, shape in sizes.items()})

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: [out, in]."""
        out_features, half = self.packed.shape
        return out_features, 2 * half


_CODES_PART = Part(code_axes, np.uint8, suffix="", values="codes")


@pytree
@dataclass(frozen=True)
class NF4Weight(QuantizedWeight):
    """NF4 with double quantization: the scales of the blocks are quantized in turn.

    Attributes:
        absmax_codes: Quantized scale of each block of 64.
        nested_absmax: Scale of each block of 256 absmaxes, counted over the flattened weight.
        offset: Mean of the absmaxes.
    """

    absmax_codes: UInt8[Leaf, "*l out blocks"]
    nested_absmax: Float[Leaf, "*l nested_blocks"]
    offset: Float[Leaf, "*l"]

    name = "nf4"
    parts: ClassVar = {
        "packed": _CODES_PART,
        "absmax_codes": Part(scale_axes, np.uint8, suffix=".absmax", values="scale codes"),
        "nested_absmax": Part(_nested_axes, np.float32, suffix=".nested_absmax"),
        "offset": Part(lambda *_: (), np.float32, key="nested_offset"),
    }
    tables: ClassVar = {".quant_map": CODES, ".nested_quant_map": dynamic_map()}
    described: ClassVar = {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}

    @classmethod
    def of_blocks(cls, packed: UInt8[Array, "blocks half_block"], absmax: Float[Array, " blocks"], rows: int) -> Self:
        """Their scales are quantized together."""
        offset = absmax_mean(absmax)
        codes, nested_absmax = quantize_absmax(absmax, offset)
        return cls(packed.reshape(rows, -1), codes.reshape(rows, -1), nested_absmax, offset)

    @classmethod
    def typical(cls, scale: float) -> Mapping[str, float]:
        """Uniform codes make the scales vary by a quarter."""
        return {"nested_absmax": scale / 4, "offset": scale}

    def scales(self) -> Float[Array, "out blocks"]:
        """The absmaxes, as their codes stand for them."""
        return dequantize_absmax(self.absmax_codes, self.nested_absmax, self.offset)

    def finite(self) -> Bool[Array, ""]:
        """A number that is not shows in the mean of the absmaxes, as do scales too large to average."""
        return jnp.isfinite(self.offset)


@pytree
@dataclass(frozen=True)
class SingleNF4Weight(QuantizedWeight):
    """NF4 without double quantization: bitsandbytes' ``compress_statistics=False``.

    Attributes:
        absmax: Scale of each block of 64.
    """

    absmax: Float[Leaf, "*l out blocks"]

    name = "nf4-single"
    parts: ClassVar = {"packed": _CODES_PART, "absmax": Part(scale_axes, np.float32, suffix=".absmax", values="scales")}
    tables: ClassVar = {".quant_map": CODES}
    described: ClassVar = {}

    @classmethod
    def of_blocks(cls, packed: UInt8[Array, "blocks half_block"], absmax: Float[Array, " blocks"], rows: int) -> Self:
        """Their scales are kept."""
        return cls(packed.reshape(rows, -1), absmax.reshape(rows, -1))

    @classmethod
    def typical(cls, scale: float) -> Mapping[str, float]:
        """All alike."""
        return {"absmax": scale}

    def scales(self) -> Float[Array, "out blocks"]:
        """The absmaxes."""
        return self.absmax

    def finite(self) -> Bool[Array, ""]:
        """A number that is not makes the absmax of its block."""
        return jnp.isfinite(self.absmax).all()


KINDS: Mapping[str, type[QuantizedWeight]] = {kind.name: kind for kind in (NF4Weight, SingleNF4Weight)}
"""The kinds by the setting that asks for them."""
