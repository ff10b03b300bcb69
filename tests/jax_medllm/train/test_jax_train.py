"""Batches, their order, and the training loop."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.model.rows import buckets, round_up
from jax_medllm.train.batches import CptData, PreferenceData, cpt_step, plan_steps, single_pairs
from jax_medllm.train.loop import cpt_loss_fn, preference_loss_fn, train
from medllm.config import LoraConfig, OptimizerConfig, PreferenceLoss, RematPolicy, TrainingConfig
from medllm.corpus.packing import PackedRows, target_mask
from medllm.errors import UserError
from medllm.preferences.tokenization import TokenizedGroup
from medllm.run import Run
from tests.small_model import small_config

SMALL = small_config()
RATE = OptimizerConfig(learning_rate=2e-2, warmup_ratio=0.0)


def small_model(dtype=jnp.float32):
    return DenseDecoder(SMALL, lora=LoraConfig(rank=4, alpha=8), dtype=dtype, rngs=nnx.Rngs(0))


def rows(count=6, length=16):
    random = np.random.default_rng(0)
    segment_ids = np.ones((count, length), np.int32)
    segment_ids[:, 9:] = 2
    segment_ids[::2, 13:] = 0
    positions = np.tile(np.r_[np.arange(9), np.arange(length - 9)].astype(np.int32), (count, 1))
    return PackedRows(random.integers(1, 53, (count, length)).astype(np.int32), segment_ids, positions)


def groups(count=4, seed=0):
    random = np.random.default_rng(seed)

    def text(longest):
        return tuple(random.integers(1, 53, random.integers(2, longest)).tolist())

    def responses():
        first, second, third = text(9), text(9), text(9)
        return first, second, (first[0], *third)  # the pair (0, 2) counts the token they share to its prompt

    pairs = ((0, 1), (0, 2), (1, 2))
    return [TokenizedGroup(f"p{i}", text(20), responses(), (0, 1, 2), pairs, (0, 1, 0)) for i in range(count)]


def train_cpt(model, config, optimizer, run):
    data = CptData(rows(), plan_steps(len(rows().tokens), config))
    return train(model, cpt_loss_fn, data, optimizer, config, run, settings={})


def gradient_of_step(loss_fn, model, batches):
    graph, trainable, frozen = nnx.split(model, LoraParam, ...)

    def total(trainable):
        merged = nnx.merge(graph, trainable, frozen)
        return sum(loss_fn(merged, jax.tree.map(jnp.asarray, batch))[0] for batch in batches)

    return jax.jit(jax.value_and_grad(total))(trainable)


def assert_same(one, other, tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 9), st.booleans())
def test_every_epoch_takes_every_unit_once_in_an_order_fixed_by_the_seed(units, size, accumulation, epochs, seed, by_size):
    config = TrainingConfig(epochs=epochs, batch_size=size, accumulation=accumulation, seed=seed)
    plan = partial(plan_steps, units, config, size_of=(lambda unit: unit % 3) if by_size else None)
    steps = plan()
    assert steps == plan()
    assert len(steps) == epochs * -(-units // (size * accumulation))
    for epoch in range(epochs):
        taken = [unit for step in steps if step.epoch == epoch for micro in step.micro_batches for unit in micro]
        assert sorted(taken) == list(range(units))
    assert all(len(step.micro_batches) <= accumulation for step in steps)


def test_another_epoch_and_another_seed_are_another_order():
    config = TrainingConfig(epochs=2, batch_size=40, accumulation=1)
    first, second = (step.micro_batches[0] for step in plan_steps(40, config))
    other = plan_steps(40, TrainingConfig(epochs=1, batch_size=40, accumulation=1, seed=5))[0].micro_batches[0]
    assert first != second
    assert first != other


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 5))
def test_buckets_cover_every_size_with_few_multiples(sizes, at_most):
    menu = buckets(sizes, multiple=64, at_most=at_most)
    assert len(menu) <= at_most
    assert menu[-1] >= max(sizes)
    assert menu[-1] - max(sizes) < 64
    assert all(size % 64 == 0 for size in menu)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 4), st.sampled_from([0.0, 0.05, 0.2]))
def test_buckets_are_the_fewest_that_keep_the_padding_low_and_no_others_need_less(sizes, at_most, padding):
    def padded(menu):
        return sum(round_up(size, menu) for size in sizes)

    others = [
        (*chosen, max(sizes)) for count in range(at_most) for chosen in combinations(sorted(set(sizes) - {max(sizes)}), count)
    ]
    menu = buckets(sizes, multiple=1, at_most=at_most, padding=padding)
    assert padded(menu) == min(padded(other) for other in others if len(other) <= len(menu))
    enough = sum(sizes) / (1 - padding)
    assert padded(menu) <= enough or len(menu) == min(at_most, len(set(sizes)))
    assert all(padded(other) > enough for other in others if len(other) < len(menu))


def test_a_target_is_a_token_of_the_same_document_as_the_one_before():
    np.testing.assert_array_equal(target_mask(np.array([[1, 1, 2, 2, 0, 0]])), [[True, False, True, False, False]])


def pair_in(rows, row, pair):
    """Prompt, chosen and rejected tokens of a pair in a row."""
    responses, before = [rows.responses[row] == number for number in pair], (rows.segment_ids[row] == 1).sum()
    for inside in responses:  # each reads the prompt's last token first, then its own tokens but for the last
        assert rows.tokens[row][inside][1:].tolist() == rows.targets[row][inside][:-1].tolist()
        np.testing.assert_array_equal(rows.positions[row][inside], before + np.arange(inside.sum()))
    (last,) = {int(rows.tokens[row][inside][0]) for inside in responses}
    prompt = (*rows.tokens[row][rows.segment_ids[row] == 1].tolist(), last)
    return prompt, *(tuple(rows.targets[row][inside].tolist()) for inside in responses)


def test_preference_batches_hold_every_pair_once_with_the_tokens_of_its_responses():
    config = TrainingConfig(epochs=1, batch_size=3, accumulation=2)
    units = groups(7)
    data = PreferenceData(units, config)
    seen = []
    for step in data.steps:
        batches = data.batches(step)
        assert sum(part.weights.sum() for part in batches) == pytest.approx(1)
        for batch, units_of in zip(batches, step.micro_batches, strict=True):
            assert len(batch.weights) == len(units_of)
            for row, pair in np.argwhere(batch.weights):
                seen.append((*pair_in(batch.responses, row, batch.pairs[row, pair]), int(batch.starts[row, pair])))
    expected = [
        (unit.prompt, unit.responses[high], unit.responses[low], start)
        for unit in units
        for (high, low), start in zip(unit.pairs, unit.pair_starts, strict=True)
    ]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("remat", get_args(RematPolicy))
def test_cpt_accumulation_is_one_global_token_mean(remat):
    data = rows()
    with jax.enable_x64(True):
        model = small_model(jnp.float64)
        results = []
        for size, accumulation in ((6, 1), (4, 2)):
            config = TrainingConfig(epochs=1, batch_size=size, accumulation=accumulation)
            (step,) = plan_steps(6, config)
            results.append(gradient_of_step(partial(cpt_loss_fn, remat=remat), model, cpt_step(data, step)))
        hidden = model.hidden(data.tokens, segment_ids=data.segment_ids, positions=data.positions)
        logs = jax.nn.log_softmax(model.logits(hidden))[:, :-1]
        picked = np.take_along_axis(np.asarray(logs), data.tokens[:, 1:, None], axis=-1)[..., 0]
        assert float(results[0][0]) == pytest.approx(-picked[target_mask(data.segment_ids)].mean(), rel=1e-12)
        assert_same(results[0], results[1], 1e-13)


def test_preference_loss_and_gradient_are_the_same_by_problem_and_by_pair_however_they_are_batched():
    loss_fn = partial(preference_loss_fn, loss_config=PreferenceLoss(beta=0.2, alpha=3.0))
    with jax.enable_x64(True):
        model = small_model(jnp.float64)
        state = nnx.state(model, LoraParam)
        nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.02 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape)), state))
        results = []
        for units, size, accumulation in ((groups(), 2, 2), (single_pairs(groups()), 12, 1)):
            config = TrainingConfig(epochs=1, batch_size=size, accumulation=accumulation)
            data = PreferenceData(units, config)
            (step,) = data.steps
            results.append(gradient_of_step(loss_fn, model, data.batches(step)))
    assert float(results[0][0]) > 0
    assert_same(results[0], results[1], 1e-11)


def test_dpo_starts_at_ln_2_and_only_the_adapter_moves(tmp_path):
    model, config = small_model(), TrainingConfig(epochs=8, batch_size=2, accumulation=2)
    before = jax.tree.map(np.asarray, nnx.split(model, LoraParam, ...)[2])
    data = PreferenceData(groups(), config)
    loss_fn = partial(preference_loss_fn, loss_config=PreferenceLoss(alpha=1.0))
    run = Run(tmp_path / "run", config)
    trained = train(model, loss_fn, data, RATE, config, run, settings={})
    lines = run.metrics()
    assert lines[0]["dpo_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert lines[0]["rewards/accuracies"] == 0  # policy and reference are the same model, to the bit
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]
    assert lines[-1]["rewards/accuracies"] > 0.5
    assert (trained.steps, trained.loss) == (8, lines[-1]["loss"])
    _, adapter, frozen = nnx.split(model, LoraParam, ...)
    assert_same(before, frozen, 0)
    ups = [np.asarray(variable[...]) for path, variable in nnx.to_flat_state(adapter) if path[-1] == "B"]
    assert len(ups) == 7
    assert all(np.abs(up).max() > 0 for up in ups)


def test_training_lowers_the_loss_and_an_interval_or_an_early_stop_changes_only_what_is_logged(tmp_path):
    every = TrainingConfig(epochs=4, batch_size=3, accumulation=1)
    short = TrainingConfig(epochs=4, batch_size=3, accumulation=1, max_steps=6, log_every=4)
    lines = []
    for name, config in (("every", every), ("short", short)):
        run = Run(tmp_path / name, config)
        train_cpt(small_model(), config, RATE, run)
        lines.append(run.metrics())
    fine, coarse = lines
    losses = [line["loss"] for line in fine]
    assert losses[-1] < losses[0] - 0.05
    assert [line["step"] for line in coarse] == [4, 6]
    assert [line["loss"] for line in coarse] == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:6])])
    assert [line["learning_rate"] for line in coarse] == [fine[3]["learning_rate"], fine[5]["learning_rate"]]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    config = TrainingConfig(epochs=3, batch_size=6, accumulation=1)
    huge = OptimizerConfig(learning_rate=1e30, warmup_ratio=0.0)
    with pytest.raises(UserError, match=r"step 2: the loss is (nan|inf)"):
        train_cpt(small_model(), config, huge, Run(tmp_path / "run", config))
