"""Child process of the attention tests: rows cut over forced devices, against numpy's attention in float64.

``python -m tests.attention_on_devices`` prints, for each case, how far apart the output and the gradients are.
"""

from __future__ import annotations

import json

import jax

from jax_medllm.mesh.layout import Layout
from jax_medllm.model.attention import attend
from tests.dense_attention import case, computed, expected, far_apart

CASES = (
    ("sequence=8", "", 8),  # runs of one token
    ("sequence=8", "", 24),  # of three: the late piece is the longer
    ("sequence=8", "", 1024),  # keys in eight prefixes
    ("sequence=3", "", 27),  # the device in the middle keeps its own
    ("tensor=2,sequence=2,fsdp=2", "", 256),
    ("tensor=2,sequence=4", "sequence=tensor+sequence", 512),  # a row over two mesh axes
    ("tensor=2,sequence=4", "sequence=sequence+tensor", 512),
)


def main() -> None:
    """Compute all cases, rows packed and in groups."""
    found = {}
    for mesh, rules, length in CASES:
        given = case(length, heads=4, kv_heads=2, width=8, groups=length >= 24)
        count = 3 if mesh == "sequence=3" else 8
        with jax.enable_x64(True), Layout.of(mesh, rules, jax.devices()[:count]).in_use():
            apart = far_apart(computed(attend, given, "float64"), expected(given))
        found[f"{mesh} {rules} {length}"] = max(apart.values())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
