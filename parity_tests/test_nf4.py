"""NF4 against bitsandbytes on the CPU: codes, scales, dequantized weights. Directories are in ``test_nf4_directories.py``.

The JAX engine follows the CUDA kernels, :mod:`parity_tests.bitsandbytes_cpu` what runs here; where the two differ, the second
accounts for every byte.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from jax_medllm.model.nf4 import dynamic_map, quantize_absmax, quantize_blocks
from jax_medllm.model.quantized_weight import NF4Weight, SingleNF4Weight
from parity_tests import bitsandbytes_cpu
from tests.forced_devices import OPTIMIZED

compiled = partial(jax.jit, compiler_options=OPTIMIZED)

TYPES = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}
# Blocks a row even and odd, a number of rows that is odd, and a last block of absmaxes that is not full.
SHAPES = [(128, 896), (97, 320), (512, 1024)]


@pytest.fixture
def threads():
    """``threads(n)`` sets torch's number of threads for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def weight(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, jax.Array]:
    """The same random weight for both sides, with an all-zero block and values of very different size."""
    value = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    value *= torch.logspace(-4, 1, shape[0])[:, None]
    value[3, :64] = 0
    value = value.to(dtype)
    return value, jnp.asarray(value.float().numpy(), TYPES[dtype])


def quantized_by_bitsandbytes(value: torch.Tensor) -> tuple[NF4Weight, np.ndarray, torch.Tensor, bnb.QuantState]:
    """The parts of a weight bitsandbytes quantized, its absmaxes before they were quantized in turn, and its own state."""
    _, single = bnb.quantize_4bit(value, blocksize=64, quant_type="nf4", compress_statistics=False)
    packed, state = bnb.quantize_4bit(value, blocksize=64, quant_type="nf4", compress_statistics=True)
    parts = (packed, state.absmax, state.state2.absmax, state.offset)
    arrays = [part.numpy() for part in parts]
    rows = value.shape[0]
    theirs = NF4Weight(arrays[0].reshape(rows, -1), arrays[1].reshape(rows, -1), arrays[2], arrays[3])
    return theirs, single.absmax.numpy(), packed, state


def check_bytes(found: NF4Weight, expected: NF4Weight) -> None:
    for name in ("packed", "absmax_codes", "nested_absmax", "offset"):
        ours, theirs = (np.asarray(getattr(parts, name)) for parts in (found, expected))
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_the_dynamic_map_is_bitsandbytes_own():
    np.testing.assert_array_equal(dynamic_map(), bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_equal_bitsandbytes(shape, dtype):
    theirs, given = weight(shape, dtype)
    expected, absmax, _, state = quantized_by_bitsandbytes(theirs)
    found = compiled(NF4Weight.quantize)(given)
    zero = np.repeat(absmax.reshape(shape[0], -1) == 0, 32, axis=1)
    assert zero.sum() == 32
    np.testing.assert_array_equal(np.asarray(found.packed)[~zero], expected.packed[~zero])
    np.testing.assert_array_equal(np.asarray(found.packed)[zero], 0x00)
    np.testing.assert_array_equal(expected.packed[zero], 0x77)
    np.testing.assert_array_equal(compiled(quantize_blocks)(given)[1].ravel(), absmax)
    # The mean of the absmaxes is the one figure whose last bit depends on the order of a sum.
    np.testing.assert_allclose(found.offset, expected.offset, rtol=3e-7)
    codes, nested_absmax = quantize_absmax(jnp.asarray(absmax), jnp.asarray(expected.offset))
    np.testing.assert_array_equal(nested_absmax, expected.nested_absmax)
    differ = np.asarray(codes) != expected.absmax_codes.ravel()
    # Exact search against the CPU's table: the distance to the absmax is never larger than with bitsandbytes' code.
    spread = np.repeat(np.asarray(nested_absmax), 256)[: len(absmax)]
    centred = absmax - state.offset.numpy()
    ours = np.abs(dynamic_map()[np.asarray(codes)] * spread - centred)
    table = np.abs(dynamic_map()[expected.absmax_codes.ravel()] * spread - centred)
    assert (ours[differ] <= table[differ] * (1 + 1e-5)).all()
    assert differ.mean() < 0.01


def test_scales_take_the_nearest_code_and_the_cpu_table_accounts_for_every_difference():
    values = np.random.default_rng(0).uniform(-1, 1, (256, 256)).astype(np.float32)
    values[:, 0] = 1  # so that nothing is rescaled
    found, _ = quantize_absmax(jnp.asarray(values.ravel()), jnp.float32(0))
    theirs, _ = bnb.quantize_blockwise(torch.from_numpy(values).ravel(), blocksize=256)
    boundaries = (dynamic_map()[:-1] + dynamic_map()[1:]) / np.float32(2)
    np.testing.assert_array_equal(found, np.searchsorted(boundaries, values.ravel()))
    table, _ = bitsandbytes_cpu.quantize_absmax(values.ravel(), np.float32(0))
    np.testing.assert_array_equal(table, theirs.numpy())
    assert 0 < np.count_nonzero(np.asarray(found) != theirs.numpy()) < 256


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 64), (333, 64)], ids=str)
def test_the_cpu_variant_stores_bitsandbytes_bytes_offset_included(threads, shape, dtype):
    threads(1)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, shape[0])[:, None]
    value[shape[0] // 2, :64] = 0
    value = value.to(dtype)
    given = np.asarray(jnp.asarray(value.float().numpy(), TYPES[dtype]))
    check_bytes(bitsandbytes_cpu.quantize(given), quantized_by_bitsandbytes(value)[0])


def extreme_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    normal = rng.normal(size=(520, 64))
    largest, zeros = normal * 1e30, normal.copy()
    largest[0, 0], zeros[:256] = 1e38, 0  # a block of 256 absmaxes that are all the same
    sizes = np.logspace(-45, 36, 520)[:, None]
    weights = {
        "zeros": 0 * normal,
        "zero blocks": zeros,
        "equal scales": np.ones((520, 64)),
        "1e38": largest,
        "subnormal": normal * 1e-40,
        "all sizes": normal * sizes,
    }
    return {name: value.astype(np.float32) for name, value in weights.items()}


@pytest.mark.parametrize("name", extreme_weights())
def test_the_cpu_variant_stores_bitsandbytes_bytes_of_extreme_values(threads, name):
    threads(1)
    value = extreme_weights()[name]
    check_bytes(bitsandbytes_cpu.quantize(value), quantized_by_bitsandbytes(torch.from_numpy(value))[0])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_cpu_variant_sums_in_torchs_order_with_any_number_of_threads(threads, count):
    threads(count)
    rng = np.random.default_rng(count)
    for size in (*range(1, 300, 13), 1023, 1024, 4100, 32767, 32768, 32769, 65537, 100_003, 1_000_003):
        values = np.exp(rng.normal(size=size)).astype(np.float32)
        assert bitsandbytes_cpu.torch_mean(values, count) == torch.from_numpy(values).mean().item(), size


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantized_weights_equal_bitsandbytes_bit_for_bit(shape, dtype):
    theirs, _ = weight(shape, dtype)
    parts, _, packed, state = quantized_by_bitsandbytes(theirs)
    expected = bnb.dequantize_4bit(packed, state).float().numpy()
    for compute in (NF4Weight.dequantize, compiled(NF4Weight.dequantize, static_argnums=1)):
        np.testing.assert_array_equal(np.asarray(compute(parts, TYPES[dtype]), np.float32), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scales_alone_equal_bitsandbytes_bit_for_bit(shape):
    """Compiled without what comes after them: whether a compiler fuses a product with a sum depends on what is around it."""
    parts, _, _, state = quantized_by_bitsandbytes(weight(shape, torch.float32)[0])
    expected = (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).numpy().reshape(shape[0], -1)
    for compute in (NF4Weight.scales, compiled(NF4Weight.scales)):
        np.testing.assert_array_equal(compute(parts), expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_double_quantization_all_is_bitsandbytes_bit_for_bit(shape, dtype):
    theirs, given = weight(shape, dtype)
    packed, state = bnb.quantize_4bit(theirs, blocksize=64, quant_type="nf4", compress_statistics=False)
    codes, scales = (part.numpy().reshape(shape[0], -1) for part in (packed, state.absmax))
    found = compiled(SingleNF4Weight.quantize)(given)
    np.testing.assert_array_equal(found.absmax, scales)
    zero = np.repeat(scales == 0, 32, axis=1)
    assert zero.sum() == 32
    np.testing.assert_array_equal(np.where(zero, 0x77, found.packed), codes)
    dense = bnb.dequantize_4bit(packed, state).float().numpy()
    for parts in (found, SingleNF4Weight(codes, scales)):
        for compute in (SingleNF4Weight.dequantize, compiled(SingleNF4Weight.dequantize, static_argnums=1)):
            np.testing.assert_array_equal(np.asarray(compute(parts, TYPES[dtype]), np.float32), dense)


@pytest.mark.parametrize("name", ["zeros", "zero blocks", "equal scales", "1e38"])
def test_scales_of_extreme_values_without_double_quantization_equal_bitsandbytes(name):
    value = extreme_weights()[name]
    _, state = bnb.quantize_4bit(torch.from_numpy(value), blocksize=64, quant_type="nf4", compress_statistics=False)
    np.testing.assert_array_equal(compiled(SingleNF4Weight.quantize)(value).absmax.ravel(), state.absmax.numpy())
