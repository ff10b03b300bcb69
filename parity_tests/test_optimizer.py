"""Clipping, the learning rate of every step and AdamW's state against torch and transformers, in float64."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import TrainingArguments, get_cosine_schedule_with_warmup

from jax_medllm.train.optimizer import AdamState, clip_by_trainer_norm, learning_rate, make_optimizer, warmup_steps
from medllm.config import OptimizerConfig
from parity_tests.tolerances import FLOAT64_OPTIMIZER

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}


def gradients(step: int) -> dict[str, np.ndarray]:
    """Of very different size from tensor to tensor and from step to step."""
    rng = np.random.default_rng(step)
    return {
        name: rng.standard_normal(shape) * 10.0 ** (step % 4 - 2 - number)
        for number, (name, shape) in enumerate(SHAPES.items())
    }


@pytest.mark.parametrize("clip", [1e-3, 0.5, 7.0, 1e4])
def test_gradients_are_clipped_as_torch_clips_them(float64, clip):
    for step in range(4):
        parameters = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES.values()]
        for parameter, gradient in zip(parameters, gradients(step).values(), strict=True):
            parameter.grad = torch.from_numpy(gradient.copy())
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        found, _ = clip_by_trainer_norm(clip).update(jax.tree.map(jnp.asarray, gradients(step)), optax.EmptyState())
        FLOAT64_OPTIMIZER.assert_close(optax.global_norm(gradients(step)), norm, "norm")
        for name, parameter in zip(SHAPES, parameters, strict=True):
            FLOAT64_OPTIMIZER.assert_close(found[name], parameter.grad, name)


@pytest.mark.parametrize("total", [1, 2, 7, 20, 101, 1000])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.1, 0.5, 0.99])
def test_every_steps_rate_is_that_of_transformers_schedule(float64, tmp_path, ratio, total):
    config = OptimizerConfig(learning_rate=3e-4, warmup_ratio=ratio)
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=ratio, use_cpu=True, report_to="none")
    assert warmup_steps(config, total) == arguments.get_warmup_steps(total)
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=config.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.get_warmup_steps(total), total)
    expected = []
    for _ in range(total):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    found = learning_rate(config, total, jnp.arange(1000))[:total]
    FLOAT64_OPTIMIZER.assert_close(found, expected, "learning rates")


@pytest.mark.parametrize("warmup", range(0, 12, 3))
def test_any_warmup_of_any_length_gives_transformers_rates(float64, warmup):
    for total in range(max(1, warmup), 25):
        config = OptimizerConfig(learning_rate=1.0, warmup_ratio=max(0.0, (warmup - 0.5) / total))
        assert warmup_steps(config, total) == warmup
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        (rate,) = get_cosine_schedule_with_warmup(optimizer, warmup, total).lr_lambdas
        expected = [rate(step) for step in range(30)]
        FLOAT64_OPTIMIZER.assert_close(learning_rate(config, total, jnp.arange(30)), expected, f"{warmup} of {total}")


def test_parameters_both_moments_and_the_count_follow_torch(float64):
    config = OptimizerConfig(
        learning_rate=3e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, warmup_ratio=0.15, clip_norm=0.5
    )
    total = 12
    rng = np.random.default_rng(0)
    start = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    theirs = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    adamw = torch.optim.AdamW(
        theirs.values(), lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(adamw, math.ceil(config.warmup_ratio * total), total)
    optimizer = make_optimizer(config, total)
    ours = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(ours)
    for step in range(total):
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(gradients(step)[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), config.clip_norm)
        adamw.step()
        schedule.step()
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradients(step)), state, ours)
        ours = optax.apply_updates(ours, updates)
        (adam,) = (part for part in state if isinstance(part, AdamState))
        for name, parameter in theirs.items():
            expected = adamw.state[parameter]
            assert int(adam.count) == int(expected["step"]) == step + 1
            FLOAT64_OPTIMIZER.assert_close(adam.mu[name], expected["exp_avg"], f"step {step + 1}: first moment of {name}")
            FLOAT64_OPTIMIZER.assert_close(adam.nu[name], expected["exp_avg_sq"], f"step {step + 1}: second moment of {name}")
            FLOAT64_OPTIMIZER.assert_close(ours[name], parameter.detach(), f"step {step + 1}: {name}")
