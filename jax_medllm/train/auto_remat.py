"""``--training.remat auto``: the policy that computes least again among those that fit the device, by its own compiler."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import jax
from flax import nnx

from jax_medllm.mesh.layout import device_bytes
from jax_medllm.mesh.processes import everywhere
from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.model.linear import LoraParam
from jax_medllm.train.device_memory import device_memory, program_bytes
from jax_medllm.train.loop import make_gradients
from medllm.config import OptimizerConfig, RematPolicy

_USABLE = 0.95
"""Of a device's memory; the rest is what its allocator loses between arrays."""


def fitting_policy(
    model: DenseDecoder, loss_fn: Callable[..., Any], batch: Any, accumulates: bool, *, limit: float | None = None
) -> RematPolicy:
    """The first of the policies, fastest first, whose step fits in a device's memory; ``layer`` where none does.

    Each is compiled, the largest first; the compiled step is kept (where compilations are), so that training finds it. Of
    several processes all call this, and a policy fits where it does in every one of them.

    Args:
        model: With the adapter that is trained, where it will be trained.
        loss_fn: ``(model, batch, remat=policy) -> (loss, metrics)``.
        batch: The micro-batch that needs most memory, on its devices.
        accumulates: Whether a step sums several micro-batches.
        limit: Bytes a device has, when not what it says of itself.
    """
    available = limit if limit is not None else device_memory() * _USABLE
    policies = get_args(RematPolicy)
    graph, trainable, *others = nnx.split(model, LoraParam, ...)
    adapter = device_bytes(trainable)
    beside = adapter * (OptimizerConfig().moments + accumulates)  # and the gradients so far
    for policy in policies[:-1]:
        gradients = make_gradients(graph, partial(loss_fn, remat=policy))
        if everywhere(_needed(gradients, trainable, others[0], batch) + beside <= available):
            return policy
    return policies[-1]


def _needed(gradients: jax.stages.Wrapped, *arguments: Any) -> float:
    """Bytes of a device that a compiled step takes; no end of them where the compiler finds no room."""
    try:
        compiled = gradients.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    return program_bytes(compiled)
