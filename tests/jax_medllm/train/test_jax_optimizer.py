"""The optimizer against torch's and Trainer's formulas, written out in numpy float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_medllm.train.optimizer import learning_rate, make_optimizer, warmup_steps
from medllm.config import OptimizerConfig

CONFIG = OptimizerConfig(learning_rate=3e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, warmup_ratio=0.15, clip_norm=1.0)
TOTAL = 12


def rate_of_formula(t):
    warmup = 2  # ceil(0.15 * 12)
    if t < warmup:
        return 3e-2 * t / warmup
    return 3e-2 * 0.5 * (1 + np.cos(np.pi * (t - warmup) / (TOTAL - warmup)))


def gradients(t):
    random = np.random.default_rng(t)
    return {"a": random.standard_normal((3, 4)) * 10.0 ** (t % 3 - 1), "b": random.standard_normal(5)}


def trajectory_of_formula(parameters):
    moments = {name: (np.zeros_like(p), np.zeros_like(p)) for name, p in parameters.items()}
    for t in range(TOTAL):
        grads, rate = gradients(t), rate_of_formula(t)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, p in parameters.items():
            g = grads[name] * min(1.0, 1.0 / (norm + 1e-6))
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            moments[name] = m, v
            p = p * (1 - rate * 0.1)
            denominator = np.sqrt(v) / np.sqrt(1 - 0.99 ** (t + 1)) + 1e-8
            parameters[name] = p - rate / (1 - 0.9 ** (t + 1)) * m / denominator
        yield dict(parameters)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-14), (jnp.float32, 1e-6)])
def test_every_step_is_that_of_clipped_adamw_under_the_cosine(dtype, tolerance):
    start = {"a": np.linspace(-1, 1, 12).reshape(3, 4), "b": np.arange(5) / 5}
    with jax.enable_x64(dtype == jnp.float64):
        optimizer = make_optimizer(CONFIG, TOTAL)
        parameters = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), start)
        state = optimizer.init(parameters)
        for t, expected in enumerate(trajectory_of_formula(dict(start))):
            grads = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), gradients(t))
            updates, state = optimizer.update(grads, state, parameters)
            parameters = optax.apply_updates(parameters, updates)
            for name in start:
                assert parameters[name].dtype == dtype
                np.testing.assert_allclose(parameters[name], expected[name], rtol=0, atol=tolerance)


def test_the_rate_starts_at_zero_peaks_after_warmup_and_ends_near_zero():
    with jax.enable_x64(True):
        rates = [float(learning_rate(CONFIG, TOTAL, t)) for t in range(TOTAL + 1)]
    np.testing.assert_allclose(rates, [rate_of_formula(t) for t in range(TOTAL + 1)], atol=1e-16)
    assert rates[0] == 0
    assert max(rates) == rates[2] == 3e-2


@pytest.mark.parametrize(("ratio", "total", "expected"), [(0.03, 100, 3), (0.03, 101, 4), (0.0, 50, 0), (0.03, 1, 1)])
def test_warmup_is_rounded_up(ratio, total, expected):
    assert warmup_steps(OptimizerConfig(warmup_ratio=ratio), total) == expected


def test_without_warmup_the_first_step_has_the_peak_rate():
    assert float(learning_rate(OptimizerConfig(learning_rate=1.0, warmup_ratio=0), 10, 0)) == 1


def test_a_gradient_below_the_bound_is_not_scaled():
    config = OptimizerConfig(learning_rate=1.0, betas=(0.0, 0.0), eps=1.0, warmup_ratio=0, clip_norm=5.0)
    optimizer = make_optimizer(config, 10)
    parameters = jnp.zeros(2)
    updates, _ = optimizer.update(jnp.array([0.0, 3.0]), optimizer.init(parameters), parameters)
    np.testing.assert_allclose(updates, [0, -3 / (3 + 1)], rtol=1e-6)


def test_the_moments_kept_of_each_parameter_are_as_many_as_are_said():
    parameters = {"a": jnp.zeros((3, 4)), "b": jnp.zeros(5)}
    state = make_optimizer(CONFIG, TOTAL).init(parameters)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == CONFIG.moments * (12 + 5)
