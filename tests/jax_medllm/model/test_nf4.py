"""NF4 against a transcription of bitsandbytes' CUDA kernels, and what quantization may and may not change."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_medllm.model.nf4 import CODES, absmax_mean, dynamic_map, quantize_absmax, quantize_blocks
from jax_medllm.model.quantized_weight import KINDS, NF4Weight
from medllm.errors import UserError
from medllm.quantization import BLOCK, PACKINGS, Quantization
from tests.forced_devices import OPTIMIZED

compiled = partial(jax.jit, compiler_options=OPTIMIZED)

quantized = compiled(NF4Weight.quantize)
TYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
SMALLEST_NORMAL = np.float32(2.0**-126)


def random_weight(seed: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(32, 128))).astype(np.float32)


def unpacked(packed: jax.Array) -> np.ndarray:
    pairs = np.asarray(packed)
    return np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(pairs.shape[0], -1)


# --- bitsandbytes 0.50.2, csrc/kernels.cu, as nvcc --use_fast_math compiles it: every operation flushes subnormal numbers ---


def ftz(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.float32(0), x)


def d_quantize_nf4(x: np.ndarray) -> np.ndarray:
    """The kernel's decision tree, its literals as they are printed there."""

    def above(literal: float, yes: np.ndarray | int, no: np.ndarray | int) -> np.ndarray:
        return np.where(x > np.float32(literal), yes, no)

    high = above(
        0.3893125355243683,
        above(0.6427869200706482, above(0.8614784181118011, 15, 14), above(0.5016634166240692, 13, 12)),
        above(0.2035212516784668, above(0.2920137718319893, 11, 10), above(0.1202552504837513, 9, 8)),
    )
    low = above(
        -0.33967943489551544,
        above(-0.13791173323988914, above(-0.045525018125772476, 7, 6), above(-0.23460740596055984, 5, 4)),
        above(-0.6106329262256622, above(-0.4599952697753906, 3, 2), above(-0.8480964004993439, 1, 0)),
    )
    return above(0.03979014977812767, high, low).astype(np.uint8)


def d_quantize(x: np.ndarray) -> np.ndarray:
    """The kernel's binary search in the dynamic map, all of its values at once."""
    code = dynamic_map()
    pivot, lower_pivot, upper_pivot = (np.full(x.shape, start) for start in (127, 0, 255))
    for step in (64, 32, 16, 8, 4, 2, 1):
        greater = x > code[pivot]
        lower_pivot, upper_pivot = np.where(greater, pivot, lower_pivot), np.where(greater, upper_pivot, pivot)
        pivot = np.where(greater, pivot + step, pivot - step)
    value, half = code[pivot], np.float32(0.5)
    up = np.where(x > (code[upper_pivot] + value) * half, upper_pivot, pivot)
    down = np.where(x < (code[lower_pivot] + value) * half, lower_pivot, pivot)
    return np.where(x > value, up, down).astype(np.uint8)


def k_quantize_blockwise(values: np.ndarray, block: int, search) -> tuple[np.ndarray, np.ndarray]:
    """Codes and absmaxes of a flat array."""
    blocks = ftz(np.pad(values.astype(np.float32), (0, -len(values) % block)).reshape(-1, block))
    absmax = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = search(ftz(blocks * ftz(1 / absmax)[:, None]))
    return codes.reshape(-1)[: len(values)], absmax


# --------------------------------------------------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """Weights with zero blocks, ties, and scales from subnormal to some whose sum is near the largest number."""
    rows, blocks = draw(st.sampled_from([(1, 1), (3, 5), (37, 7), (20, 13), (64, 9)]))
    dtype = draw(st.sampled_from(TYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low, high = draw(st.sampled_from([(0, 0), (-3, 3), (-7, 4), (-45, -36), (-45, 34), (30, 34)]))
    with np.errstate(over="ignore"):
        values = rng.normal(size=(rows, blocks * BLOCK)) * 10 ** rng.uniform(low, high, (rows, 1))
        if draw(st.booleans()):  # a block that is a power of two times the boundaries themselves
            values[0, :BLOCK] = np.resize((CODES[:-1] + CODES[1:]) / np.float32(2), BLOCK)
            values[0, 0] = 1
        if draw(st.booleans()):
            values[rng.random(rows) < 0.3, :BLOCK] = 0
        values = values.astype(dtype)
    return np.where(np.isfinite(values.astype(np.float32)), values, np.ones((), dtype))


@settings(max_examples=100, deadline=None)
@given(weight=weights())
def test_every_byte_is_what_the_cuda_kernels_store(weight):
    found = quantized(weight)
    codes, absmax = k_quantize_blockwise(weight.ravel(), BLOCK, d_quantize_nf4)
    np.testing.assert_array_equal(unpacked(found.packed).ravel(), codes)
    offset = np.float32(math.fsum(absmax.tolist())) * (np.float32(1) / np.float32(len(absmax)))
    # Where the rounding errors of a sum are subnormal they are lost.
    np.testing.assert_array_max_ulp(np.asarray(found.offset), ftz(offset), maxulp=0 if offset > 1e-30 else 4)
    absmax_codes, nested_absmax = k_quantize_blockwise(absmax - found.offset, 256, d_quantize)
    np.testing.assert_array_equal(found.nested_absmax, nested_absmax)
    np.testing.assert_array_equal(found.absmax_codes.ravel(), absmax_codes)


def test_a_tie_between_two_scales_goes_to_the_even_code_as_in_the_kernels_search():
    boundaries = (dynamic_map()[:-1] + dynamic_map()[1:]) / np.float32(2)
    values = np.concatenate([[np.float32(1)], boundaries])
    found, _ = quantize_absmax(jnp.asarray(values), jnp.float32(0))
    np.testing.assert_array_equal(found, d_quantize(values))
    assert (np.asarray(found)[1:] % 2 == 0).all()


@pytest.mark.parametrize(("bits", "sensitive"), [(7, 0), (10, 1)], ids=["bf16", "fp16"])
def test_the_last_bit_of_the_kernels_reciprocal_decides_no_code_of_a_bf16_weight(bits, sensitive):
    """``rcp.approx`` is within one unit of 1/absmax; every pair of mantissas is tried (one pair of fp16's is sensitive)."""
    mantissas = np.arange(2**bits, 2 ** (bits + 1)).astype(np.float32)
    values = np.outer(2.0 ** -np.arange(7), mantissas).astype(np.float32).ravel()
    values = np.concatenate([values, -values])
    found = 0
    for absmax in mantissas:
        inside = values[np.abs(values) <= absmax]
        exact = np.float32(1) / absmax
        nearby = [d_quantize_nf4(inside * np.nextafter(exact, np.float32(side))) for side in (0, 1)]
        found += np.count_nonzero((nearby[0] != nearby[1]) | (d_quantize_nf4(inside * exact) != nearby[0]))
    assert found == sensitive


@settings(max_examples=60, deadline=None)
@given(count=st.sampled_from([1, 2, 3, 100, 1000, 4097]), spread=st.floats(0, 6), seed=st.integers(0, 2**32))
def test_the_mean_of_the_scales_is_the_exact_sum_rounded_once(count, spread, seed):
    values = np.exp(spread * np.random.default_rng(seed).normal(size=count)).astype(np.float32)
    expected = np.float32(math.fsum(values.tolist())) * (np.float32(1) / np.float32(count))
    assert compiled(absmax_mean)(values) == expected


def test_rows_quantize_alone_as_they_do_in_the_whole_weight():
    weight = random_weight(2)
    packed, absmax = compiled(quantize_blocks)(weight)
    parts = [compiled(quantize_blocks)(weight[start : start + 5]) for start in range(0, len(weight), 5)]
    np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), packed)
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), absmax)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-12, 12))
def test_each_value_gets_the_nearest_code_of_its_block(seed, exponent):
    weight = random_weight(seed, 2.0**exponent)
    blocks = weight.reshape(-1, BLOCK).astype(np.float64)
    normal = blocks / np.abs(blocks).max(axis=1, keepdims=True)
    best = np.abs(normal[:, :, None] - CODES.astype(np.float64)).min(axis=-1)
    chosen = CODES[unpacked(quantized(weight).packed)].reshape(-1, BLOCK)
    np.testing.assert_allclose(np.abs(normal - chosen), best, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-12, 12))
def test_double_quantization_keeps_scales_within_half_a_step(seed, exponent):
    weight = random_weight(seed, 2.0**exponent)
    absmax = np.abs(weight.reshape(32, -1, BLOCK)).max(axis=-1)
    largest = np.abs(absmax - absmax.mean()).max()
    widest_step = np.diff(dynamic_map()).max()
    assert np.abs(np.asarray(quantized(weight).scales()) - absmax).max() <= 0.51 * widest_step * largest


def test_the_first_value_of_a_pair_is_in_the_high_half_of_its_byte():
    weight = np.zeros((1, BLOCK), np.float32)
    weight[0, 0], weight[0, 1] = 1.0, -1.0
    assert np.asarray(quantized(weight).packed)[0, 0] == 0xF0


def test_a_tie_goes_to_the_lower_code():
    weight = np.full((1, BLOCK), 1.0, np.float32)
    weight[0, 1:16] = (CODES[:-1] + CODES[1:]) / np.float32(2)
    np.testing.assert_array_equal(unpacked(quantized(weight).packed)[0, 1:16], np.arange(15))


def test_an_all_zero_block_is_code_0_as_on_cuda_and_comes_back_as_the_error_of_its_scale():
    weight = random_weight(0)
    weight[3, :BLOCK] = 0
    parts = quantized(weight)
    np.testing.assert_array_equal(unpacked(parts.packed)[3, :BLOCK], 0)
    back = parts.dequantize(jnp.float32)
    scale = float(parts.scales()[3, 0])
    np.testing.assert_array_equal(back[3, :BLOCK], np.float32(-scale))
    assert abs(scale) < 0.01 * float(parts.offset)


def test_a_weight_of_zeros_comes_back_as_zeros():
    np.testing.assert_array_equal(quantized(np.zeros((4, 64), np.float32)).dequantize(jnp.float32), 0)


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_shows(wrong, kind):
    weight = random_weight(0)
    assert kind.quantize(weight).finite()
    weight[5, 7] = wrong
    assert not kind.quantize(weight).finite()


def test_every_setting_has_its_kind_whose_fields_are_its_parts():
    assert ["none", *KINDS] == ["none", *PACKINGS] == list(get_args(Quantization))
    for kind in KINDS.values():
        assert [field.name for field in fields(kind)] == list(kind.parts)


@pytest.mark.parametrize("name", KINDS)
def test_the_bytes_that_are_planned_for_are_those_of_the_arrays(name):
    arrays = jax.tree.leaves(KINDS[name].shapes(64, 256 * BLOCK))
    assert PACKINGS[name].bytes_of(64 * 256 * BLOCK) == sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


@pytest.mark.parametrize("kind", KINDS.values())
def test_the_parts_have_the_declared_shapes(kind):
    weight = compiled(kind.quantize)(np.ones((20, 320), np.float32))  # a block of absmaxes is not full
    declared = kind.shapes(20, 320)
    for found, part in zip(jax.tree.leaves(weight), jax.tree.leaves(declared), strict=True):
        assert (found.shape, found.dtype) == (part.shape, part.dtype)


@pytest.mark.parametrize("dtype", TYPES[1:])
def test_sixteen_bit_weights_quantize_as_the_same_values_in_fp32(dtype):
    weight = random_weight(1).astype(dtype)
    jax.tree.map(np.testing.assert_array_equal, quantized(weight), quantized(weight.astype(np.float32)))


@pytest.mark.parametrize("dtype", TYPES[1:])
def test_a_dequantized_weight_is_the_fp32_product_rounded_once(dtype):
    parts = quantized(random_weight(4))
    exact = compiled(partial(NF4Weight.dequantize, dtype=jnp.float32))(parts)
    for compute in (partial(NF4Weight.dequantize, dtype=dtype), compiled(partial(NF4Weight.dequantize, dtype=dtype))):
        np.testing.assert_array_equal(np.asarray(compute(parts)), np.asarray(exact).astype(dtype))


def test_a_width_that_is_no_multiple_of_a_block_is_refused():
    with pytest.raises(UserError, match="96"):
        NF4Weight.quantize(jnp.ones((8, 96)))


def test_a_block_beyond_the_range_of_normal_reciprocals_is_all_zero_codes_as_on_cuda():
    weight = random_weight(0)
    weight[2, 3] = 1e38  # its reciprocal is subnormal, and flushed
    parts = quantized(weight)
    assert (unpacked(parts.packed)[2, :BLOCK] == 7).all()
    codes, _ = k_quantize_blockwise(weight.ravel(), BLOCK, d_quantize_nf4)
    np.testing.assert_array_equal(unpacked(parts.packed).ravel(), codes)
