"""Both stacks on one NVIDIA GPU: NF4 against bitsandbytes' CUDA kernels, a small model against float64 and torch on CUDA.

Two fp32 steps are the hardware's own there: bitsandbytes is compiled with an approximate reciprocal, XLA's division on a GPU
may be off by two units in the last place, and torch sums the scales in an order that depends on the device. A code may differ
where a value lies that close to the boundary between two codes, and nowhere else. No quotient of bf16 numbers lies that close.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from peft import PeftModel

from jax_medllm.model.nf4 import CODES, dynamic_map, quantize_absmax
from jax_medllm.model.quantized_weight import NF4Weight
from medllm.config import ModelConfig
from medllm.quantization import BLOCK, NESTED_BLOCK
from medllm_parity.measure import Values
from medllm_parity.tolerances import AUDIT
from parity_tests import jax_results, torch_results
from parity_tests.jax_results import Results, open_trainable
from parity_tests.oracle import float64_copy
from parity_tests.packed_rows import rows, target_mask
from torch_ref.model import open_model

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(
        jax.default_backend() != "gpu" or not torch.cuda.is_available(),
        reason="needs an NVIDIA GPU that both JAX and torch see; scripts/gpu_bench.sh runs this",
    ),
]

TYPES = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}
SHAPES = [(97, 320), (512, 1024), (1024, 4096)]
NEAR = 4 * 2.0**-23
"""Relative distance of a boundary within which two approximate reciprocals and a rounding may part."""
ZERO_ROW = 3


def weight(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, jax.Array]:
    """The same random weight on the GPU for both sides, with an all-zero block and values of very different size."""
    value = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    value *= torch.logspace(-4, 1, shape[0])[:, None]
    value[ZERO_ROW, :BLOCK] = 0
    value = value.to(dtype)
    return value.cuda(), jnp.asarray(value.float().numpy(), TYPES[dtype])


def quantized_on_cuda(value: torch.Tensor) -> tuple[NF4Weight, np.ndarray, torch.Tensor, bnb.QuantState]:
    """The parts of a weight bitsandbytes quantized, its absmaxes before they were quantized in turn, and its own state."""
    _, single = bnb.quantize_4bit(value, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    packed, state = bnb.quantize_4bit(value, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    arrays = [part.cpu().numpy() for part in (packed, state.absmax, state.state2.absmax, state.offset)]
    count = value.shape[0]
    parts = NF4Weight(arrays[0].reshape(count, -1), arrays[1].reshape(count, -1), arrays[2], arrays[3].reshape(()))
    return parts, single.absmax.cpu().numpy(), packed, state


def unpacked(packed: np.ndarray) -> np.ndarray:
    """Codes in the order of the weight, a row for each block."""
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, BLOCK)


def check_codes(ours: np.ndarray, theirs: np.ndarray, values: np.ndarray, table: np.ndarray) -> int:
    """Equal, or neighbours around a boundary that the value all but lies on. Answers how many differ."""
    differ = ours != theirs
    lower, upper = np.minimum(ours, theirs)[differ].astype(int), np.maximum(ours, theirs)[differ].astype(int)
    assert (upper == lower + 1).all(), "codes that are no neighbours"
    boundary = (table[lower].astype(np.float64) + table[upper]) / 2
    assert (np.abs(values[differ] - boundary) <= NEAR * np.abs(boundary)).all(), f"{values[differ]} are not on {boundary}"
    return int(differ.sum())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_equal_bitsandbytes_cuda_kernels(shape, dtype):
    theirs, given = weight(shape, dtype)
    expected, absmax, _, _ = quantized_on_cuda(theirs)
    ours, reference = unpacked(np.asarray(jax.jit(NF4Weight.quantize)(given).packed)), unpacked(expected.packed)
    nonzero = absmax != 0
    values = np.asarray(given, np.float64).reshape(-1, BLOCK)[nonzero] / absmax[nonzero, None]
    differing = check_codes(ours[nonzero], reference[nonzero], values, CODES)
    assert differing <= (0 if dtype == torch.bfloat16 else 1e-5 * values.size + 1)


def test_an_all_zero_block_is_code_0_as_on_cuda():
    theirs, given = weight(SHAPES[0], torch.bfloat16)
    expected, absmax, _, _ = quantized_on_cuda(theirs)
    assert np.flatnonzero(absmax == 0).tolist() == [ZERO_ROW * SHAPES[0][1] // BLOCK]
    zeros = unpacked(expected.packed)[absmax == 0]
    np.testing.assert_array_equal(unpacked(np.asarray(jax.jit(NF4Weight.quantize)(given).packed))[absmax == 0], zeros)
    assert (zeros == 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scales_equal_bitsandbytes_cuda_kernels(shape):
    theirs, given = weight(shape, torch.bfloat16)
    expected, absmax, _, _ = quantized_on_cuda(theirs)
    blocks = np.abs(np.asarray(given, np.float32).reshape(-1, BLOCK))
    np.testing.assert_array_equal(absmax, blocks.max(axis=1))
    np.testing.assert_allclose(jax.jit(NF4Weight.quantize)(given).offset, expected.offset, rtol=2.0**-23)
    codes, nested = jax.jit(quantize_absmax)(jnp.asarray(absmax), jnp.asarray(expected.offset))
    np.testing.assert_array_equal(nested, expected.nested_absmax)
    spread = np.repeat(np.asarray(nested, np.float64), NESTED_BLOCK)[: absmax.size]
    values = (absmax - expected.offset).astype(np.float64) / spread
    assert check_codes(np.asarray(codes), expected.absmax_codes.ravel(), values, dynamic_map()) <= 1 + absmax.size // 1000


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantized_weights_equal_bitsandbytes_cuda_bit_for_bit(shape, dtype):
    theirs, _ = weight(shape, dtype)
    parts, _, packed, state = quantized_on_cuda(theirs)
    expected = bnb.dequantize_4bit(packed, state).float().cpu().numpy()
    found = jax.jit(NF4Weight.dequantize, static_argnums=1)(jax.tree.map(jnp.asarray, parts), TYPES[dtype])
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


def quantities(results: Results, segment_ids: np.ndarray) -> dict[str, np.ndarray]:
    """What is compared, of real tokens only."""
    real = segment_ids != 0
    states = {f"residual stream after {layer} layers": state[real] for layer, state in enumerate(results.states)}
    logprobs = results.logprobs[target_mask(segment_ids)]
    return {**states, "logits": results.logits[real], "log-probabilities": logprobs, **results.gradients}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", AUDIT)
def test_a_small_model_is_no_further_from_float64_than_torch_on_cuda(tiny_model, nf4_model, tiny_adapter, dtype, quantization):
    kind = getattr(torch, dtype)
    path, dense = nf4_model(kind) if quantization == "nf4" else (tiny_model(kind), tiny_model(kind))
    adapter, inputs = tiny_adapter(dense), rows()
    stock = open_model(ModelConfig(str(path), quantization=quantization, dtype=dtype))
    truth = torch_results.forward_and_backward(float64_copy(stock, adapter, trainable=True), inputs)
    theirs = torch_results.forward_and_backward(PeftModel.from_pretrained(stock, adapter, is_trainable=True), inputs)
    ours = jax_results.forward_and_backward(open_trainable(path, adapter, getattr(jnp, dtype), quantization), inputs)
    found, reference, expected = (quantities(one, inputs[1]) for one in (ours, theirs, truth))
    assert found.keys() == expected.keys() == reference.keys()
    for name, value in expected.items():
        error, allowed, _ = Values(found[name], reference[name], value).errors()
        assert allowed <= AUDIT[dtype].ceiling, f"{name}: torch is off by {allowed:.3g}"
        bound = AUDIT[dtype].tolerance(allowed)
        assert error <= bound, f"{name}: {error:.3g} > {bound:.3g}, torch has {allowed:.3g}"
