"""Attention in a row that several devices hold: every device attends an equal share.

A token sees those before it, so the device that holds the last run of a row would have the most to do, and the others would
wait for it. Each run is cut in two, and device i of n gives its second half to device n - 1 - i for that one's: with an early
piece and a late one all have the same number of queries, and as many keys before them (as in Llama 3's training,
arXiv 2407.21783, section 3.3.2); what is computed goes back the same way. In a row of several documents a device may still see
less than another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_medllm.model.attention.visibility import Visibility

Attend = Callable[[Array, Array, Array, Visibility], Array]

PREFIXES = 8
"""Most lengths to which the keys of a piece are cut, each a program of its own: (1 + 1/8) / 2 of the keys are computed with."""
_WHOLE_TILES = 128


def attend_share(
    attend: Attend,
    q: Float[Array, "b s h x"],
    k: Float[Array, "b t k x"],
    v: Float[Array, "b t k x"],
    visible: Visibility,
    axes: Any,
) -> Float[Array, "b s h x"]:
    """Attention of this device's run of queries to the whole row; in ``shard_map``.

    Args:
        attend: What computes it, of queries from :attr:`Visibility.first_query` on.
        q: The run.
        k: Keys of the row.
        v: Values of the row.
        visible: Of the row.
        axes: Mesh axes over which the row is cut.
    """
    run, half = q.shape[1], q.shape[1] // 2
    own, devices = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
    if not half:
        return attend(q, k, v, replace(visible, first_query=own))
    across = devices - 1 - own
    # Whatever the order in which several axes are counted, this is the same exchange.
    exchanged = partial(jax.lax.ppermute, axis_name=axes, perm=[(i, devices - 1 - i) for i in range(devices)])
    early = attend(q[:, :half], k, v, replace(visible, first_query=own * run))
    late = attend(exchanged(q[:, half:]), k, v, replace(visible, first_query=across * run + half))
    return jnp.concatenate([early, exchanged(late)], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_prefix(
    attend: Attend, q: Float[Array, "b q h x"], k: Float[Array, "b t k x"], v: Float[Array, "b t k x"], visible: Visibility
) -> Float[Array, "b q h x"]:
    """``attend``, with few keys after the last query, for backends that compute with all that they are given.

    Where the queries stand is known when the program runs, so that chooses one of :data:`PREFIXES` programs. The backward pass
    attends anew, in the program of the same prefix: what a choice hands on would be the sum of what all its programs do.
    """
    programs = [partial(_attend_first, attend, end) for end in _ends(q, k)]
    return jax.lax.switch(_choice(q, k, visible), programs, q, k, v, visible)


def _forward(attend: Attend, q: Array, k: Array, v: Array, visible: Visibility) -> tuple[Array, tuple[Any, ...]]:
    return attend_prefix(attend, q, k, v, visible), (q, k, v, visible)


def _backward(attend: Attend, kept: tuple[Any, ...], slope: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, visible = kept

    def pulled_back(end: int, q: Array, k: Array, v: Array, visible: Visibility, slope: Array) -> tuple[Array, Array, Array]:
        return jax.vjp(lambda q, k, v: _attend_first(attend, end, q, k, v, visible), q, k, v)[1](slope)

    programs = [partial(pulled_back, end) for end in _ends(q, k)]
    return *jax.lax.switch(_choice(q, k, visible), programs, q, k, v, visible, slope), None


attend_prefix.defvjp(_forward, _backward)


def _attend_first(attend: Attend, end: int, q: Array, k: Array, v: Array, visible: Visibility) -> Array:
    return attend(q, k[:, :end], v[:, :end], visible)


def _ends(q: Array, k: Array) -> list[int]:
    """Numbers of keys, evenly spaced up to all of them, in whole tiles."""
    keys, count = k.shape[1], _count(q, k)
    return [min(keys, -(-keys * part // (count * _WHOLE_TILES)) * _WHOLE_TILES) for part in range(1, count + 1)]


def _choice(q: Array, k: Array, visible: Visibility) -> Array:
    """The shortest prefix that ends with or after the last query."""
    return -(-(visible.first_query + q.shape[1]) * _count(q, k) // k.shape[1]) - 1


def _count(q: Array, k: Array) -> int:
    keys, queries = k.shape[1], q.shape[1]
    return min(PREFIXES, -(-keys // queries), -(-keys // _WHOLE_TILES))
