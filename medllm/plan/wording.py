"""Words that the text and the page of a plan share."""

from __future__ import annotations

from collections.abc import Mapping

KINDS: Mapping[str, tuple[str, str]] = {
    "base": ("base weights", "the frozen weights, as they are stored"),
    "adapters": ("adapters", "the LoRA matrices"),
    "moments": ("moments", "what the optimizer remembers of earlier gradients"),
    "cache": ("cache", "keys and values of the tokens so far"),
    "gradients": ("gradients", "of the adapters, summed over micro-batches"),
    "batch": ("batch and padding", "the rows of a step, and what the device's tiles add to small arrays"),
    "activations": (
        "activations and temporaries",
        "what the compiler keeps while it computes, weights gathered for a layer included",
    ),
    "output": ("output", "what the programs hand back"),
}
"""Kinds of memory: what a reader sees, and what it is."""


def mesh_words(mesh: Mapping[str, int]) -> str:
    """``fsdp=8,tensor=2``, as ``--mesh`` takes it."""
    return ",".join(f"{name}={size}" for name, size in mesh.items()) or "one device"
