r"""How many floating-point operations a step needs, and how many bytes: counted on paper, from the sizes alone.

A product [m, k] × [k, n] is 2·m·k·n operations. With N the parameters of the linear layers, R those of their adapters,
T tokens, P (query, key) pairs that see each other, h heads of width x and l layers:

.. math::
    \text{forward} &= 2T(N + R) + A, \qquad A = 4\,l\,h\,x\,P \\
    \text{recomputed} &= \text{forward} - 2T(N_\text{down} + R_\text{down,B}) \\
    \text{backward} &= 2T(N + 2R) + 2A

Attention is two products of 2·x operations a pair and head, and four of them backward. The base is frozen, so backward it has
the product for the activations alone; an adapter has both. Recomputing a layer ends before the product with ``down_proj`` (and
with its adapter's B): the sum it goes into needs no value for its derivative. A step that keeps more
(:data:`medllm.config.RematPolicy`) recomputes less: with ``attention`` not A and the products with q, k, v and o, with
``projections`` not those with gate and up either, in both but for an adapter's A, whose result its gradient needs; with
``none`` nothing. The head, frozen too, is 2·V·d a predicted token forward and again backward. A reference, with the adapter
off, is 2TN + A and the head once.

What a program does beyond this (pairs that do not see each other, the softmax, dequantization) is not counted as work.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from medllm.architecture import EMBEDDING, Architecture
from medllm.bench.shapes import CptShape, ModelShape, RpoShape
from medllm.config import REMAT_KEEPS, RematPolicy


@dataclass(frozen=True)
class Step:
    """What an optimizer step works on: tokens through the layers, pairs that see each other in a layer, tokens predicted."""

    tokens: int
    visible: int
    predicted: int
    reference: bool = False


def causal_pairs(tokens: int) -> int:
    """(query, key) pairs in a row where each token sees itself and those before it."""
    return tokens * (tokens + 1) // 2


def cpt_step(rows: int, length: int) -> Step:
    """Rows of one document each."""
    return Step(rows * length, rows * causal_pairs(length), rows * (length - 1))


def grouped_step(prompt: int, response: int, responses: int) -> Step:
    """A problem in one row: its prompt once, each response once, none seeing another; policy and reference."""
    visible = causal_pairs(prompt) + responses * (response * prompt + causal_pairs(response))
    return Step(prompt + responses * response, visible, responses * response, reference=True)


def paired_step(prompt: int, response: int, pairs: int) -> Step:
    """A problem pair by pair: two rows of prompt and response for each pair; policy and reference."""
    rows, length = 2 * pairs, prompt + response
    return Step(rows * length, rows * causal_pairs(length), rows * response, reference=True)


def work_of(shape: CptShape | RpoShape, *, pairwise: bool = False) -> Step:
    """An optimizer step of ``medllm bench``: the documents of its rows see themselves alone.

    Args:
        shape: What is measured.
        pairwise: Preferences are computed pair by pair, not problem by problem.
    """
    if isinstance(shape, CptShape):
        documents = [len(list(run)) for row in shape.data().segment_ids.tolist() for _, run in groupby(row)]
        visible = sum(causal_pairs(length) for length in documents) // shape.steps
        predicted = shape.rows * shape.length - len(documents) // shape.steps
        return Step(shape.rows * shape.length, visible, predicted)
    if pairwise:
        one = paired_step(shape.prompt, shape.response, shape.pairs)
    else:
        one = grouped_step(shape.prompt, shape.response, 1 + shape.chosen + shape.rejected)
    count = shape.problems
    return Step(count * one.tokens, count * one.visible, count * one.predicted, reference=True)


def training_flops(model: ModelShape, step: Step, remat: RematPolicy = "layer") -> int:
    """Operations of an optimizer step that keeps for its backward pass what ``remat`` says."""
    t, decoder, kept = step.tokens, model.architecture, REMAT_KEEPS[remat]
    base, adapter = decoder.linear_parameters, decoder.adapter_parameters(model.rank)
    attention = 4 * decoder.num_layers * decoder.heads_width * step.visible
    head = 2 * decoder.vocab_size * decoder.hidden_size * step.predicted
    forward = 2 * t * (base + adapter) + attention
    recomputed = 0
    if kept is not None:
        recomputed = 2 * t * _recomputed(decoder, model.rank, kept) + (0 if "attention" in kept else attention)
    backward = 2 * t * (base + 2 * adapter) + 2 * attention
    reference = 2 * t * base + attention + head if step.reference else 0
    return forward + recomputed + backward + 2 * head + reference


def _recomputed(decoder: Architecture, rank: int, kept: tuple[str, ...]) -> int:
    """Multiplications of a token with weights and adapters that are done again."""
    kept = (*kept, "down_proj")  # which nobody needs again
    again = 0
    for name, projection in decoder.projections.items():
        out, width = projection.shape
        again += width * rank + (0 if name in kept else out * (width + rank))
    return decoder.num_layers * again


def decode_bytes(model: ModelShape, rows: int, tokens: int) -> int:
    """Bytes one step of generation must read: every packed weight, bias and norm, the bf16 head, and ``tokens`` keys and values
    of each of ``rows`` rows."""
    decoder = model.architecture
    weights = decoder.weight_bytes(model.quantization, 2) - 2 * decoder.around[EMBEDDING].size  # of which a row is read
    cache = decoder.num_layers * rows * tokens * 2 * 2 * decoder.kv_width
    return round(weights + cache)
