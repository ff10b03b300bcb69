"""The objectives against their formulas in numpy float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_medllm.train.losses import cpt_loss, dpo_loss, nll_loss, pair_logprobs
from jax_medllm.train.preference_losses import OBJECTIVES, Pairs, dpo, objective, rpo
from medllm.config import PreferenceLoss
from medllm.errors import UserError

POLICY = np.array([[-11.0, -9.5], [-4.25, -20.0], [-7.0, -7.5]])
REFERENCE = np.array([[-12.0, -9.0], [-4.5, -18.0], [-7.0, -6.0]])
LENGTHS = np.array([4.0, 2.0, 7.0])
MEAN = np.full(3, 1 / 3)
PAIRS = Pairs(POLICY, REFERENCE, np.stack([LENGTHS, [9.0, 5.0, 3.0]], axis=1), MEAN)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def dpo_of_formula(beta):
    delta = (POLICY - REFERENCE) @ [1.0, -1.0]
    return np.log1p(np.exp(-beta * delta))


def test_dpo_is_the_mean_of_minus_log_sigmoid():
    assert float(dpo_loss(POLICY, REFERENCE, MEAN, beta=0.3)) == pytest.approx(dpo_of_formula(0.3).mean(), rel=1e-14)


def test_dpo_is_ln_2_where_policy_and_reference_agree():
    assert float(dpo_loss(POLICY, POLICY, MEAN, beta=0.3)) == pytest.approx(np.log(2), rel=1e-15)


def test_dpo_stays_finite_and_exact_for_hopeless_pairs():
    policy = np.array([[-1e5, 0.0]])
    assert float(dpo_loss(policy, np.zeros((1, 2)), np.ones(1), beta=1.0)) == pytest.approx(1e5, rel=1e-15)


def test_dpo_gradient_is_minus_beta_times_sigmoid_of_the_negative_margin():
    gradient = jax.grad(lambda policy: dpo_loss(policy, REFERENCE, MEAN, beta=0.3))(POLICY)
    delta = (POLICY - REFERENCE) @ [1.0, -1.0]
    pull = 0.3 / (1 + np.exp(0.3 * delta)) / 3
    np.testing.assert_allclose(gradient, np.stack([-pull, pull], axis=1), rtol=1e-13)


def test_sequence_nll_divides_each_response_by_its_own_length():
    value = nll_loss(POLICY[:, 0], LENGTHS, MEAN, reduction="sequence")
    assert float(value) == pytest.approx((11 / 4 + 4.25 / 2 + 7 / 7) / 3, rel=1e-14)


def test_micro_batch_nll_is_one_token_mean():
    value = nll_loss(POLICY[:, 0], LENGTHS, MEAN, reduction="micro_batch_tokens")
    assert float(value) == pytest.approx((11 + 4.25 + 7) / 13, rel=1e-14)


def test_the_two_reductions_agree_on_a_single_pair():
    values = [
        float(nll_loss(POLICY[:1, 0], LENGTHS[:1], np.ones(1), reduction=reduction))
        for reduction in ("sequence", "micro_batch_tokens")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-14)


def test_rpo_is_dpo_plus_alpha_times_nll_and_logs_what_trl_logs():
    metrics = rpo(PAIRS, PreferenceLoss(beta=0.3, alpha=10.0))
    nll = (11 / 4 + 4.25 / 2 + 7 / 7) / 3
    assert float(metrics.loss) == pytest.approx(dpo_of_formula(0.3).mean() + 10 * nll, rel=1e-14)
    rewards = 0.3 * (POLICY - REFERENCE)
    assert float(metrics.dpo_loss) == pytest.approx(dpo_of_formula(0.3).mean(), rel=1e-14)
    assert float(metrics.nll) == pytest.approx(nll, rel=1e-14)
    assert float(metrics.rewards.chosen) == pytest.approx(rewards[:, 0].mean(), rel=1e-13)
    assert float(metrics.rewards.rejected) == pytest.approx(rewards[:, 1].mean(), rel=1e-13)
    assert float(metrics.rewards.margins) == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), rel=1e-13)
    assert float(metrics.rewards.accuracies) == pytest.approx(1.0)


def test_dpo_is_rpo_without_its_likelihood_term():
    metrics, without = dpo(PAIRS, PreferenceLoss("dpo", beta=0.3)), rpo(PAIRS, PreferenceLoss(beta=0.3, alpha=0.0))
    assert float(metrics.loss) == float(without.loss) == float(without.dpo_loss)
    assert metrics.rewards == without.rewards


RATIOS = POLICY - REFERENCE
MEANS, GAINS = POLICY / PAIRS.lengths, RATIOS / PAIRS.lengths
MARGINS, BY_TOKEN, PLAIN = (values @ [1.0, -1.0] for values in (RATIOS, GAINS, MEANS))


def softplus(x):
    return np.log1p(np.exp(x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (PreferenceLoss("cdpo", 0.3, label_smoothing=0.2), 0.8 * softplus(-0.3 * MARGINS) + 0.2 * softplus(0.3 * MARGINS)),
        (
            PreferenceLoss("robust", 0.3, label_smoothing=0.2),
            (0.8 * softplus(-0.3 * MARGINS) - 0.2 * softplus(0.3 * MARGINS)) / 0.6,
        ),
        (PreferenceLoss("hinge", 0.3), np.maximum(0, 1 - 0.3 * MARGINS)),
        (PreferenceLoss("ipo", 0.3), (BY_TOKEN - 1 / 0.6) ** 2),
        (PreferenceLoss("dpo_norm", 3.0), softplus(-3 * BY_TOKEN)),
        (
            PreferenceLoss("kto_pair", 0.3),
            1 - sigmoid(0.3 * (RATIOS[:, 0] - 0)) / 2 - sigmoid(0.3 * (RATIOS[:, 0].mean() - RATIOS[:, 1])) / 2,
        ),
        (PreferenceLoss("simpo", 2.0, gamma=0.7), softplus(0.7 - 2 * PLAIN)),
        (
            PreferenceLoss("orpo", 0.3),
            0.3 * softplus(np.log(np.exp(MEANS) / (1 - np.exp(MEANS))) @ [-1.0, 1.0]) - MEANS[:, 0],
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_loss_is_its_formula(settings, expected):
    """KTO's rejected responses have become less likely on average, so their divergence counts as 0."""
    metrics = objective(settings).metrics(PAIRS, settings)
    assert float(metrics.loss) == pytest.approx(expected.mean(), rel=1e-13)


def test_no_gradient_flows_through_ktos_point_of_reference():
    settings = PreferenceLoss("kto_pair", 0.3)
    gradient = jax.grad(lambda policy: objective(settings).metrics(PAIRS._replace(policy=policy), settings).loss)(POLICY)
    value = sigmoid(0.3 * RATIOS[:, 0])
    np.testing.assert_allclose(gradient[:, 0], -0.3 * value * (1 - value) / 2 / 3, rtol=1e-12)


def test_a_loss_without_a_reference_logs_what_it_compares():
    settings = PreferenceLoss("simpo", 2.0)
    metrics = objective(settings).metrics(PAIRS._replace(reference=None), settings)
    np.testing.assert_allclose([metrics.logps.chosen, metrics.logps.rejected], MEANS.mean(0), rtol=1e-13)
    assert float(metrics.rewards.margins) == pytest.approx(2 * PLAIN.mean(), rel=1e-13)
    assert float(metrics.rewards.accuracies) == pytest.approx((PLAIN > 0).mean())


def test_odds_of_a_response_that_is_all_but_certain_have_a_gradient():
    """In fp32, exp(-1e-9) is 1: log(1 - p) is not taken of it."""
    settings = PreferenceLoss("orpo")
    pairs = Pairs(*(None if part is None else jnp.asarray(part, jnp.float32) for part in PAIRS._replace(reference=None)))
    policy = jnp.full((3, 2), -1e-9, jnp.float32)
    gradient = jax.grad(lambda policy: objective(settings).metrics(pairs._replace(policy=policy), settings).loss)(policy)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_setting_that_a_loss_does_not_read_is_refused(name):
    others = {"alpha": 2.0, "nll_reduction": "micro_batch_tokens", "label_smoothing": 0.2, "gamma": 1.0}
    reads = OBJECTIVES[name].reads
    objective(PreferenceLoss(name, beta=0.3, **{one: value for one, value in others.items() if one in reads}))
    for one in others.keys() - set(reads):
        with pytest.raises(UserError, match=rf"loss\.{one} is .*, which loss '{name}' does not read; leave --loss\.{one} out"):
            objective(PreferenceLoss(name, **{one: others[one]}))


def test_a_name_that_no_objective_has_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"loss\.name is 'rop': engine jax knows 'rpo', .*; give one of these"):
        objective(PreferenceLoss("rop"))


def test_a_tie_is_not_counted_as_accurate():
    metrics = rpo(PAIRS._replace(reference=POLICY), PreferenceLoss(beta=0.3, alpha=0.0))
    assert float(metrics.rewards.accuracies) == 0


@pytest.mark.parametrize("reduction", ["sequence", "micro_batch_tokens"])
def test_a_pair_of_weight_zero_changes_nothing(reduction):
    settings = PreferenceLoss(beta=0.3, alpha=2.0, nll_reduction=reduction)
    padded = Pairs(*(np.concatenate([part, np.zeros_like(part[:1])]) for part in PAIRS))
    values = (jax.tree.leaves(rpo(pairs, settings)) for pairs in (PAIRS, padded))
    for plain, with_padding in zip(*values, strict=True):
        assert float(plain) == pytest.approx(float(with_padding), rel=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_changes_no_loss_and_no_gradient(name):
    settings, weights = PreferenceLoss(name), jnp.asarray(PAIRS.weights)

    def value(policy, pairs):
        return OBJECTIVES[name].metrics(pairs._replace(policy=policy), settings).loss

    padded = Pairs(*(jnp.concatenate([part, jnp.zeros_like(part[:1])]) for part in map(jnp.asarray, PAIRS)))
    plain = Pairs(*map(jnp.asarray, PAIRS))
    (loss, gradient), (with_padding, padded_gradient) = (
        jax.value_and_grad(value)(pairs.policy, pairs) for pairs in (plain, padded)
    )
    if name == "kto_pair":  # its estimate of the divergence is of a batch, which padding is no part of
        assert np.isfinite([float(loss), float(with_padding)]).all()
    assert float(with_padding) == pytest.approx(float(loss), rel=1e-12)
    np.testing.assert_allclose(padded_gradient[: len(weights)], gradient, rtol=1e-12)
    assert not np.asarray(padded_gradient[len(weights) :]).any()


def test_a_response_that_is_certain_has_finite_odds():
    certain = jnp.asarray(PAIRS.policy).at[0, 0].set(0.0)

    def value(policy):
        return OBJECTIVES["orpo"].metrics(Pairs(*map(jnp.asarray, PAIRS))._replace(policy=policy), PreferenceLoss("orpo")).loss

    loss, gradient = jax.value_and_grad(value)(certain)
    assert np.isfinite(float(loss))
    assert np.isfinite(np.asarray(gradient)).all()


def test_micro_batches_of_a_step_add_up_to_the_mean_over_its_pairs():
    def part(rows):
        return float(rpo(Pairs(*(array[rows] for array in PAIRS)), PreferenceLoss(beta=0.3, alpha=2.0)).loss)

    assert part(slice(0, 1)) + part(slice(1, 3)) == pytest.approx(part(slice(0, 3)), rel=1e-14)


def test_cpt_loss_is_the_mean_over_targets_only():
    logprobs, mask = np.log([[0.5, 0.25], [0.125, 0.9]]), np.array([[1.0, 1.0], [1.0, 0.0]])
    assert float(cpt_loss(logprobs, mask)) == pytest.approx(2 * np.log(2), rel=1e-14)
    assert float(cpt_loss(logprobs, mask, 6)) == pytest.approx(np.log(2), rel=1e-14)


def test_a_pair_leaves_out_the_tokens_it_counts_to_its_prompt():
    logprobs = jnp.array([[-99.0, -1.0, -2.0, -4.0, -8.0, -16.0], [-99.0, -99.0, -99.0, -3.0, -5.0, -7.0]])
    responses = jnp.array([[-1, 0, 0, 0, 1, 1], [-2, -1, -1, 0, 1, 1]])
    offsets = jnp.array([[0, 0, 1, 2, 0, 1], [0, 0, 1, 0, 0, 1]])
    pairs, starts = jnp.array([[[0, 1], [1, 0]], [[1, 0], [0, 0]]]), jnp.array([[0, 1], [0, 0]])
    sums, lengths = pair_logprobs(logprobs, responses, offsets, pairs, starts)
    np.testing.assert_array_equal(sums, [[[-7, -24], [-16, -6]], [[-12, -3], [-3, -3]]])
    np.testing.assert_array_equal(lengths, [[[3, 2], [1, 2]], [[2, 1], [1, 1]]])
