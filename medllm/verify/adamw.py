"""The optimizer step in float64 and numpy: written from the formulas, and shared with neither engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medllm.config import OptimizerConfig

Tensors = Mapping[str, np.ndarray]
"""Matrices of an adapter under PEFT's names."""


@dataclass(frozen=True)
class TrainingState:
    """An adapter and AdamW's two moments of it, in float64, after ``step`` optimizer steps.

    ``source`` is where from, ``rounding`` the relative rounding of the type that the adapter was kept in.
    """

    step: int
    adapter: Tensors
    first: Tensors
    second: Tensors
    source: str
    rounding: float = 2.0**-24


def learning_rate(config: OptimizerConfig, total: int, step: int) -> float:
    r"""Rate that optimizer step number ``step``, from 1, takes: of T steps w warm up, then half a cosine to zero.

    With :math:`t` = ``step`` − 1: :math:`t/w` for :math:`t<w`, else :math:`\tfrac12(1+\cos(\pi (t-w)/(T-w)))`, times the peak
    (transformers' ``get_cosine_schedule_with_warmup``).
    """
    taken, warmup = step - 1, math.ceil(config.warmup_ratio * total)
    if taken < warmup:
        return config.learning_rate * taken / warmup
    return config.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * (taken - warmup) / max(1, total - warmup))))


def global_norm(gradients: Tensors) -> float:
    """The Euclidean norm of all numbers together."""
    return math.sqrt(sum(float((gradient * gradient).sum()) for gradient in gradients.values()))


def adamw_step(state: TrainingState, gradients: Tensors, config: OptimizerConfig, rate: float) -> TrainingState:
    r"""Clip to ``clip_norm`` (``torch.nn.utils.clip_grad_norm_``), then AdamW (Loshchilov & Hutter 2019, algorithm 2):

    .. math:: m = \beta_1 m + (1-\beta_1) g,\quad v = \beta_2 v + (1-\beta_2) g^2

    and :func:`moved`.
    """
    scale = min(1.0, config.clip_norm / (global_norm(gradients) + 1e-6))
    one, two = config.betas
    first = {name: one * state.first[name] + (1 - one) * scale * gradient for name, gradient in gradients.items()}
    second = {name: two * state.second[name] + (1 - two) * (scale * gradient) ** 2 for name, gradient in gradients.items()}
    count = state.step + 1
    return TrainingState(count, moved(state, first, second, config, rate), first, second, f"step {count}, taken anew")


def moved(state: TrainingState, first: Tensors, second: Tensors, config: OptimizerConfig, rate: float) -> dict[str, np.ndarray]:
    r"""The adapter one step on, given the moments after that step:

    .. math:: p \leftarrow p - \eta\,\Bigl(\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}+\epsilon} + \lambda p\Bigr)
    """
    count, (one, two) = state.step + 1, config.betas
    adapter = {}
    for name, value in state.adapter.items():
        direction = first[name] / (1 - one**count) / (np.sqrt(second[name] / (1 - two**count)) + config.eps)
        adapter[name] = value - rate * (direction + config.weight_decay * value)
    return adapter
