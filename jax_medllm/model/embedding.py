"""Rows of a table of the vocabulary, where the table is spread over a mesh."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jax_medllm.mesh.layout import entry, in_use
from medllm.axes import Axis


def lookup(
    table: Float[Array, "v d"], tokens: Int[ArrayLike, "*b"], axes: tuple[Axis, Axis], names: Sequence[str | None]
) -> Float[Array, "*b d"]:
    """``table[tokens]``, laid out as the tokens are.

    On a mesh a device holds some of the table's rows, or some of its columns. It looks up what it holds for the tokens of all
    that hold other parts; then each of them takes what is its own tokens' from the others. So neither the table nor more than a
    device's share of the result, times the devices that share the rows, is ever moved.

    Args:
        table: Of the embedding, or the output matrix.
        tokens: Token ids.
        axes: The table's logical axes.
        names: The tokens' logical axes.
    """
    layout = in_use()
    if layout is None:
        return table[tokens]
    stored, spec = layout.stored(axes), layout.activation(tokens.shape, names)
    rows, columns = (entry(part) for part in stored)
    # Of a mesh axis that holds a part of the table and some of the tokens: which axis of theirs.
    shared = {name: axis for axis, part in enumerate(spec) for name in entry(part) if name in (*rows, *columns)}

    def local(table: Float[Array, "own_v own_d"], tokens: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        for name, axis in reversed(shared.items()):
            tokens = jax.lax.all_gather(tokens, name, axis=axis, tiled=True)
        if not rows:
            found = table[tokens]
        else:
            first = jax.lax.axis_index(rows) * len(table)
            here = (tokens >= first) & (tokens < first + len(table))
            found = jnp.where(here[..., None], table[jnp.where(here, tokens - first, 0)], 0)
        # One device has the row and the others zeros, so that a sum takes it as it is.
        if alone := tuple(name for name in rows if name not in shared):
            found = jax.lax.psum(found, alone)
        for name, axis in shared.items():
            if name in rows:
                found = jax.lax.psum_scatter(found, name, scatter_dimension=axis, tiled=True)
        last = found.ndim - 1
        for name in reversed(columns):  # the last of them holds neighbours
            if name in shared:
                found = jax.lax.all_to_all(found, name, shared[name], last, tiled=True)
            else:
                found = jax.lax.all_gather(found, name, axis=last, tiled=True)
        return found

    specs = {"in_specs": (stored, spec), "out_specs": jax.sharding.PartitionSpec(*spec, None)}
    return jax.shard_map(local, mesh=layout.mesh, **specs, check_vma=False)(table, tokens)
