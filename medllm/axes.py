"""The axes that arrays and meshes are spoken of by, and which are spread over which.

An array names its logical axes once, where it is declared (:mod:`medllm.architecture`), an activation where it is made.
:data:`RULES` says over which axes of the mesh each is spread, unless ``--rules`` says otherwise; what it does not name stays
whole. Here they are data: what lays arrays out by them is the JAX engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MESH_AXES: Mapping[str, str] = {
    "data": "rows of the batch, with a copy of the weights at each place",
    "fsdp": "rows of the batch, and the weights: each device stores a piece and gathers the rest when a layer needs it",
    "tensor": "heads and widths: each device computes its share of every layer",
    "sequence": "the positions of a row",
}
"""The axes a mesh may have, the outermost first, and what is spread over each."""

_STORED = ("tensor", "fsdp", "sequence")

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # rows
    "sequence": ("sequence",),  # the positions of a row
    "heads": _STORED,  # outputs of q
    "kv_heads": _STORED,  # outputs of k and v
    "mlp": _STORED,  # outputs of gate and up
    "embed": ("fsdp", "sequence"),  # outputs of o and down
    "heads_in": ("tensor",),  # inputs of o
    "mlp_in": ("tensor",),  # inputs of down
    "embed_in": (),  # inputs of q, k, v, gate and up
    "bias": ("tensor",),  # biases
    "adapter": _STORED,  # the long axis of a LoRA matrix
    "vocab": ("tensor",),  # rows of the embedding
    "columns": ("fsdp", "sequence"),  # columns of the embedding
    "head_vocab": _STORED,  # rows of the output matrix
}
"""Logical axis → the mesh axes it is spread over, the outermost first."""


@dataclass(frozen=True)
class Axis:
    """One logical axis of an array.

    Attributes:
        name: What the rules know it by.
        size: Its length.
        parts: Pieces that are not cut where the array is used, where that is not each index: heads.
        may_stay_whole: Where a rule's mesh axes do not divide it, it is spread over the first of them that do. Else that is an
            error.
    """

    name: str
    size: int
    parts: int | None = None
    may_stay_whole: bool = False
