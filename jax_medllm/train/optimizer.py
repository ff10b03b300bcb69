"""AdamW with warmup, cosine decay and clipping, step for step as Hugging Face's Trainer drives ``torch.optim.AdamW``.

optax supplies the frame. Three pieces are ours because optax's differ in the digits a trajectory comparison sees: the clip
factor has Trainer's ``1e-6``, the first warmup step has learning rate zero, and ``1 - beta**t`` goes through ``expm1`` so
that fp32 does not lose five digits of it at small t (torch computes it in double).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from medllm.config import OptimizerConfig


class AdamState(NamedTuple):
    """Steps taken, first and second moment."""

    count: Int[Array, ""]
    mu: optax.Updates
    nu: optax.Updates


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Steps spent in warmup: ``ceil(warmup_ratio * total_steps)``."""
    return math.ceil(config.warmup_ratio * total_steps)


def learning_rate(config: OptimizerConfig, total_steps: int, step: Int[Array, "*t"] | int) -> Float[Array, "*t"]:
    r"""Learning rate of optimizer step ``step``, counted from 0 (transformers ``get_cosine_schedule_with_warmup``).

    With w warmup steps of T in all: :math:`t/\max(1,w)` for :math:`t<w`, else
    :math:`\max(0, \tfrac12(1+\cos(\pi\,(t-w)/\max(1,T-w))))`, times the peak.
    """
    warmup = warmup_steps(config, total_steps)
    step = jnp.asarray(step, float)
    progress = (step - warmup) / max(1, total_steps - warmup)
    cosine = jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))
    return config.learning_rate * jnp.where(step < warmup, step / max(1, warmup), cosine)


def clip_by_trainer_norm(clip_norm: float) -> optax.GradientTransformation:
    r"""Scale by :math:`\min(1, c/(\lVert g\rVert+10^{-6}))` (``torch.nn.utils.clip_grad_norm_``)."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, clip_norm / (optax.global_norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    r""":math:`\hat m/(\sqrt{\hat v}+\epsilon)` (Kingma & Ba 2015), moments in the parameters' own dtype."""

    def init(params):
        return AdamState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        correction1, correction2 = _one_minus_power(b1, count), _one_minus_power(b2, count)

        def direction(m, v):
            return (m / correction1 / (jnp.sqrt(v / correction2) + eps)).astype(m.dtype)

        return jax.tree.map(direction, mu, nu), AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _one_minus_power(beta: float, count: Int[Array, ""]) -> Float[Array, ""] | float:
    return -jnp.expm1(count.astype(float) * math.log(beta)) if beta > 0 else 1.0


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The whole update: clip, Adam, decoupled decay of every parameter, learning rate of the step.

    Args:
        config: The settings.
        total_steps: Optimizer steps the schedule spans.
    """
    return optax.chain(
        clip_by_trainer_norm(config.clip_norm),
        scale_by_adam(*config.betas, config.eps),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(lambda step: learning_rate(config, total_steps, step)),
    )
