"""The reference's log-probabilities kept on disk: the same training, found by content, refused where damaged."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_medllm.model.decoder import DenseDecoder, LoraParam
from jax_medllm.train import reference_cache as reference
from jax_medllm.train.batches import PreferenceData
from jax_medllm.train.loop import CptMetrics, preference_loss_fn, train
from jax_medllm.train.preference_losses import OBJECTIVES, Objective
from jax_medllm.train.reference_cache import ReferenceFile, compute_reference
from medllm.config import LoraConfig, ModelConfig, OptimizerConfig, PreferenceLoss, TrainingConfig
from medllm.errors import UserError
from medllm.preferences.tokenization import TokenizedGroup
from medllm.run import Run
from tests.small_model import small_config

PAIRS = ((0, 1), (0, 2), (1, 2))
TRAINING = TrainingConfig(epochs=3, batch_size=2, accumulation=2, remat="layer")


def groups(count=4):
    draw = np.random.default_rng(0)

    def text(longest):
        return tuple(draw.integers(1, 53, draw.integers(2, longest)).tolist())

    return [TokenizedGroup(f"p{i}", text(20), (text(9), text(9), text(40)), (2, 1, 0), PAIRS, (0, 1, 0)) for i in range(count)]


def small_model(dtype=jnp.float32):
    return DenseDecoder(small_config(), lora=LoraConfig(rank=4, alpha=8), dtype=dtype, rngs=nnx.Rngs(0))


def trained(folder, dtype, kept):
    """Logged lines and the adapter of a run whose reference is computed in each step, or read from ``kept``."""
    model = small_model(dtype)
    data = PreferenceData(groups(), TRAINING)
    if kept is not None:
        data = data.with_reference(kept)
    loss = partial(preference_loss_fn, loss_config=PreferenceLoss(beta=0.5, alpha=1.0), remat=TRAINING.remat)
    run = Run(folder, TRAINING)
    train(model, loss, data, OptimizerConfig(learning_rate=2e-2, warmup_ratio=0.0), TRAINING, run, settings={})
    timed = {"pairs_per_second", "seconds", "compile_seconds"}
    lines = [{name: value for name, value in line.items() if name not in timed} for line in run.metrics()]
    return lines, [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, LoraParam))]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
def test_a_run_with_the_reference_on_disk_is_the_run_that_computes_it(tmp_path, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        model = small_model(jnp.dtype(dtype))
        (tmp_path / "base").mkdir()
        file = ReferenceFile(tmp_path / "kept", ModelConfig(str(tmp_path / "base")), groups())
        assert file.read() is None
        file.write(compute_reference(model, PreferenceData(groups(), TRAINING)))
        kept = file.read()
        assert [values.shape for values in kept] == [(3, 2)] * 4
        in_step, with_disk = trained(tmp_path / "step", dtype, None), trained(tmp_path / "disk", dtype, kept)
    assert len(in_step[0]) == len(with_disk[0]) == 3
    assert in_step[0][-1]["rewards/margins"] > 0.05
    assert {line["rewards/accuracies"] for line in with_disk[0][:1]} == {0.0}  # a fresh adapter's rewards are zero, to the bit
    for expected, found in zip(in_step[0], with_disk[0], strict=True):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    for expected, found in zip(in_step[1], with_disk[1], strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def passes(loss, model, batch):
    """Loops over layers and over the head of a micro-batch's loss, as many times as it reads the model."""
    return str(jax.make_jaxpr(lambda given: loss(model, given)[0])(batch)).count("scan[")


def test_a_step_that_knows_the_reference_computes_the_policy_alone():
    model = small_model()
    data = PreferenceData(groups(), TRAINING)
    (batch, *_), loss = data.batches(data.steps[0]), partial(preference_loss_fn, loss_config=PreferenceLoss())
    known = dataclasses.replace(batch, reference=np.zeros(batch.pairs.shape))
    layers = [passes(loss, model, part) for part in (batch, known)]
    assert layers[0] == 2 * layers[1] > 0


def test_an_objective_that_reads_no_reference_computes_none(monkeypatch):
    def likelihood(pairs, settings):
        assert pairs.reference is None
        return CptMetrics(-(pairs.weights * (pairs.policy / pairs.lengths)[:, 0]).sum())

    monkeypatch.setitem(OBJECTIVES, "likelihood", Objective(likelihood, reference=False))
    model, data = small_model(), PreferenceData(groups(), TRAINING)
    batch = data.batches(data.steps[0])[0]
    without, dpo = (
        passes(partial(preference_loss_fn, loss_config=PreferenceLoss(name)), model, batch) for name in ("likelihood", "dpo")
    )
    assert dpo == 2 * without > 0


@pytest.fixture
def folders(tmp_path):
    """A model's folder and an adapter's, as far as their contents tell them apart."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, config, weights in (
        (base, "config.json", "model.safetensors"),
        (adapter, "adapter_config.json", "adapter_model.safetensors"),
    ):
        folder.mkdir()
        (folder / config).write_text("{}")
        (folder / weights).write_bytes(bytes(100_000))
    return base, adapter


def changed_byte(file):
    content = bytearray(file.read_bytes())
    content[77_777] ^= 1
    file.write_bytes(content)


def test_other_weights_another_adapter_other_data_and_other_arithmetic_are_another_file(tmp_path, folders):
    base, adapter = folders
    model = ModelConfig(str(base), adapter=str(adapter))

    def name(model=model, data=None):
        return ReferenceFile(tmp_path / "kept", model, data or groups()).path.name

    names = [
        name(),
        name(dataclasses.replace(model, adapter=None)),
        name(dataclasses.replace(model, quantization="nf4")),
        name(dataclasses.replace(model, dtype="float32")),
        name(data=groups(3)),
        name(data=[dataclasses.replace(group, pair_starts=(0, 0, 0)) for group in groups()]),
    ]
    assert name() == names[0]
    assert name(ModelConfig(str(base.rename(tmp_path / "moved")), adapter=str(adapter))) == names[0]
    moved = ModelConfig(str(tmp_path / "moved"), adapter=str(adapter))
    changed_byte(adapter / "adapter_model.safetensors")
    names.append(name(moved))
    changed_byte(tmp_path / "moved" / "model.safetensors")
    names.append(name(moved))
    (tmp_path / "moved" / "config.json").write_text('{"rms_norm_eps": 1e-5}')
    names.append(name(moved))
    assert len(set(names)) == len(names) == 9


@pytest.mark.parametrize("damage", ["cut", "a bit", "another checksum"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, folders, damage):
    file = ReferenceFile(tmp_path / "kept", ModelConfig(str(folders[0])), groups())
    file.write([np.full((3, 2), -7.0, np.float32)] * 4)
    content = bytearray(file.path.read_bytes())
    if damage == "cut":
        content = content[:-5]
    elif damage == "a bit":
        content[-5] ^= 1
    else:
        content = content.replace(b"checksum", b"chicksum")
    file.path.write_bytes(content)
    with pytest.raises(UserError, match=r"reference-.*cannot be read .*; remove the file") as caught:
        file.read()
    assert "\n" not in str(caught.value)


def test_nothing_half_written_is_left(tmp_path, folders, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(reference, "save_file", fail)
    file = ReferenceFile(tmp_path / "kept", ModelConfig(str(folders[0])), groups())
    with pytest.raises(OSError, match="disk full"):
        file.write([np.zeros((3, 2))] * 4)
    assert list((tmp_path / "kept").iterdir()) == []
