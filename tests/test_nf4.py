"""NF4: what quantization may and may not change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_medllm.nf4 import BLOCK, CODES, dequantize, dequantize_absmax, dynamic_map, quantize, weight_shapes
from medllm.errors import UserError

quantized = jax.jit(quantize)


def random_weight(seed: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(32, 128))).astype(np.float32)


def unpacked(packed: jax.Array) -> np.ndarray:
    pairs = np.asarray(packed)
    return np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(pairs.shape[0], -1)


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
    assert np.abs(np.asarray(dequantize_absmax(quantized(weight))) - absmax).max() <= 0.51 * widest_step * largest


def test_the_first_value_of_a_pair_is_in_the_high_half_of_its_byte():
    weight = np.zeros((1, BLOCK), np.float32)
    weight[0, 0], weight[0, 1] = 1.0, -1.0
    assert np.asarray(quantized(weight).packed)[0, 0] == 0xF0


def test_a_tie_goes_to_the_lower_code():
    weight = np.full((1, BLOCK), 1.0, np.float32)
    weight[0, 1:16] = (CODES[:-1] + CODES[1:]) / np.float32(2)
    np.testing.assert_array_equal(unpacked(quantized(weight).packed)[0, 1:16], np.arange(15))


def test_an_all_zero_block_stays_zero():
    weight = random_weight(0)
    weight[3, :BLOCK] = 0
    back = dequantize(quantized(weight), jnp.float32)
    np.testing.assert_array_equal(back[3, :BLOCK], 0)
    assert np.isfinite(back).all()
    np.testing.assert_array_equal(dequantize(quantized(np.zeros((4, 64), np.float32)), jnp.float32), 0)


def test_the_parts_have_the_declared_shapes():
    weight = quantized(np.ones((20, 320), np.float32))  # 100 blocks: the block of absmaxes is not full
    declared = weight_shapes(20, 320)
    for found, part in zip(jax.tree.leaves(weight), jax.tree.leaves(declared), strict=True):
        assert (found.shape, found.dtype) == (part.shape, part.dtype)


def test_bf16_weights_quantize_as_the_same_values_in_fp32():
    weight = jnp.asarray(random_weight(1), jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, quantized(weight), quantized(weight.astype(jnp.float32)))


def test_a_width_that_is_no_multiple_of_a_block_is_refused():
    with pytest.raises(UserError, match="96"):
        quantize(jnp.ones((8, 96)))
