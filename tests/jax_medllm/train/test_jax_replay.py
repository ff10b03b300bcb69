"""A micro-batch computed layer by layer is what a training step computes, and the first tensor that is not finite is named."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_medllm.model import decoder
from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.train.batches import CptData, PreferenceData, plan_steps
from jax_medllm.train.checkpoint import Checkpoints, restore_before
from jax_medllm.train.loop import cpt_loss_fn, make_gradients, preference_loss_fn
from jax_medllm.train.replay import arrays_of, batch_of, replay
from medllm.config import LoraConfig, PreferenceLoss, TrainingConfig
from medllm.corpus.packing import PackedRows
from medllm.errors import UserError
from medllm.preferences.tokenization import TokenizedGroup
from medllm.replay import Batch, Part, read_batch
from tests.small_model import small_config

PART = Part(1, "documents d1", True)
TRAINING = TrainingConfig(epochs=1, batch_size=2, accumulation=1)
SPOILED = 777.0


@pytest.fixture(scope="module")
def cpt():
    """A micro-batch of packed rows, and its loss."""
    tokens = np.random.default_rng(0).integers(1, 53, (2, 16)).astype(np.int32)
    segments = np.repeat([[1] * 9 + [2] * 5 + [0] * 2], 2, axis=0).astype(np.int32)
    positions = np.repeat([[*range(9), *range(5), 0, 0]], 2, axis=0).astype(np.int32)
    data = CptData(PackedRows(tokens, segments, positions), plan_steps(2, TRAINING))
    return data.batches(data.steps[0])[0], cpt_loss_fn


@pytest.fixture(scope="module")
def rpo():
    """A micro-batch of problems with their responses, and its loss."""
    draw = np.random.default_rng(1)
    groups = [
        TokenizedGroup(
            problem_id=f"p{number}",
            prompt=tuple(draw.integers(1, 53, 5).tolist()),
            responses=tuple(tuple(draw.integers(1, 53, size).tolist()) for size in (4, 6)),
            ranks=(0, 1),
            pairs=((0, 1),),
            pair_starts=(0,),
        )
        for number in range(2)
    ]
    data = PreferenceData(groups, TRAINING)
    return data.batches(data.steps[0])[0], partial(preference_loss_fn, loss_config=PreferenceLoss())


def small_model(change=lambda layers: None):
    """A model whose adapter changes something, its stacked layers changed."""
    model = DenseDecoder(small_config(), lora=LoraConfig(rank=4, alpha=8), rngs=nnx.Rngs(0))
    for number, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(model, LoraParam))):
        variable[...] = 0.1 * jax.random.normal(jax.random.key(number), variable[...].shape)
    change(model.layers)
    return model


def scale(path, layer, by):
    """Multiply the weight of a linear in a layer; by NaN or so: one number of it."""

    def change(layers):
        weight = getattr(getattr(layers, path.split(".")[0]), path.split(".")[1]).weight
        weight[...] = weight[...].at[layer].multiply(by) if np.isfinite(by) else weight[...].at[layer, 0, 0].set(by)

    return change


@pytest.mark.parametrize("kind", ["cpt", "rpo"])
def test_what_is_computed_alone_is_what_a_step_computes(kind, request, tmp_path):
    batch, loss_fn = request.getfixturevalue(kind)
    kept = Batch(kind, "jax", 3, "said", [PART], [arrays_of(batch)])
    again = read_batch(kept.keep(tmp_path))
    assert (again.said, again.step, again.parts) == ("said", 3, [PART])
    model = small_model()
    found = replay(model, loss_fn, batch_of(again, again.arrays[0]), PART)
    graph, trainable, frozen = nnx.split(model, LoraParam, ...)
    gradients, metrics = make_gradients(graph, loss_fn)(trainable, frozen, jax.tree.map(jnp.asarray, batch))
    assert found.loss == pytest.approx(float(metrics.loss), rel=1e-6)
    assert found.gradient_norm == pytest.approx(float(optax.global_norm(gradients)), rel=1e-5)
    of_b = gradients["layers"]["mlp"]["up_proj"]["lora"]["B"][...]
    readings = {(one.layer, one.what): one.largest for one in found.readings}
    for layer in range(2):
        expected = float(jnp.abs(of_b[layer]).max())
        assert readings[layer, "gradient of mlp.up_proj.lora_B"] == pytest.approx(expected, rel=1e-4)
    assert found.finite
    assert found.verdict() == "all of it is finite"


@pytest.mark.parametrize(
    ("kind", "change", "first"),
    [
        ("cpt", scale("self_attn.o_proj", 1, np.nan), "layer 1: o_proj output"),
        ("cpt", scale("self_attn.v_proj", 0, np.inf), "layer 0: v"),
        ("rpo", scale("mlp.down_proj", 0, np.nan), "layer 0: down"),
        (
            "cpt",
            lambda layers: [scale(f"mlp.{one}", 1, 1e25)(layers) for one in ("gate_proj", "up_proj")],
            "layer 1: activation",
        ),
    ],
)
def test_the_first_tensor_that_is_not_finite_is_named(kind, change, first, request):
    batch, loss_fn = request.getfixturevalue(kind)
    found = replay(small_model(change), loss_fn, batch, PART)
    assert not found.finite
    assert found.first.words.startswith(first)
    assert all(np.isfinite(one.largest) for one in found.readings)


@jax.custom_vjp
def _infinite_behind(x, marker):
    return x


_infinite_behind.defvjp(
    lambda x, marker: (x, marker), lambda marker, slope: (jnp.where(marker == SPOILED, jnp.inf, 1.0) * slope, None)
)


def test_an_infinity_in_the_gradient_alone_is_named_by_its_layer(cpt, monkeypatch):
    computed = decoder.Mlp.__call__

    def spoiled(self, x, adapter):
        return _infinite_behind(computed(self, x, adapter), getattr(self.down_proj, "_module", self.down_proj).weight[0, 0])

    def change(layers):
        weight = layers.mlp.down_proj.weight
        weight[...] = weight[...].at[1, 0, 0].set(SPOILED)

    monkeypatch.setattr(decoder.Mlp, "__call__", spoiled)
    batch, loss_fn = cpt
    found = replay(small_model(change), loss_fn, batch, PART)
    assert np.isfinite(found.loss)
    assert found.first.words == "layer 1: gradient of mlp.down_proj.lora_A"
    wrong = {one.layer for one in found.readings if one.wrong and one.layer is not None}
    assert wrong == {0, 1}
    (top,) = [one for one in found.readings if (one.layer, one.what) == (1, "gradient of layer output")]
    assert not top.wrong


def test_the_newest_whole_checkpoint_before_the_step_is_read_and_nothing_touched(tmp_path):
    folder = tmp_path / "checkpoints"
    with_some = Checkpoints(folder, {}, keep=9)
    for step in (2, 4, 6):
        with_some.save({"a": jnp.full(3, step)}, step)
    with_some.close()
    (folder / "6" / "_CHECKPOINT_METADATA").unlink()
    (folder / "4" / "checksums.json").unlink()
    before = sorted(folder.rglob("*"))
    state, done = restore_before(folder, {"a": jnp.zeros(3, int)}, 6)
    assert (done, state["a"].tolist()) == (2, [2, 2, 2])
    assert restore_before(folder, {"a": jnp.zeros(3, int)}, 2)[1] == 0
    assert restore_before(tmp_path / "none", {"a": jnp.zeros(3, int)}, 2)[1] == 0
    with pytest.raises(UserError, match="2: cannot be read as what this version writes"):
        restore_before(folder, {"b": jnp.zeros(3, int)}, 3)
    assert sorted(folder.rglob("*")) == before


def test_a_batch_of_another_kind_is_refused(cpt):
    batch, _ = cpt
    wrong = Batch("cpt", "jax", 3, "", [PART], [{"tokens": batch.tokens}])
    with pytest.raises(UserError, match="step 3 has not the arrays of a micro-batch"):
        batch_of(wrong, wrong.arrays[0])
    assert dataclasses.is_dataclass(batch_of(dataclasses.replace(wrong, arrays=[arrays_of(batch)]), arrays_of(batch)))
