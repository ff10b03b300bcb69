"""Plans as ``medllm plan --json`` writes them, with round numbers where a page does not care."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

LAYERS, WIDTH, MLP, VOCABULARY, RANK = 80, 8192, 29568, 152064, 16
PROJECTIONS = {
    "attention.q_proj": (WIDTH, WIDTH),
    "attention.k_proj": (1024, WIDTH),
    "attention.v_proj": (1024, WIDTH),
    "attention.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (MLP, WIDTH),
    "mlp.up_proj": (MLP, WIDTH),
    "mlp.down_proj": (WIDTH, MLP),
}
BYTES = {"uint8": 1, "bfloat16": 2, "float32": 4}


def parameter(mesh: dict[str, int], name: str, kind: str, shape: list[int], dtype: str, *spread: str) -> dict[str, Any]:
    """An array as a plan lists it; ``spread`` has the mesh axes of each dimension, those that the mesh has."""
    over = [[axis for axis in axes.split() if axis in mesh] for axes in spread]
    pieces = math.prod(mesh[axis] for axes in over for axis in axes)
    gib = math.prod(shape) * BYTES[dtype] / pieces / 2**30
    return {"name": name, "kind": kind, "shape": shape, "dtype": dtype, "spread": over, "gib": gib}


def parameters(mesh: dict[str, int]) -> list[dict[str, Any]]:
    """The arrays of Qwen2.5-72B in NF4 with adapters, as the standard rules spread them."""
    arrays = [
        parameter(mesh, "embed.weight", "base", [VOCABULARY, WIDTH], "bfloat16", "tensor", "fsdp sequence"),
        parameter(mesh, "lm_head.weight", "base", [VOCABULARY, WIDTH], "bfloat16", "tensor fsdp sequence", ""),
        parameter(mesh, "norm.scale", "base", [WIDTH], "bfloat16", ""),
    ]
    for name, (out, into) in PROJECTIONS.items():
        over = ("tensor fsdp sequence", "") if not name.endswith(("o_proj", "down_proj")) else ("fsdp sequence", "tensor")
        stem = f"layers.{name}"
        arrays += [
            parameter(mesh, f"{stem}.codes", "base", [LAYERS, out, into // 2], "uint8", "", *over),
            parameter(mesh, f"{stem}.absmax.codes", "base", [LAYERS, out, into // 64], "uint8", "", *over),
            parameter(mesh, f"{stem}.lora_a", "adapters", [LAYERS, RANK, into], "float32", "", "", "tensor fsdp sequence"),
            parameter(mesh, f"{stem}.lora_b", "adapters", [LAYERS, out, RANK], "float32", "", "tensor fsdp sequence", ""),
        ]
    return arrays


MODEL = {
    "name": "qwen2.5-72b",
    "parameters": 72706203648,
    "layers": LAYERS,
    "width": WIDTH,
    "heads": 64,
    "kv_heads": 8,
    "mlp": MLP,
    "vocabulary": VOCABULARY,
}
BY_KIND = {
    "base": 2.4,
    "adapters": 0.05,
    "moments": 0.1,
    "cache": 0.0,
    "gradients": 0.05,
    "activations": 6.3,
    "output": 0.1,
}


def a_plan(mesh: dict[str, int], device: str = "v5e", topology: str = "4x4", **changes: Any) -> dict[str, Any]:
    """A plan for continued pretraining, with round numbers where the page does not care."""
    devices = math.prod(mesh.values())
    plan = {
        "ok": True,
        "fits": True,
        "model": dict(MODEL),
        "stage": "cpt",
        "target": f"{device}:{topology or devices}",
        "device": device,
        "devices": devices,
        "topology": topology,
        "memory_gib": 15.75,
        "mesh": mesh,
        "rules": "",
        "mesh_devices": np.arange(devices).reshape(tuple(mesh.values())).tolist(),
        "settings": {"rows": 1, "length": 2048, "quantization": "nf4", "remat": "layer", "rank": RANK},
        "gib_per_device": 9.0,
        "headroom_gib": 6.75,
        "by_kind": dict(BY_KIND),
        "programs": [
            {"name": "gradients", "compile_s": 34.2, "arguments_gib": 2.5, "temporaries_gib": 6.3, "output_gib": 0.15},
            {"name": "update", "compile_s": 1.8, "arguments_gib": 0.25, "temporaries_gib": 0.01, "output_gib": 0.2},
        ],
        "collectives": [
            {"kind": "all-gather", "dtype": "u8", "times": 560, "bytes": 3.6e10, "seconds": 0.18},
            {"kind": "all-gather", "dtype": "bf16", "times": 12, "bytes": 4.1e9, "seconds": 0.02},
            {"kind": "all-reduce", "dtype": "f32", "times": 321, "bytes": 1.9e10, "seconds": 0.1},
            {"kind": "reduce-scatter", "dtype": "f32", "times": 14, "bytes": 2.4e8, "seconds": 0.0012},
        ],
        "flops": 9.1e14,
        "bytes": 4.2e11,
        "seconds": {"compute": 4.6, "memory": 0.5, "interconnect": 0.3012},
        "bound": "compute",
        "step_s": 4.6,
        "tokens_per_step": 32768,
        "tokens_per_s": 7123.478,
        "rates": {
            "flops": 1.97e14,
            "memory_bytes": 8.19e11,
            "link_bytes": 2e11,
            "source": "Google Cloud's TPU documentation",
        },
        "parameters": parameters(mesh),
        "compile_s": 36.0,
        "versions": {"jax": "0.10.2", "compiler": "libtpu 0.0.51"},
    }
    return plan | changes


def a_plan_that_does_not_fit() -> dict[str, Any]:
    """The activations of long rows fill more than there is."""
    by_kind = {"base": 2.4, "adapters": 0.05, "moments": 0.1, "gradients": 0.05, "activations": 15.5, "output": 0.1}
    over = {"fits": False, "gib_per_device": 18.2, "headroom_gib": -2.45, "by_kind": by_kind}
    return a_plan({"fsdp": 16}, **over, settings={"rows": 8, "length": 8192, "quantization": "nf4", "remat": "projections"})


def a_search(fitting: bool = True) -> dict[str, Any]:
    """Twelve candidates, of which three fit, one is not known and one was never compiled; or none fits."""
    best = a_plan({"fsdp": 16})
    candidates = []
    for index, (mesh, remat, rows) in enumerate(
        itertools.product(({"fsdp": 16}, {"fsdp": 8, "tensor": 2}, {"tensor": 16}), ("layer", "none"), (1, 2))
    ):
        fits = fitting and index < 3
        candidates.append(
            {
                "mesh": mesh,
                "remat": remat,
                "rows": rows,
                "fits": fits or (None if index == 7 else False),
                "gib_per_device": None if index == 7 else 9.0 + 2.25 * index if fits else 16.1 + index,
                "step_s": 4.6 + index if fits else None,
                "tokens_per_s": 7123.478 / (1 + index / 4) if fits else None,
                "compile_s": 31.5 + index if index < 5 else None,
                "why": ""
                if fits
                else "the compiler gave up: RESOURCE_EXHAUSTED: no memory on this machine for the program of 80 unrolled layers"
                if index == 7
                else f"{16.1 + index:.1f} GiB estimated before compiling; 15.75 are there",
            }
        )
    shared = {key: best[key] for key in ("ok", "model", "stage", "target", "device", "devices", "topology", "memory_gib")}
    return shared | {"fits": fitting, "candidates": candidates, "best": best if fitting else None, "compile_s": 170.5}
