"""Every preference loss against TRL's own code, in float64, on log-probabilities that hypothesis makes: value and gradient.

The gradient is that of each token's log-probability, so it also says which tokens a loss reads, and by which length it divides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from jax_medllm.train.preference_losses import OBJECTIVES, Pairs, objective
from medllm.config import PreferenceLoss
from medllm_parity.preference_formulas import FORMULAS, Compared
from parity_tests.trl_losses import (
    Result,
    Scored,
    cpo_trainer_result,
    dpo_trainer_result,
    kto_trainer_result,
    one_by_one,
    orpo_trainer_result,
    smoothed_pairs_result,
)

BOUND = 1e-10
"""On the largest difference over the largest magnitude, or over 0.001 where all are smaller."""
LONGEST = 5
"""Tokens of a response."""

BY_TOKEN = {"nll_reduction": "micro_batch_tokens"}


def dpo_trainer_by_pair(scored: Scored, loss: PreferenceLoss) -> Result:
    """One pair a micro-batch: TRL's mean over tokens is then that over a response's own."""
    return one_by_one(scored, partial(dpo_trainer_result, loss=loss))


def orpo_trainer_by_pair(scored: Scored, loss: PreferenceLoss) -> Result:
    """As :func:`dpo_trainer_by_pair`."""
    return one_by_one(scored, partial(orpo_trainer_result, loss=loss))


CASES: list[tuple[str, Callable[[Scored, PreferenceLoss], Result], dict[str, str]]] = [
    ("rpo", dpo_trainer_result, BY_TOKEN),
    ("rpo", dpo_trainer_by_pair, {}),
    ("dpo", dpo_trainer_result, {}),
    ("cdpo", dpo_trainer_result, {}),
    ("cdpo", smoothed_pairs_result, {}),
    ("robust", dpo_trainer_result, {}),
    ("hinge", dpo_trainer_result, {}),
    ("ipo", dpo_trainer_result, {}),
    ("dpo_norm", dpo_trainer_result, {}),
    ("kto_pair", kto_trainer_result, {}),
    ("simpo", cpo_trainer_result, {}),
    ("orpo", orpo_trainer_result, BY_TOKEN),
    ("orpo", orpo_trainer_by_pair, {}),
]
"""A loss, what of TRL it is compared with, and settings that are not drawn."""

RANGES = {"beta": (0.05, 3.0), "alpha": (0.0, 10.0), "label_smoothing": (0.0, 0.45), "gamma": (0.0, 2.0)}


@st.composite
def scored(draw: st.DrawFn) -> Scored:
    """One to three pairs, responses of unequal lengths, a reference that is up to ten nats away."""
    rows = 2 * draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, LONGEST), min_size=rows, max_size=rows))
    mask = np.arange(LONGEST) < np.array(lengths)[:, None]
    tokens = draw(st.lists(st.floats(-6, -0.01), min_size=rows * LONGEST, max_size=rows * LONGEST))
    policy = np.where(mask, np.array(tokens).reshape(rows, LONGEST), 0.0)
    away = draw(st.lists(st.floats(-10, 10), min_size=rows, max_size=rows))
    return Scored(policy, policy.sum(1) + np.array(away), mask)


def jax_result(given: Scored, loss: PreferenceLoss) -> tuple[Any, np.ndarray]:
    """What the objective logs, and the gradient of its loss, beside a pair of weight zero that must not count."""
    k = given.pairs

    def metrics(policy):
        def pairs(values):
            return jnp.pad(values.reshape(2, k).T, ((0, 1), (0, 0)), mode="edge")

        weights = jnp.append(jnp.full(k, 1 / k), 0.0)
        reference = pairs(jnp.asarray(given.reference)) if objective(loss).reference else None
        lengths = jnp.asarray(given.mask.sum(1), jnp.float64)
        found = objective(loss).metrics(Pairs(pairs(policy.sum(1)), reference, pairs(lengths), weights), loss)
        return found.loss, found

    (_, found), gradient = jax.value_and_grad(metrics, has_aux=True)(jnp.asarray(given.policy))
    return found, np.where(given.mask, gradient, 0.0)


def taken_anew(given: Scored, loss: PreferenceLoss) -> dict[str, float]:
    """What ``medllm verify`` holds a run's log against."""
    sums, reference, lengths = (
        torch.tensor(values, dtype=torch.float64).reshape(2, -1).T
        for values in (given.policy.sum(1), given.reference, given.mask.sum(1))
    )
    weights = torch.full((given.pairs,), 1 / given.pairs, dtype=torch.float64)
    terms = FORMULAS[loss.name](Compared(sums, sums - reference, lengths, weights, loss))
    return {name: value.item() for name, value in terms.items()}


def difference(actual: Any, expected: Any) -> float:
    """See :data:`BOUND`."""
    x, y = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(x).all()
    assert np.isfinite(y).all()
    return float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-3))


def away_from_kinks(name: str, given: Scored, loss: PreferenceLoss) -> bool:
    """Where a loss bends, the last digit decides on the gradient: hinge at a margin of 1, KTO at a divergence of 0."""
    ratios = given.policy.sum(1) - given.reference
    chosen, rejected = ratios[: given.pairs], ratios[given.pairs :]
    bends = {"hinge": 1 - loss.beta * (chosen - rejected), "kto_pair": np.array([chosen.mean(), rejected.mean()])}
    return name not in bends or bool(np.abs(bends[name]).min() > 1e-9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1].__name__}")
@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],  # what fails is small enough to read
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(given=scored(), data=st.data())
def test_loss_and_gradient_are_trls(float64, case, given, data):
    name, compared, fixed = case
    drawn = {one: data.draw(st.floats(*RANGES[one]), one) for one in OBJECTIVES[name].reads if one in RANGES}
    loss = PreferenceLoss(name, **drawn, **fixed)
    assume(away_from_kinks(name, given, loss))
    expected = compared(given, loss)
    found, gradient = jax_result(given, loss)
    assert difference(found.loss, expected.loss) <= BOUND
    assert difference(gradient, expected.gradient) <= BOUND
    if name in FORMULAS:
        assert difference(found.loss, taken_anew(given, loss)["loss"]) <= BOUND
    for group in ("rewards", "logps"):
        for one, value in getattr(found, group)._asdict().items() if hasattr(found, group) else ():
            if f"{group}/{one}" in expected.logged and one != "accuracies":
                assert difference(value, expected.logged[f"{group}/{one}"]) <= BOUND, one


def test_every_loss_is_compared_with_trls_and_every_formula_to_verify_by_with_a_loss():
    compared = {name for name, *_ in CASES}
    assert compared == set(OBJECTIVES)
    assert set(FORMULAS) <= compared
