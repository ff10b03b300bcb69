"""Attention and its gradients in float64, written with numpy from the formulas; the rows it is compared on, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_medllm.model.attention import Visibility

NAMES = ["output", "gradient of q", "gradient of k", "gradient of v"]


@dataclass(frozen=True)
class Case:
    """Inputs of a row batch: queries, keys, values, the cotangent of the output, segments and, in groups, parents."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    cotangent: np.ndarray
    segments: np.ndarray
    parents: np.ndarray | None


def packed(length: int) -> tuple[np.ndarray, None]:
    """Two rows: documents of unequal length and padding at the end; one document that fills the row."""
    rng = np.random.default_rng(length)
    cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
    segments = 1 + np.searchsorted(cuts, np.arange(length), side="right")
    return np.stack([np.where(segments == 4, 0, segments), np.ones(length, int)]).astype(np.int32), None


def grouped(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Two rows: a prompt with three responses, padded; two problems of one and two responses with padding on the left."""
    at = np.arange(length) * 12 // length
    first = np.array([1, 1, 1, 1, 2, 2, 3, 3, 3, 4, 0, 0])[at]
    second = np.array([0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])[at]
    parents = [np.where(first > 1, 1, 0), np.array([0, 0, 1, 0, 3, 3])[second]]
    return np.stack([first, second]).astype(np.int32), np.stack(parents).astype(np.int32)


def case(length: int, heads: int, kv_heads: int, width: int, groups: bool, seed: int = 0) -> Case:
    """Random numbers of unit variance on the rows of :func:`packed` or :func:`grouped`."""
    rng = np.random.default_rng(seed)
    segments, parents = grouped(length) if groups else packed(length)
    shapes = [(2, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return Case(*(rng.standard_normal(shape) for shape in shapes), segments, parents)


def sees(given: Case) -> np.ndarray:
    """[b, s, s], token by token: its own segment and its parent's, itself and what is before it."""
    b, s = given.segments.shape
    seen = np.zeros((b, s, s), bool)
    for row in range(b):
        for token in range(s):
            wanted = {int(given.segments[row, token])}
            if given.parents is not None and given.parents[row, token] != 0:
                wanted.add(int(given.parents[row, token]))
            seen[row, token, : token + 1] = np.isin(given.segments[row, : token + 1], list(wanted))
    return seen


def expected(given: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The output, and the gradients of ``sum(output * cotangent)`` by q, k and v.

    P = softmax(QKᵀ/√x), O = PV; dV = PᵀdO, dS = P ∘ (dOVᵀ − rowsum(dO ∘ O)), dQ = dS K/√x, dK = dSᵀ Q/√x.
    """
    q, k, v, upstream = (np.moveaxis(part.astype(np.float64), 2, 1) for part in (given.q, given.k, given.v, given.cotangent))
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat(share, 1), v.repeat(share, 1)
    scale = 1 / np.sqrt(q.shape[-1])
    scores = np.where(sees(given)[:, None], q @ k.swapaxes(-1, -2) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    slope = weights * (upstream @ v.swapaxes(-1, -2) - (upstream * out).sum(-1, keepdims=True)) * scale
    of_keys = [weights.swapaxes(-1, -2) @ upstream, slope.swapaxes(-1, -2) @ q]
    of_v, of_k = (part.reshape(len(q), -1, share, *part.shape[2:]).sum(2) for part in of_keys)
    return tuple(np.moveaxis(part, 1, 2) for part in (out, slope @ k, of_k, of_v))  # type: ignore[return-value]


def computed(attend: Callable, given: Case, dtype: str) -> list[np.ndarray]:
    """The output and the gradients of ``sum(output * cotangent)`` by q, k and v, in float64."""
    visible = Visibility(jnp.asarray(given.segments), None if given.parents is None else jnp.asarray(given.parents))

    @jax.jit
    def run(q, k, v, cotangent):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, visible), q, k, v)
        return out, *pull(cotangent)

    arrays = (jnp.asarray(part, dtype) for part in (given.q, given.k, given.v, given.cotangent))
    return [np.asarray(part, np.float64) for part in run(*arrays)]


def in_pieces(attend_piece: Callable, length: int, pieces: int) -> Callable:
    """Attention of a row's queries, piece by piece, where each stands being known when the program runs."""

    def whole(q: jax.Array, k: jax.Array, v: jax.Array, visible: Visibility) -> jax.Array:
        def piece(it: tuple[jax.Array, jax.Array]) -> jax.Array:
            part, first = it
            return attend_piece(part, k, v, Visibility(visible.segments, visible.parents, first))

        size = length // pieces
        cut = jnp.moveaxis(q.reshape(q.shape[0], pieces, size, *q.shape[2:]), 1, 0)
        parts = jax.lax.map(piece, (cut, jnp.arange(pieces) * size))  # a loop: one program for all of them
        return jnp.moveaxis(parts, 0, 1).reshape(q.shape)

    return whole


def far_apart(found: list[np.ndarray], truth: tuple[np.ndarray, ...]) -> dict[str, float]:
    """The largest error of each array, relative to its largest value."""
    return {n: float(abs(a - b).max() / abs(b).max()) for n, a, b in zip(NAMES, found, truth, strict=True)}
