"""NF4 against bitsandbytes on the CPU: codes, scales, dequantized weights, and whole models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from jax_medllm.nf4 import NF4Weight, dequantize, dynamic_map, quantize, quantize_absmax
from jax_medllm.weights import load_model, model_tensors, read_model
from medllm.config import ModelConfig
from medllm.model_directory import ModelDirectory
from medllm_parity.oracle import row_logits
from medllm_parity.tolerances import FLOAT32_FORWARD, NF4_OWN_SCALES
from parity_tests.test_model import jax_loss, rows
from torch_ref.model import open_model

TYPES = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16}
# The widths of Qwen2.5's layers as blocks a row: even, odd, and with a last block of absmaxes that is not full.
SHAPES = [(128, 896), (96, 320), (512, 1024)]


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
    arrays = [jnp.asarray(part.numpy()) for part in parts]
    rows = value.shape[0]
    ours = NF4Weight(arrays[0].reshape(rows, -1), arrays[1].reshape(rows, -1), arrays[2], arrays[3])
    return ours, single.absmax.numpy(), packed, state


def nearest_by_table(absmax: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """What bitsandbytes does on a CPU instead of searching: a table of 65,536 codes over [-1, 1]."""
    blocks = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
    normal = np.clip(blocks * (1 / np.abs(blocks).max(axis=1, keepdims=True)), -1, 1).reshape(-1)[: len(absmax)]
    entries = np.searchsorted(boundaries(), np.linspace(-1, 1, 65536).astype(np.float32))
    half, last = np.float32(0.5), np.float32(65535)
    return entries[((normal + np.float32(1)) * half * last + half).astype(np.int64)]


def boundaries() -> np.ndarray:
    """Midpoints of the dynamic map."""
    return (dynamic_map()[:-1] + dynamic_map()[1:]) / np.float32(2)


def test_the_dynamic_map_is_bitsandbytes_own():
    np.testing.assert_array_equal(dynamic_map(), bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_equal_bitsandbytes(shape, dtype):
    theirs, given = weight(shape, dtype)
    expected, absmax, _, state = quantized_by_bitsandbytes(theirs)
    found = jax.jit(quantize)(given)
    np.testing.assert_array_equal(found.packed, expected.packed)
    # The mean of the absmaxes is the one figure whose last bit depends on the order of a sum.
    np.testing.assert_allclose(found.offset, expected.offset, rtol=3e-7)
    codes, nested_absmax = quantize_absmax(jnp.asarray(absmax), expected.offset)
    np.testing.assert_array_equal(nested_absmax, expected.nested_absmax)
    differ = np.asarray(codes) != np.asarray(expected.absmax_codes).ravel()
    np.testing.assert_array_equal(nearest_by_table(absmax, state.offset.numpy()), np.asarray(expected.absmax_codes).ravel())
    # Exact search against the CPU's table: the distance to the absmax is never larger than with bitsandbytes' code.
    spread = np.repeat(np.asarray(nested_absmax), 256)[: len(absmax)]
    centred = absmax - state.offset.numpy()
    ours = np.abs(dynamic_map()[np.asarray(codes)] * spread - centred)
    table = np.abs(dynamic_map()[np.asarray(expected.absmax_codes).ravel()] * spread - centred)
    assert (ours[differ] <= table[differ] * (1 + 1e-5)).all()
    assert differ.mean() < 0.01


def test_scales_take_the_nearest_code_and_the_cpu_table_accounts_for_every_difference():
    values = np.random.default_rng(0).uniform(-1, 1, (256, 256)).astype(np.float32)
    values[:, 0] = 1  # so that nothing is rescaled
    found, _ = quantize_absmax(jnp.asarray(values.ravel()), jnp.float32(0))
    theirs, _ = bnb.quantize_blockwise(torch.from_numpy(values).ravel(), blocksize=256)
    np.testing.assert_array_equal(found, np.searchsorted(boundaries(), values.ravel(), side="left"))
    np.testing.assert_array_equal(nearest_by_table(values.ravel(), np.float32(0)), theirs.numpy())
    assert 0 < np.count_nonzero(np.asarray(found) != theirs.numpy()) < 256


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantized_weights_equal_bitsandbytes_bit_for_bit(shape, dtype):
    theirs, _ = weight(shape, dtype)
    parts, _, packed, state = quantized_by_bitsandbytes(theirs)
    expected = bnb.dequantize_4bit(packed, state).float().numpy()
    for compute in (dequantize, jax.jit(dequantize, static_argnums=1)):
        np.testing.assert_array_equal(np.asarray(compute(parts, TYPES[dtype]), np.float32), expected)


def test_a_bitsandbytes_directory_loads_bit_for_bit_and_has_pefts_logits(tiny_model, tiny_adapter, tmp_path):
    base = tiny_model(kv_heads=4)
    adapter = tiny_adapter(base)
    stock = open_model(ModelConfig(path=str(base), quantization="nf4", dtype="float32"))
    stock.save_pretrained(tmp_path / "packed")
    reference = open_model(ModelConfig(str(base), adapter=str(adapter), quantization="nf4", dtype="float32"))
    model = load_model(ModelConfig(str(tmp_path / "packed"), adapter=str(adapter), quantization="nf4", dtype="float32"))

    dense = dict(model_tensors(read_model(ModelDirectory(tmp_path / "packed"), quantization="nf4")))
    for name, module in stock.named_modules():
        if f"{name}.weight" in dense and hasattr(module.weight, "quant_state"):
            expected = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            np.testing.assert_array_equal(dense[f"{name}.weight"], expected.numpy())

    tokens, segment_ids, positions = rows()
    real = segment_ids != 0
    with torch.no_grad():
        expected = row_logits(reference, tokens, segment_ids, positions).numpy()
    _, logits = jax_loss(model, tokens, segment_ids, positions)
    FLOAT32_FORWARD.check(logits[real], expected[real], "logits")


def test_a_model_quantized_here_has_the_logits_of_one_quantized_by_bitsandbytes(tiny_model):
    config = ModelConfig(str(tiny_model(layers=3)), quantization="nf4", dtype="float32")
    tokens, segment_ids, positions = rows()
    real = segment_ids != 0
    with torch.no_grad():
        expected = row_logits(open_model(config), tokens, segment_ids, positions).numpy()
    _, logits = jax_loss(load_model(config), tokens, segment_ids, positions)
    NF4_OWN_SCALES.check(logits[real], expected[real], "logits")
