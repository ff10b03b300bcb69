r"""``medllm bench floor``: the products and reductions a training step is made of, each against what this machine can do.

An operation can take no less than

.. math:: \max(\text{operations} / \text{matrix rate},\ \text{bytes} / \text{copy rate})

with the rate of the machine's best matrix product and that of a copy, measured beside it. Operations and bytes are counted on
paper: two operations for each multiply and add that a token needs (pairs that do not see each other need none), and every
array read or written once. What comes near this floor cannot be made faster; what stays below a third of it is named.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from medllm.bench.arithmetic import Step, causal_pairs, training_flops
from medllm.bench.engines import measure
from medllm.bench.shapes import ModelShape
from medllm.errors import UserError
from medllm.host.progress import Say
from medllm.quantization import PACKINGS
from medllm.run import environment

THIRD = 1 / 3
"""Share of the floor below which an operation is named."""
TARGETS = ("gate_proj", "down_proj")
"""Linear layers that are measured: one that widens and one that narrows."""
LAYERS = 2
"""Decoder layers that are measured at once, at most."""


@dataclass(frozen=True)
class Work:
    """What an operation needs on paper: floating-point operations of its products, and bytes to read and to write."""

    flops: int
    bytes: int

    def floor(self, matrix_flops: float, copy_bytes: float) -> float:
        """Seconds it takes at least, at these rates a second."""
        return max(self.flops / matrix_flops, self.bytes / copy_bytes)


def works(model: ModelShape, rows: int, length: int) -> dict[str, Work]:
    """The operations that are measured, on ``rows`` of one document of ``length`` tokens each."""
    item = 2 if model.dtype == "bfloat16" else 4
    packing = PACKINGS.get(model.quantization)
    tokens, projections = rows * length, model.architecture.projections
    found: dict[str, Work] = {}
    for target in TARGETS:
        out, width = projections[target].shape
        rank, arrays = model.rank, item * tokens * (width + out)
        dense = Work(2 * tokens * out * width, arrays + round(packing.bytes_of(out * width) if packing else item * out * width))
        low = Work(2 * tokens * rank * (width + out), arrays)
        found |= {f"{target}: x Wᵀ": dense, f"{target}: g W": dense}
        found |= {f"{target} LoRA: (x Aᵀ) Bᵀ": low, f"{target} LoRA: (g B) A": low, f"{target} LoRA: dA = (g B)ᵀ x": low}
        found[f"{target} LoRA: dB = gᵀ (x Aᵀ)"] = Work(2 * tokens * rank * out, item * tokens * (out + rank))
    return found | _attention(model, rows, length, item) | _rest(model, rows, length, item)


def _attention(model: ModelShape, rows: int, length: int, item: int) -> dict[str, Work]:
    decoder = model.architecture
    product = 2 * decoder.heads_width * rows * causal_pairs(length)
    queries, keys = (item * rows * length * width for width in (decoder.heads_width, decoder.kv_width))
    return {
        "attention: forward": Work(2 * product, 2 * queries + 2 * keys),
        "attention: backward": Work(4 * product, 4 * queries + 4 * keys),
    }


def _rest(model: ModelShape, rows: int, length: int, item: int) -> dict[str, Work]:
    tokens, layers = rows * length, min(LAYERS, model.layers)
    hidden, wide, head = (item * count for count in (tokens * model.width, tokens * model.mlp, model.vocabulary * model.width))
    logits = 2 * tokens * model.vocabulary * model.width
    shallow = dataclasses.replace(model, layers=layers)
    step = Step(tokens, rows * causal_pairs(length), 0)
    kept, again = (training_flops(shallow, step, remat) for remat in ("none", "layer"))
    forward = (again - kept) + 2 * tokens * layers * model.width * (model.mlp + model.rank)
    return {
        "head: log-probabilities": Work(logits, hidden + head),
        "head: log-probabilities and gradient": Work(2 * logits, 2 * hidden + head),
        "RMSNorm: forward": Work(0, 2 * hidden),
        "RMSNorm: backward": Work(0, 3 * hidden),
        "SiLU(gate) · up: forward": Work(0, 3 * wide),
        "SiLU(gate) · up: backward": Work(0, 5 * wide),
        f"{layers} layers: forward": Work(forward, 2 * hidden),
        f"{layers} layers: forward, recomputed, backward": Work(again, 4 * hidden),
    }


def bench_floor(model: ModelShape, rows: int, length: int, *, seconds: float) -> dict[str, Any]:
    """Measure every operation of :func:`works` on the JAX engine, in a fresh process.

    Args:
        model: Sizes; of the layers at most two are there.
        rows: Rows of a step.
        length: Tokens of a row.
        seconds: Spent on each operation, at least three runs; the median counts.

    Returns:
        ``operations``, each with ``name``, ``seconds``, ``flops``, ``bytes`` and ``share`` of the floor; ``slow``, the names of
        those below a third of it; the machine's ``matrix_flops`` and ``copy_bytes`` a second; the shape and the machine.

    Raises:
        UserError: a size is not positive, or JAX is not installed.
    """
    for name, value in (("rows", rows), ("length", length), ("seconds", seconds)):
        if not value > 0:
            raise UserError(f"--{name} is {value}; a positive number is needed")
    found = measure("jax", "floor", model=dataclasses.asdict(model), rows=rows, length=length, seconds=seconds)
    matrix, copy = found["matrix_flops"], found["copy_bytes"]
    operations = []
    for name, work in works(model, rows, length).items():
        taken = found["seconds"][name]
        share = work.floor(matrix, copy) / taken
        operations.append({"name": name, "seconds": taken, **dataclasses.asdict(work), "share": share})
    return {
        "operations": operations,
        "slow": [one["name"] for one in operations if one["share"] < THIRD],
        "matrix_flops": matrix,
        "copy_bytes": copy,
        "shape": {"model": dataclasses.asdict(model), "rows": rows, "length": length},
        "environment": environment(),
    }


def table(found: dict[str, Any]) -> list[str]:
    """The result as lines of text; the verdict is the last."""
    matrix, copy = found["matrix_flops"], found["copy_bytes"]
    said = [f"this machine: matrix rate {matrix / 1e9:.1f} GFLOP/s, copy {copy / 1e9:.1f} GB/s, read and written"]
    said.append(f"{'':<46} {'ms':>9} {'reaches':>14}   of its floor")
    for one in found["operations"]:
        bound = one["flops"] / matrix >= one["bytes"] / copy
        rate = f"{(one['flops'] if bound else one['bytes']) / one['seconds'] / 1e9:.1f} {'GFLOP/s' if bound else 'GB/s   '}"
        said.append(f"{one['name']:<46} {one['seconds'] * 1e3:>9.2f} {rate:>14} {one['share']:>10.0%}{_mark(one)}")
    slow = ", ".join(found["slow"])
    return [
        *said,
        f"bench floor: below a third of its floor: {slow}" if slow else "bench floor: all reach a third of their floor",
    ]


def _mark(one: dict[str, Any]) -> str:
    return "  <" if one["share"] < THIRD else ""


def run(values: Any, say: Say) -> dict[str, Any]:
    """The command: measure, print, and return what was found."""
    found = bench_floor(values.model, values.rows, values.length, seconds=values.seconds)
    for line in table(found):
        say(line)
    return found
