"""The TPU kernel: its numbers in interpret mode against float64, and the tiles it leaves out."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from jax_medllm.model.attention import Visibility, pallas, using
from jax_medllm.model.attention.pallas import Tiles
from jax_medllm.model.decoder import DenseDecoder
from tests.dense_attention import Case, case, computed, expected, far_apart, in_pieces, sees
from tests.small_model import small_config

CUTS = [
    pytest.param(96, 16, 32, id="tiles of more keys"),
    pytest.param(101, 32, 16, id="tiles of more queries, rows that do not divide"),
    pytest.param(13, 16, 16, id="one tile"),
]


def in_tiles(queries: int, keys: int):
    """The kernel in interpret mode."""
    return lambda *inputs: pallas.attend(*inputs, Tiles(queries, keys, interpret=True))


@pytest.mark.parametrize("groups", [False, True], ids=["packed", "groups"])
@pytest.mark.parametrize(("length", "queries", "keys"), CUTS)
def test_the_kernel_equals_the_dense_computation_in_float64(length, queries, keys, groups):
    given = case(length, heads=6, kv_heads=2, width=16, groups=groups)
    with jax.enable_x64(True):
        found = computed(in_tiles(queries, keys), given, "float64")
    assert max(far_apart(found, expected(given)).values()) < 1e-13


@pytest.mark.parametrize("groups", [False, True], ids=["packed", "groups"])
@pytest.mark.parametrize(("queries", "keys", "pieces"), [(16, 32, 2), (16, 16, 4), (32, 16, 4)])
def test_pieces_of_a_row_equal_the_dense_computation_in_float64(queries, keys, pieces, groups):
    given = case(96, heads=4, kv_heads=2, width=8, groups=groups)
    with jax.enable_x64(True):
        found = computed(in_pieces(in_tiles(queries, keys), 96, pieces), given, "float64")
    assert max(far_apart(found, expected(given)).values()) < 1e-13


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_the_kernel_accumulates_in_fp32(dtype, allowed):
    given = case(100, heads=4, kv_heads=2, width=16, groups=True)
    assert max(far_apart(computed(in_tiles(16, 32), given, dtype), expected(given)).values()) < allowed


def test_every_head_may_have_its_own_keys():
    given = case(50, heads=2, kv_heads=2, width=8, groups=True)
    assert max(far_apart(computed(in_tiles(16, 16), given, "float32"), expected(given)).values()) < 2e-6


def test_large_scores_do_not_overflow():
    given = case(64, heads=2, kv_heads=1, width=8, groups=False)
    given = replace(given, q=given.q * 40, k=given.k * 40)
    with jax.enable_x64(True):
        found = computed(in_tiles(16, 16), given, "float64")
    assert max(far_apart(found, expected(given)).values()) < 1e-11, "exp overflows at 710"


def visited(given: Case, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
    """[b, i, j]: the tiles that the kernel computes, and those in which somebody sees somebody."""
    visible = Visibility(*(None if ids is None else jnp.asarray(ids) for ids in (given.segments, given.parents)))
    b, s = given.segments.shape
    rows = pallas._Rows.of(visible, tiles, s)
    shape = (b, s // tiles.queries, s // tiles.keys)
    computed_there = np.asarray(rows.keys_held[:-1]).reshape(shape) == np.arange(shape[2])
    by_keys = np.asarray(rows.queries_held[:-1]).reshape(b, shape[2], shape[1]) == np.arange(shape[1])
    np.testing.assert_array_equal(computed_there, by_keys.swapaxes(1, 2))
    return computed_there, sees(given).reshape(b, shape[1], tiles.queries, shape[2], tiles.keys).any((2, 4))


@pytest.mark.parametrize("groups", [False, True], ids=["packed", "groups"])
@pytest.mark.parametrize(("queries", "keys"), [(8, 32), (32, 8), (8, 8)])
def test_no_tile_is_left_out_in_which_somebody_is_seen(queries, keys, groups):
    computed_there, needed = visited(case(192, 1, 1, 1, groups), Tiles(queries, keys))
    assert (computed_there >= needed).all()
    assert computed_there.sum() < 0.6 * computed_there.size


def test_documents_of_whole_tiles_cost_their_own_triangles_alone():
    segments = np.repeat(np.arange(1, 5), 32)[None].astype(np.int32)
    nothing = np.zeros((1, 128, 1, 1))
    computed_there, needed = visited(Case(nothing, nothing, nothing, nothing, segments, None), Tiles(16, 16))
    np.testing.assert_array_equal(computed_there, needed)
    assert needed.sum() == 4 * 3


def test_a_tile_that_is_left_out_is_not_fetched_either():
    """The table names, for a step that computes nothing, a tile that is there already or that will be needed first."""
    held = np.asarray(pallas._held(jnp.array([[[False, True, False, True, False], [True, False, False, False, False]]])))
    np.testing.assert_array_equal(held.reshape(2, 5), [[1, 1, 1, 3, 3], [0, 0, 0, 0, 0]])


def test_the_model_computes_the_same_with_the_kernel():
    """Through the whole model, in the TPU's own interpreter, which knows its memories and its copies."""
    model = DenseDecoder(small_config(), rngs=nnx.Rngs(0))
    given = case(24, 1, 1, 1, groups=True)
    tokens = jnp.arange(48).reshape(2, 24) % 53
    rows = {"segment_ids": given.segments, "parent_ids": given.parents, "positions": tokens % 24}
    expected_hidden = model.hidden(tokens, **rows)
    with using("pallas"), pltpu.force_tpu_interpret_mode():
        hidden = model.hidden(tokens, **rows)
    np.testing.assert_allclose(hidden, expected_hidden, atol=2e-5)
