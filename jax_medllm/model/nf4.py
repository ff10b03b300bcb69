"""The arithmetic of NF4, of its scales too, bit for bit as bitsandbytes 0.50 computes it.

A weight [out, in] is cut into blocks of 64. A block keeps one scale, its largest magnitude (absmax), and for each value a
4-bit code: the nearest of the 16 quantiles of a normal distribution (QLoRA, arXiv 2305.14314). With double quantization the
absmaxes are quantized in turn: their mean is taken off, and blocks of 256 keep an fp32 scale and 8-bit codes into the *dynamic
map* (arXiv 2110.02861).

bitsandbytes blocks the flattened weight. With an input width that is a multiple of 64, as in every Qwen2.5, that is the same
as blocking each row, and no block crosses a row; blocks of absmaxes do.

Quantization follows the CUDA kernels (``kQuantizeBlockwise`` with ``dQuantizeNF4`` and ``dQuantize``); what bitsandbytes does
on a CPU is :mod:`parity_tests.bitsandbytes_cpu`. Two things in them are the hardware's own. The kernels are compiled with
``--use_fast_math``: their reciprocal (``rcp.approx.ftz``) may be off in its last bit, which a code shows only where a value
falls within that bit of a boundary: with bf16 weights never, with fp32 weights less than once in a million. And the mean of the
absmaxes is summed in an order that depends on the GPU, so its last bits may differ, and with them a few 8-bit codes.
"""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from medllm.errors import UserError
from medllm.quantization import BLOCK, NESTED_BLOCK

CODES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def check_width(in_features: int) -> None:
    """Refuse an input width that blocks do not fill: they would cross rows.

    Raises:
        UserError: it is not a multiple of 64.
    """
    if in_features % BLOCK:
        raise UserError(f"nf4 needs layer inputs in multiples of {BLOCK}; this model has one of width {in_features}")


def quantize_blocks(weight: Float[Array, "out in"]) -> tuple[UInt8[Array, "blocks half_block"], Float[Array, " blocks"]]:
    """First quantization: packed codes and the scale of each block of 64. Blocks are independent of each other.

    They are left unshaped: joined to rows in the same compiled function, XLA on a CPU takes seven times as long.

    Raises:
        UserError: the input width is not a multiple of 64.
    """
    check_width(weight.shape[1])
    values, absmax = _normalized(weight.astype(jnp.float32).reshape(-1, BLOCK))
    codes = _boundaries_below(values, _midpoints(CODES))
    return codes[:, 0::2] << 4 | codes[:, 1::2], absmax


def absmax_mean(absmax: Float[Array, " n"]) -> Float[Array, ""]:
    """What is taken off the scales before they are quantized: their sum, rounded once, times the reciprocal of their number.

    bitsandbytes takes torch's mean, on CUDA that product too; but the sum's last bits depend on the machine there (how many
    multiprocessors take part). Not so here: each addition keeps its rounding error (Knuth's TwoSum), in a fixed tree.
    """
    high = jnp.pad(absmax, (0, (1 << (absmax.size - 1).bit_length()) - absmax.size))
    low = jnp.zeros_like(high)
    while high.size > 1:
        (a, b), (low_a, low_b) = high.reshape(2, -1), low.reshape(2, -1)
        high = a + b
        rounded = high - a
        low = low_a + low_b + ((a - (high - rounded)) + (b - rounded))
    # The magnitude changes nothing, but keeps compilers from fusing this product with the subtraction it goes into.
    return jnp.abs((high + low)[0] * (np.float32(1) / np.float32(absmax.size)))


def quantize_absmax(
    absmax: Float[Array, " n"], offset: Float[Array, ""]
) -> tuple[UInt8[Array, " n"], Float[Array, " nested_blocks"]]:
    """Second quantization: codes into the dynamic map and the scale of each block of 256."""
    count = absmax.shape[0]
    blocks = jnp.pad(absmax - offset, (0, -count % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    values, nested_absmax = _normalized(blocks)
    boundaries = _midpoints(dynamic_map())
    # The kernel's binary search ends on an even code, which a tie goes to: above an odd code the midpoint itself counts.
    boundaries[1::2] = np.nextafter(boundaries[1::2], np.float32(-1))
    return _boundaries_below(values, boundaries).reshape(-1)[:count], nested_absmax


@partial(jax.jit, static_argnames="dtype")
def dequantize_halves(
    packed: UInt8[Array, "out half_in"], scales: Float[Array, "out half_in"], dtype: jnp.dtype
) -> tuple[Float[Array, "out half_in"], Float[Array, "out half_in"]]:
    """Code · absmax of a weight's columns of even and of odd number: the high and the low halves of its bytes.

    Of a shape and type it is traced once, and not for each of seven weights, forwards, backwards and where it is computed anew.

    Args:
        packed: The codes of the weight, or of a part of it.
        scales: Of each byte (:func:`byte_scales`), fp32.
        dtype: To which the product is rounded.
    """
    high, low = ((_looked_up(codes) * scales).astype(dtype) for codes in (packed >> 4, packed & 15))
    return high, low


def _looked_up(codes: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """The value of each code."""
    return jax.lax.platform_dependent(codes, tpu=_by_bits, default=_by_table)


def _by_bits(codes: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    # A TPU has no table to look up; its compiler writes sixteen comparisons, and their result to memory in fp32.
    values = [jnp.float32(value) for value in CODES]
    for bit in range(4):
        is_set = (codes & (1 << bit)) != 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _by_table(codes: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.asarray(CODES)[codes]


def byte_scales(absmax: Float[Array, "out blocks"], first: Int[Array, ""] | int, count: int) -> Float[Array, "out {count}"]:
    """The scale of each of ``count`` bytes of every row, from byte ``first`` on: a device may hold a part that cuts a block."""
    half = BLOCK // 2
    if count < absmax.shape[1] * half:
        blocks = min(-(-count // half) + 1, absmax.shape[1])
        start = jnp.minimum(first // half, absmax.shape[1] - blocks)
        absmax, first = jax.lax.dynamic_slice_in_dim(absmax, start, blocks, axis=1), first - start * half
    repeated = jnp.repeat(absmax, half, axis=1)
    return jax.lax.dynamic_slice_in_dim(repeated, first, count, axis=1) if count < repeated.shape[1] else repeated


def dequantize_absmax(
    codes: UInt8[Array, "out blocks"], nested_absmax: Float[Array, " nested_blocks"], offset: Float[Array, ""]
) -> Float[Array, "out blocks"]:
    """What quantized scales stand for: dynamic map · nested absmax, rounded, + offset."""
    nested = jnp.repeat(nested_absmax, NESTED_BLOCK)
    scaled = jnp.asarray(dynamic_map())[codes] * nested[: codes.size].reshape(codes.shape)
    # bitsandbytes rounds the product before it adds the offset. Compilers contract the two into a fused multiply-add, which
    # rounds once, and drop optimization barriers and no-op roundings; a selection between the two they leave alone.
    return jnp.where(jnp.isnan(scaled), 0, scaled) + offset


@cache
def dynamic_map() -> np.ndarray:
    """The 256 values of the signed dynamic type, ascending: seven decades, each twice as finely divided as the one below."""
    values = [np.float32(0), np.float32(1)]
    for exponent in range(7):
        edges = _linspace(0.1, 1.0, 2**exponent + 1)
        means = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """Evenly spaced fp32 values counted from both ends, as torch.linspace computes them; numpy's differ in the last bit."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    # float64 stands for the fused multiply-add: one rounding to fp32 for each value
    return np.where(index < count // 2, first + step * index, last - step * (count - 1 - index)).astype(np.float32)


def _normalized(blocks: Float[Array, "*n block"]) -> tuple[Float[Array, "*n block"], Float[Array, "*n"]]:
    """Values times the reciprocal of their block's absmax, and the absmax.

    The kernels are compiled to flush subnormal numbers to zero, reciprocals among them. An all-zero block becomes 0 · ∞ = NaN.
    """
    # As integers magnitudes have the same order, with NaN on top; a compiler is free to lose a NaN in a maximum of floats.
    # Halving, not a reduction: that one XLA does not vectorize on a CPU.
    magnitude = jax.lax.bitcast_convert_type(blocks, jnp.int32) & 0x7FFFFFFF
    while magnitude.shape[-1] > 1:
        magnitude = jnp.maximum(*jnp.split(magnitude, 2, axis=-1))
    absmax = _flushed(jax.lax.bitcast_convert_type(magnitude, jnp.float32))
    return _flushed(blocks) * _flushed(1 / absmax), absmax[..., 0]


def _flushed(values: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.where(jnp.abs(values) < np.finfo(np.float32).tiny, 0, values)


def _midpoints(table: np.ndarray) -> np.ndarray:
    return (table[:-1] + table[1:]) / np.float32(2)


def _boundaries_below(values: Float[Array, "*n"], boundaries: np.ndarray) -> UInt8[Array, "*n"]:
    """How many boundaries each value is above: its code. A value on a boundary gets the lower one; NaN gets 0."""
    ascending = jnp.asarray(boundaries)
    # One boundary at a time: a comparison with all at once would take 15 bytes a weight.
    return jax.lax.fori_loop(
        0, len(boundaries), lambda i, below: below + (values > ascending[i]), jnp.zeros(values.shape, jnp.uint8), unroll=15
    )
