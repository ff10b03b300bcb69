"""Child process of the sharding test: log-probabilities with the head's rows over a mesh, against those of one device.

Prints, for each mesh, the largest differences and every collective of the compiled program with the elements it moves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_medllm.model.logprobs import token_logprobs

BATCH, LENGTH, WIDTH, VOCAB, IN_FLIGHT = 8, 24, 16, 4096, 64
MESHES = {"vocab=8": ((8,), ("vocab",)), "batch=2,vocab=4": ((2, 4), ("batch", "vocab"))}


def collectives(text: str) -> Iterator[tuple[str, int]]:
    """Kind and elements of each array that a collective of the program hands out."""
    pattern = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    for shapes, kind in re.findall(pattern, text):
        for sizes in re.findall(r"\w+\[([\d,]*)\]", shapes):
            yield kind, math.prod(int(size) for size in sizes.split(",") if size)


@jax.jit
def values_and_gradient(hidden, head, targets, counted):
    def total(hidden):
        values = token_logprobs(hidden, head, targets, counted, in_flight=IN_FLIGHT)
        return values.sum(), values

    gradient, values = jax.grad(total, has_aux=True)(hidden)
    return values, gradient


def main() -> None:
    random = np.random.default_rng(0)
    hidden = random.standard_normal((BATCH, LENGTH, WIDTH)).astype(np.float32)
    head = random.standard_normal((VOCAB, WIDTH)).astype(np.float32)
    targets = random.integers(0, VOCAB, (BATCH, LENGTH))
    counted = random.integers(0, 2, (BATCH, LENGTH))
    alone = values_and_gradient(hidden, head, targets, counted)
    found = {}
    for name, (sizes, axes) in MESHES.items():
        mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))
        rows = NamedSharding(mesh, PartitionSpec("batch" if "batch" in axes else None))
        by_row = [jax.device_put(array, rows) for array in (hidden, targets, counted)]
        arrays = by_row[0], jax.device_put(head, NamedSharding(mesh, PartitionSpec("vocab"))), *by_row[1:]
        compiled = values_and_gradient.lower(*arrays).compile()
        errors = [float(jnp.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(compiled(*arrays), alone, strict=True)]
        found[name] = {
            "value_error": errors[0],
            "gradient_error": errors[1],
            "largest": float(np.abs(alone[0]).max()),
            "collectives": sorted(set(collectives(compiled.as_text()))),
            "chunk_positions": IN_FLIGHT,
            "width": WIDTH,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
