"""NF4 codes where they are decided: values on the boundary between two codes and one unit to either side of it.

Random weights hardly ever lie there, so they do not tell a tie that goes to the wrong code, or a division where bitsandbytes
multiplies with the reciprocal.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import torch
from bitsandbytes import functional as bnb

from jax_medllm.model.nf4 import CODES
from jax_medllm.model.quantized_weight import NF4Weight
from tests.forced_devices import OPTIMIZED

compiled = partial(jax.jit, compiler_options=OPTIMIZED)

BOUNDARIES = (CODES[:-1] + CODES[1:]) / np.float32(2)


def on_boundaries(absmax: np.ndarray) -> np.ndarray:
    """A block for each absmax: the largest value, and each boundary times it, rounded down, to nearest and up."""
    products = np.outer(absmax, BOUNDARIES)
    around = [np.nextafter(products, np.float32(-np.inf)), products, np.nextafter(products, np.float32(np.inf))]
    blocks = np.zeros((len(absmax), 64), np.float32)
    blocks[:, 0] = absmax
    blocks[:, 1:46] = np.concatenate(around, axis=1)
    return blocks


def check_codes(weight: np.ndarray) -> None:
    packed, _ = bnb.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4", compress_statistics=False)
    np.testing.assert_array_equal(compiled(NF4Weight.quantize)(weight).packed, packed.numpy().reshape(len(weight), -1))


def test_a_value_between_two_codes_goes_where_bitsandbytes_puts_it():
    weight = on_boundaries(np.exp2(np.arange(-8, 8)).astype(np.float32))
    assert np.isin(weight / weight[:, :1], BOUNDARIES).sum() == weight.shape[0] * len(BOUNDARIES), "ties, exactly"
    check_codes(weight)


def test_values_next_to_a_boundary_are_multiplied_with_the_reciprocal_as_in_bitsandbytes():
    absmax = np.random.default_rng(0).uniform(0.01, 2, 512).astype(np.float32)
    weight = on_boundaries(absmax)
    ways = weight * (1 / weight[:, :1]), weight / weight[:, :1]
    codes = [np.searchsorted(BOUNDARIES, values) for values in ways]
    assert np.count_nonzero(codes[0] != codes[1]) > 1000, "dividing would give other codes"
    check_codes(weight)
