"""NF4 as bitsandbytes 0.50 quantizes it on a CPU: the variant for comparisons made on a machine without CUDA.

:mod:`jax_medllm.model.nf4` follows the CUDA kernels. On a CPU bitsandbytes computes something else in three places, all of
which are followed here to the last bit:

- an all-zero block is stored as code 7, the zero, where CUDA stores code 0, and subnormal numbers are numbers;
- scales are not searched in the dynamic map but looked up in a table of 65,536 entries, which misses the nearest code for
  106 of its inputs;
- their mean is torch's, whose last bits depend on the order of a sum: the cascade of ``aten/native/cpu/SumKernel.cpp``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jax_medllm.model.nf4 import CODES, dynamic_map
from jax_medllm.model.quantized_weight import NF4Weight
from medllm.quantization import BLOCK, NESTED_BLOCK

_LANES = 8  # of an AVX2 vector: torch compiles this sum for no wider one
_INTERLEAVED = 4  # vectors summed side by side
_LEVELS = 4
_THREAD_GRAIN = 32768  # numbers from which torch gives threads a share each
_TABLE = 65536


def quantize(weight: Float[np.ndarray, "out in"], threads: int = 1) -> NF4Weight:
    """Quantize a weight of fp32, bf16 or fp16 whose input width is a multiple of 64.

    Args:
        weight: The values.
        threads: ``torch.get_num_threads()`` of the process to be matched.
    """
    rows, width = weight.shape
    blocks = weight.astype(np.float32).reshape(rows, width // BLOCK, BLOCK)
    absmax = np.abs(blocks).max(axis=-1)
    reciprocal = np.float32(1) / np.maximum(absmax, np.float32(1e-38))
    values = np.clip(blocks * reciprocal[..., None], -1, 1).reshape(rows, width)
    codes = np.searchsorted(_midpoints(CODES), values).astype(np.uint8)
    offset = torch_mean(absmax.reshape(-1), threads)
    absmax_codes, nested_absmax = quantize_absmax(absmax.reshape(-1), offset)
    return NF4Weight(codes[:, 0::2] << 4 | codes[:, 1::2], absmax_codes.reshape(absmax.shape), nested_absmax, offset)


def quantize_absmax(
    absmax: Float[np.ndarray, " n"], offset: np.float32
) -> tuple[UInt8[np.ndarray, " n"], Float[np.ndarray, " nested_blocks"]]:
    """Second quantization: codes from the table and the scale of each block of 256."""
    count = len(absmax)
    blocks = np.pad(absmax - offset, (0, -count % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested_absmax = np.abs(blocks).max(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values = np.clip(blocks * (np.float32(1) / nested_absmax)[:, None], -1, 1)
    shifted = (np.nan_to_num(values, nan=-1) + np.float32(1)) * np.float32(0.5)
    # float64 and back stands for the fused multiply-add the library is compiled to.
    index = (shifted.astype(np.float64) * (_TABLE - 1) + 0.5).astype(np.float32).astype(np.int64)
    return _table()[index].reshape(-1)[:count], nested_absmax


def torch_mean(values: Float[np.ndarray, " n"], threads: int = 1) -> Any:
    """``torch.tensor(values).mean()`` of an fp32 tensor on a CPU with AVX2 or AVX-512, to the bit."""
    count = len(values)
    shares = min(threads, -(-count // _THREAD_GRAIN)) if count >= _THREAD_GRAIN else 1
    share = -(-count // shares)
    partial = [_cascade_sum(values[start : start + share]) for start in range(0, count, share)]
    # Threads without a share add their zero.
    total = _cascade_sum(np.array(partial + [0] * (threads - len(partial)), np.float32)) if shares > 1 else partial[0]
    return total / np.float32(count)


def _cascade_sum(values: Float[np.ndarray, " n"]) -> Any:
    """``vectorized_inner_sum``: the lanes of one vector, after the numbers that fill no vector."""
    vectors = len(values) // _LANES
    lanes = _row_sum(values[: vectors * _LANES].reshape(vectors, _LANES))
    return _in_order(np.concatenate([values[vectors * _LANES :], lanes]))


def _row_sum(vectors: Float[np.ndarray, "n lanes"]) -> Float[np.ndarray, " lanes"]:
    """``row_sum``: four interleaved cascades, the vectors left over added to the first of them."""
    rows = len(vectors) // _INTERLEAVED
    whole = rows * _INTERLEAVED
    sums = _cascade(vectors[:whole].reshape(rows, _INTERLEAVED, _LANES))
    first = _in_order(np.concatenate([sums[:1], vectors[whole:]]))
    return _in_order(np.concatenate([first[None], sums[1:]]))


def _cascade(rows: Float[np.ndarray, "n *shape"]) -> Float[np.ndarray, "*shape"]:
    """``multi_row_sum``: groups of ``step`` rows, groups of such sums, … up to the last level, which takes all there are."""
    step = 1 << max(4, (len(rows) - 1).bit_length() // _LEVELS)
    levels = []
    for _ in range(_LEVELS - 1):
        groups = len(rows) // step
        levels.append(_in_order(rows[groups * step :]))
        rows = _in_order(rows[: groups * step].reshape(groups, step, *rows.shape[1:]).swapaxes(0, 1))
    return _in_order(np.stack([*levels, _in_order(rows)]))


def _in_order(terms: Float[np.ndarray, "n *shape"]) -> Float[np.ndarray, "*shape"]:
    """The sum over the first axis, one addition after the other; numpy's own sum goes pairwise."""
    return np.cumsum(terms, axis=0, dtype=np.float32)[-1] if len(terms) else np.zeros(terms.shape[1:], np.float32)


@cache
def _table() -> UInt8[np.ndarray, " 65536"]:
    """The nearest code, in the dynamic map, of 65,536 numbers spread over [-1, 1]."""
    return np.searchsorted(_midpoints(dynamic_map()), np.linspace(-1, 1, _TABLE).astype(np.float32)).astype(np.uint8)


def _midpoints(table: np.ndarray) -> np.ndarray:
    return (table[:-1] + table[1:]) / np.float32(2)
