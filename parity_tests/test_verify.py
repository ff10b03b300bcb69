"""Honest runs are proved, on both engines; and each of twelve tamperings is named, by its step or its file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_medllm.engine
import jax_medllm.train.loop
import jax_medllm.train.optimizer
import medllm.stages.cpt
import torch_ref.cpt
from medllm.cli import main
from medllm.config import LoraConfig, ModelConfig, PreferenceLoss, TrainingConfig
from medllm.corpus.packing import PackedRows
from medllm.exam.loaders import write_problems
from medllm.exam.problem import Problem
from medllm.stages.cpt import run_cpt
from medllm.verify.findings import Finding
from medllm_parity.rough_steps import beyond_noise
from medllm_parity.tolerances import StepBounds, StepErrors
from parity_tests.verified_runs import (
    STEPS,
    TEXTS,
    copy_of,
    edit_settings,
    hide_changes,
    inputs,
    proved_steps,
    refuted,
    settings,
    step_table,
    train,
    verified,
    write_documents,
)

TRAINING = TrainingConfig(epochs=2, batch_size=1, accumulation=2, seed=5, checkpoint_every=1, remat="none")


@pytest.fixture(scope="module")
def given(tiny_model, tmp_path_factory) -> Path:
    return inputs(tmp_path_factory.mktemp("given") / "inputs", tiny_model())


@pytest.fixture(scope="module")
def honest(given, tmp_path_factory):
    """``honest(stage, engine)`` → the folder of an honest run, made once."""
    folder, made = tmp_path_factory.mktemp("honest"), {}

    def run(stage: str, engine: str) -> Path:
        if (stage, engine) not in made:
            made[stage, engine] = train(stage, engine, given, folder / f"{engine}-{stage}")
        return made[stage, engine]

    return run


@pytest.mark.parametrize("engine", ["jax", "torch"])
@pytest.mark.parametrize("stage", ["cpt", "rpo"])
def test_every_step_of_an_honest_run_is_proved(honest, stage, engine):
    certificate = verified(honest(stage, engine))
    assert certificate.verdict == "proved", certificate.headline()
    steps = proved_steps(certificate)
    assert [one.where for one in steps] == [f"step {number}" for number in range(1, STEPS + 1)]
    assert "from the seed of the adapter: loss, gradient norm, learning rate" in steps[0].said
    # The checkpoints of the last two steps are there: the first is walked to, the last step begins at it.
    assert "first moment, second moment; " in steps[4].said
    assert "first moment, second moment, update; " in steps[5].said
    assert f"from checkpoints/{'' if engine == 'jax' else 'checkpoint-'}5: " in steps[5].said


def test_every_step_of_a_loss_without_a_reference_is_proved(given, tmp_path):
    certificate = verified(train("rpo", "jax", given, tmp_path / "run", loss=PreferenceLoss("orpo", beta=0.5)))
    assert certificate.verdict == "proved", certificate.headline()
    assert len(proved_steps(certificate)) == STEPS


@pytest.mark.parametrize("handover", ["merge", "stack", "continue"])
def test_every_step_on_top_of_an_earlier_adapter_is_proved(given, honest, tmp_path, handover):
    model = ModelConfig(str(given / "base"), str(honest("cpt", "torch") / "adapter"), dtype="float32")
    certificate = verified(train("rpo", "torch", given, tmp_path / "run", model=model, handover=handover))
    assert certificate.verdict == "proved", certificate.headline()
    assert len(proved_steps(certificate)) == STEPS
    assert any(one.what == "what another run left" for one in certificate.of("proved"))


def test_a_swapped_batch_is_named_by_its_step(given, tmp_path, monkeypatch):
    plan = jax_medllm.engine.plan_steps

    def swapped(*arguments, **more):
        steps = plan(*arguments, **more)
        steps[1], steps[2] = steps[2], steps[1]
        return steps

    monkeypatch.setattr(jax_medllm.engine, "plan_steps", swapped)
    run = train("cpt", "jax", given, tmp_path / "run")
    monkeypatch.undo()
    said = refuted(verified(run))
    assert said[0].startswith("step 2: loss: ")
    assert "documents.jsonl:" in said[0]


def test_a_changed_learning_rate_is_named_by_its_step(given, honest, tmp_path, monkeypatch):
    other = dataclasses.replace(settings("cpt", given, tmp_path).optimizer, learning_rate=3e-3)
    run = copy_of(honest("cpt", "torch"), tmp_path)
    edit_settings(run, lambda plain: plain["optimizer"].update(learning_rate=other.learning_rate), hide=True)
    assert any(one.startswith("step 2: the learning rate of every line: 1.0") for one in refuted(verified(run, steps=0)))
    # The optimizer takes another rate than the one that is logged: what it makes of the adapter shows in the next loss.
    rate = jax_medllm.train.optimizer.learning_rate
    monkeypatch.setattr(jax_medllm.train.optimizer, "learning_rate", lambda _, *rest: rate(other, *rest))
    run = train("cpt", "jax", given, tmp_path / "run")
    monkeypatch.undo()
    said = refuted(verified(run))
    assert said[0].startswith("step 3: loss: ")
    assert any(one.startswith("step 6, checkpoints/6: update: ") for one in said)


def test_an_end_of_text_that_is_masked_out_is_named_by_its_step(given, tmp_path, monkeypatch):
    """Padding and end have one id here, as in many models: a mask of the padding by its id takes the ends with it."""
    features = torch_ref.cpt.RowFeatures

    class Masked(features):
        def __init__(self, rows):
            super().__init__(rows)
            self._labels = self._labels.masked_fill(self._tokens == int(rows.tokens[0, -1]), -100)

    monkeypatch.setattr(torch_ref.cpt, "RowFeatures", Masked)
    run = train("cpt", "torch", given, tmp_path / "run")
    monkeypatch.undo()
    assert refuted(verified(run))[0].startswith("step 1: loss: ")


def test_another_alpha_is_named_by_file_and_by_step(given, honest, tmp_path):
    run = copy_of(honest("cpt", "jax"), tmp_path)
    file = run / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 16.0}))
    said = refuted(verified(run, steps=0))
    assert "adapter/adapter_config.json: the files it left: is not what it was" in said
    assert "adapter/adapter_config.json: the adapter's settings: alpha is 16.0, in config.yaml 8.0" in said
    # All of the folder says the other one: with B still zero the loss is the same, its gradient is not.
    edit_settings(run, lambda plain: plain["lora"].update(alpha=16.0), hide=True)
    assert refuted(verified(run))[0].startswith("step 1: gradient norm: ")


def test_one_weight_edited_after_training_is_named(honest, tmp_path):
    run = copy_of(honest("rpo", "torch"), tmp_path)
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name][1, 2] = np.nextafter(tensors[name][1, 2], np.float32(1))
    save_file(tensors, file)
    assert "adapter/adapter_model.safetensors: the files it left: is not what it was" in refuted(verified(run, steps=0))
    hide_changes(run)
    (said,) = refuted(verified(run, steps=0))
    assert f"{name}: 1 of {tensors[name].size} numbers are not those of checkpoints/checkpoint-6" in said


def test_a_doubled_row_is_named(given, tmp_path, monkeypatch):
    pack = medllm.stages.cpt.pack

    def doubled(*arguments):
        rows = pack(*arguments)
        again = [*range(len(rows.tokens)), 0]
        documents = [rows.documents[row] for row in again]
        return PackedRows(rows.tokens[again], rows.segment_ids[again], rows.positions[again], documents)

    monkeypatch.setattr(medllm.stages.cpt, "pack", doubled)
    run = train("cpt", "jax", given, tmp_path / "run")
    monkeypatch.undo()
    said = refuted(verified(run))
    assert any(one.startswith("result.json: the data: rows: 7 were trained on, the files give 6") for one in said), said
    assert any(one.startswith("step 4: loss: ") for one in said), said  # until then the order of seven is that of six


def test_a_stale_reference_cache_is_named_by_its_file(given, tmp_path, monkeypatch):
    compute = jax_medllm.engine.compute_reference

    def of_a_moved_model(*arguments):
        return [sums - np.float32([0.5, 0.0]) for sums in compute(*arguments)]

    monkeypatch.setattr(jax_medllm.engine, "compute_reference", of_a_moved_model)
    run = train("rpo", "jax", given, tmp_path / "run")
    monkeypatch.undo()
    (file,) = run.glob("reference-*.safetensors")
    said = refuted(verified(run))
    assert said[0].startswith("step 1: loss: ")
    assert any(one.startswith(f"step 1: reference log-probabilities on disk: {file.name} is stale") for one in said)


def test_another_base_is_named_by_file_and_by_step(given, honest, tmp_path):
    other = Path(shutil.copytree(given / "base", tmp_path / "base"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= np.float32(1.01)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    run = copy_of(honest("cpt", "torch"), tmp_path)
    edit_settings(run, lambda plain: plain["model"].update(path=str(other)))
    said = refuted(verified(run, steps=0))
    assert "model.path: the files it was made from: model.safetensors is not what it was" in said
    hide_changes(run)
    assert refuted(verified(run))[0].startswith("step 1: loss: ")


@pytest.mark.parametrize("engine", ["torch"])  # the JAX engine's checkpoints know their data, and refuse other
def test_a_run_that_went_on_with_other_data_is_named_by_session_and_step(given, tmp_path, engine):
    mine = Path(shutil.copytree(given, tmp_path / "inputs"))
    before = (mine / "documents.jsonl").read_bytes()
    run = train("cpt", engine, mine, tmp_path / "run", training=dataclasses.replace(TRAINING, max_steps=3))
    write_documents(mine / "documents.jsonl", [text[::-1] for text in TEXTS])
    train("cpt", engine, mine, tmp_path / "run", resume=True)
    (mine / "documents.jsonl").write_bytes(before)
    said = refuted(verified(run))
    assert any("session 2 went on with another documents.jsonl (is not what it was)" in one for one in said)
    hide_changes(run)
    assert refuted(verified(run))[0].startswith("step 4: loss: ")


def test_a_gradient_reduced_twice_over_a_mesh_axis_is_named_by_its_step(given, tmp_path, monkeypatch):
    """Over an axis of two devices the sum of what both have already summed up is twice the gradient."""
    take = jax_medllm.train.loop.TrainingStep._run

    def reduced_again(step, part, *arguments):
        done = take(step, part, *arguments)
        return (jax.tree.map(lambda gradient: 2 * gradient, done[0]), done[1]) if part is step.gradients else done

    monkeypatch.setattr(jax_medllm.train.loop.TrainingStep, "_run", reduced_again)
    run = train("cpt", "jax", given, tmp_path / "run")
    monkeypatch.undo()
    said = refuted(verified(run))
    assert said[0].startswith("step 1: gradient norm: ")
    assert not any(one.startswith("step 1: loss") for one in said)


def test_an_exam_problem_in_the_documents_is_named(given, tmp_path):
    problem = Problem("112A1", "so it goes! and on", ("a fever", "a cold"), ("a",), year=2018)
    write_problems(tmp_path / "exam.jsonl", [problem])
    mine = Path(shutil.copytree(given, tmp_path / "inputs"))
    write_documents(mine / "documents.jsonl", ["rest: it helps", "so it goes! and on: a fever a cold a"])
    run = tmp_path / "run"
    run_cpt(settings("cpt", mine, run), "torch")
    said = refuted(verified(run, steps=0, exam=(str(tmp_path / "exam.jsonl"),)))
    assert len(said) == 1
    assert "documents.jsonl:2: no exam in the data: problem 112A1 of the exam: 100% of it" in said[0]


def test_the_page_has_the_tolerances():
    assert step_table() in (Path(__file__).parents[1] / "docs" / "verify.md").read_text(encoding="utf-8")


def test_a_step_out_of_reach_is_not_said_to_be_proved(honest, tmp_path):
    run = copy_of(honest("cpt", "jax"), tmp_path)
    certificate = verified(run, reach=2)
    assert certificate.verdict == "proved"
    assert [one.where for one in proved_steps(certificate)] == ["step 1", "step 2", "step 6"]
    assert any(one.said.startswith("3 steps are not within --reach 2") for one in certificate.of("not checked"))
    certificate = verified(run, steps=0)
    assert (certificate.verdict, certificate.missing) == ("nothing proved", ["optimizer steps taken anew"])


def test_where_no_step_is_within_reach_the_one_that_would_do_is_said(honest, tmp_path):
    run = copy_of(honest("cpt", "jax"), tmp_path)
    shutil.rmtree(run / "checkpoints")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] % 3 == 0))
    certificate = verified(run, reach=2)
    assert any(one.said.endswith("; --reach 3 takes the first") for one in certificate.of("not checked"))
    assert not proved_steps(certificate)


def test_the_command_writes_a_certificate_without_folders_of_this_machine(honest, tmp_path, capsys):
    run, out = copy_of(honest("cpt", "jax"), tmp_path), tmp_path / "out"
    assert main(["verify", str(run), "--steps", "1", "--out", str(out)]) == 0
    assert "verify: jax-cpt: proved: " in capsys.readouterr().out
    edit_settings(run, lambda plain: plain["optimizer"].update(betas=[0.5, 0.9]), hide=True)
    (run / "adapter" / "adapter_config.json").write_text("<b>")
    assert main(["verify", str(run), "--steps", "99", "--out", str(out)]) == 1
    assert "REFUTED: " in capsys.readouterr().out
    result, page = json.loads((out / "certificate.json").read_text()), (out / "certificate.html").read_text(encoding="utf-8")
    assert (result["ok"], result["verdict"]) == (False, "refuted")
    for text in (json.dumps(result), page):
        assert str(tmp_path) not in text
        assert "/inputs/documents.jsonl" not in text
    assert "<b>" not in page.replace("<b>taken anew</b>", "")
    assert "default-src 'none'" in page
    assert "http://" not in page
    assert "https://" not in page
    assert main(["verify", str(out)]) == 2


def test_a_run_in_bf16_on_a_4_bit_base_that_logs_every_other_step_is_proved(given, tmp_path):
    training = dataclasses.replace(TRAINING, log_every=2, checkpoint_every=3)
    model = ModelConfig(str(given / "base"), dtype="bfloat16", quantization="nf4")
    lora = LoraConfig(rank=4, targets=("q_proj", "up_proj"), rank_pattern={"layers.1.mlp.up_proj": 2})
    certificate = verified(train("cpt", "torch", given, tmp_path / "run", training=training, model=model, lora=lora))
    assert certificate.verdict == "proved", certificate.headline()
    # A line tells of two steps. The adapter of step 3 is known and not compared: after three steps bf16 has gone its own way.
    assert [one.where for one in proved_steps(certificate)] == ["step 2", "step 4", "step 6"]


def test_a_walk_that_begins_on_the_way_of_another_goes_on_from_there(given, tmp_path):
    """Lines tell of two steps and checkpoints are three apart: to step 6 it is walked from 3, and to step 4 from 0."""
    training = dataclasses.replace(TRAINING, log_every=2, checkpoint_every=3)
    certificate = verified(train("cpt", "torch", given, tmp_path / "run", training=training))
    assert certificate.verdict == "proved", certificate.headline()
    assert [one.where for one in proved_steps(certificate)] == [f"step {number}" for number in (2, 3, 4, 6)]


def test_noise_excuses_nothing_that_needs_no_gradient_nor_a_loss_far_beyond_it():
    own = StepErrors(loss=0.01, norm=0.6, moments=3.0, reference=0.0)
    refuted_ones = [
        Finding("loss", "refuted", error=0.2),
        Finding("loss", "refuted", error=0.7),
        Finding("gradient norm", "refuted", error=2.0),
        Finding("gradient norm", "refuted"),
        Finding("learning rate", "refuted", error=0.1),
        Finding("update", "refuted", error=0.1),
        Finding("update", "proved", error=0.0),
    ]
    assert beyond_noise(refuted_ones, own) == [refuted_ones[number] for number in (1, 3, 4, 5)]
    assert beyond_noise(refuted_ones[:2], dataclasses.replace(own, loss=0.4)) == []


def rough_inputs(folder: Path, model: Path, scores: float) -> tuple[Path, ModelConfig]:
    """A model whose attention scores are large: they magnify what bf16 rounds."""
    given = inputs(folder, model)
    file = given / "base" / "model.safetensors"
    tensors = load_file(file)
    factor = np.float32(np.sqrt(scores))
    scaled = {name: value * factor for name, value in tensors.items() if name.endswith(("q_proj.weight", "k_proj.weight"))}
    save_file(tensors | scaled, file, {"format": "pt"})
    return given, ModelConfig(str(given / "base"), dtype="bfloat16")


@pytest.mark.parametrize(("stage", "engine"), [("cpt", "torch"), ("rpo", "jax")])
def test_where_bf16_is_rough_its_own_error_is_measured_and_allowed_for(tiny_model, tmp_path, stage, engine):
    given, model = rough_inputs(tmp_path / "given", tiny_model(), 9)
    run = train(stage, engine, given, tmp_path / "run", model=model)
    certificate = verified(run)
    assert certificate.verdict == "proved", certificate.headline()
    assert len(proved_steps(certificate)) == STEPS
    # Held against the table alone it would not be.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepBounds, "widened", lambda bounds, own: bounds)
        assert verified(run).verdict == "refuted"
    # What is tampered with is named all the same.
    edit_settings(run, lambda plain: plain["lora"].update(alpha=16.0), hide=True)
    assert any(one.startswith("step 1: gradient norm: ") for one in refuted(verified(run)))


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_where_bf16_is_all_noise_nothing_is_proved_and_nobody_accused(tiny_model, tmp_path, engine):
    given, model = rough_inputs(tmp_path / "given", tiny_model(), 4096)
    certificate = verified(train("cpt", engine, given, tmp_path / "run", model=model))
    assert certificate.verdict == "nothing proved", certificate.headline()
    assert any("bfloat16 itself is" in one.said for one in certificate.of("not checked"))
