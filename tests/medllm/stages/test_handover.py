"""Handing stage 1's adapter to stage 2: what is refused, what is written, how it is resumed and measured."""

import dataclasses
import importlib
import json

import numpy as np
import pytest

from medllm.cli import main
from medllm.config import LoraConfig, ModelConfig, OptimizerConfig, PairConfig, TrainingConfig
from medllm.engines import HOMES, load
from medllm.errors import UserError
from medllm.mini.study import BASE
from medllm.model.adapter import merge_adapter, module_name, read_adapter, tensor_name, write_adapter
from medllm.model.directory import ModelDirectory, write_model
from medllm.model.random import write_random_model
from medllm.preferences.records import Preference, Sample, write_preferences
from medllm.stage_config import RpoConfig
from medllm.stages.handover import continued_adapter
from medllm.stages.rpo import run_rpo
from tests.refusal import refused

CPT = LoraConfig(rank=2, alpha=4.0, rank_pattern={"down_proj": 3})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two layers with the embedded tokenizer, an adapter whose B is not zero, preferences and a text."""
    path = tmp_path_factory.mktemp("handover")
    write_random_model(path / "base", tokenizer=str(BASE), vocab_size=1280, hidden_size=64, layers=2)
    base, rng, tensors = ModelDirectory(path / "base"), np.random.default_rng(0), {}
    for module in (module_name(layer, target) for layer in range(2) for target in CPT.targets):
        outputs, inputs = base.shape(f"{module}.weight")
        rank = CPT.rank_of(module)
        tensors[tensor_name(module, "A")] = rng.normal(0, 0.1, (rank, inputs)).astype(np.float32)
        tensors[tensor_name(module, "B")] = rng.normal(0, 0.1, (outputs, rank)).astype(np.float32)
    write_adapter(path / "cpt", CPT, tensors, str(path / "base"))
    preferences = [
        Preference(str(i), f"問{i}:", Sample("甲である。", "a"), rejected=(Sample("乙である。" * i, "b"),)) for i in range(1, 4)
    ]
    write_preferences(path / "preferences.jsonl", preferences)
    (path / "text.jsonl").write_text(json.dumps({"text": "甲は乙である。" * 8}, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def config(folder, run, handover, **changes) -> RpoConfig:
    made = RpoConfig(
        ModelConfig(str(folder / "base"), str(folder / "cpt"), dtype="float32"),
        str(run),
        str(folder / "preferences.jsonl"),
        pairs=PairConfig(unit="pair"),
        optimizer=OptimizerConfig(1e-2, warmup_ratio=0.0),
        training=TrainingConfig(epochs=3, batch_size=4, accumulation=1, checkpoint_every=1),
        handover=handover,
    )
    return dataclasses.replace(made, **changes)


def rpo(folder, *more: str) -> list[str]:
    model = ["--model.path", str(folder / "base"), "--model.dtype", "float32", "--model.adapter", str(folder / "cpt")]
    return ["rpo", *model, "--run", str(folder / "run"), "--preferences", str(folder / "preferences.jsonl"), *more]


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_merging_into_four_bits_is_refused_and_stack_named(folder, tmp_path, capsys, engine):
    pytest.importorskip(engine)
    base = ModelDirectory(folder / "base")
    packed = {**base.config, "quantization_config": {"load_in_4bit": True}}
    write_model(tmp_path / "packed", packed, ((name, base.read(name)) for name in base.names()), companions_from=base.path)
    line = refused(folder, capsys, *rpo(folder, "--engine", engine, "--model.path", str(tmp_path / "packed")))
    assert "4 bits" in line
    assert "--handover stack" in line


@pytest.mark.parametrize("engine", ["jax", "torch"])
@pytest.mark.parametrize("handover", ["merge", "stack", "continue"])
def test_an_adapter_of_another_model_is_refused_before_the_run_begins(folder, tmp_path, capsys, engine, handover):
    pytest.importorskip(engine)
    write_random_model(tmp_path / "other", tokenizer=str(BASE), vocab_size=1280, hidden_size=96, layers=2)
    arguments = rpo(folder, "--engine", engine, "--handover", handover, "--model.path", str(tmp_path / "other"))
    assert "is it for another model?" in refused(folder, capsys, *arguments)


def test_an_adapter_trained_further_keeps_its_settings(folder, capsys):
    line = refused(folder, capsys, *rpo(folder, "--handover", "continue", "--lora.rank", "8"))
    assert "lora.rank is 8" in line
    assert "has 2" in line
    same = config(folder, "run", "continue", lora=LoraConfig(rank=2, alpha=4.0))
    adapter = continued_adapter(same.model, same)
    assert adapter is not None
    assert adapter.lora == CPT
    assert continued_adapter(same.model, dataclasses.replace(same, handover="stack")) is None


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_an_engine_itself_does_not_merge(folder, tmp_path, engine):
    """Called without ``run_rpo``, it would otherwise train beside an adapter that was to be merged."""
    pytest.importorskip(engine)
    from medllm.engines import open_trainer
    from medllm.preferences.records import read_preferences
    from medllm.preferences.tokenization import tokenize_preferences
    from medllm.run import Run

    asked = config(folder, tmp_path / "run", "merge")
    opened = open_trainer(engine, asked.model)
    preferences = tokenize_preferences(opened.tokenizer, read_preferences(asked.preferences), asked.pairs)
    with pytest.raises(UserError, match="run_rpo merges the adapter"):
        opened.train_preferences(preferences, asked, Run(asked.run, asked))


@pytest.mark.parametrize("engine", ["jax", "torch"])
@pytest.mark.parametrize("handover", ["merge", "stack"])
def test_the_model_and_its_tokenizer_are_opened_once(folder, tmp_path, monkeypatch, engine, handover):
    pytest.importorskip(engine)
    home = HOMES[engine]
    kind = getattr(load(engine, "engine"), home.engine)
    loader = load(engine, "engine") if engine == "jax" else importlib.import_module("torch_ref.model")
    opened, loaded = [], []
    begin, read = kind.__init__, loader.load_tokenizer
    monkeypatch.setattr(kind, "__init__", lambda self, model, *rest: opened.append(model) or begin(self, model, *rest))
    monkeypatch.setattr(loader, "load_tokenizer", lambda path: loaded.append(path) or read(path))
    asked = config(folder, tmp_path / "run", handover)
    run_rpo(asked, engine)
    assert opened == [asked.model]
    assert loaded == [asked.model.path]


def test_merge_leaves_the_weights_it_trained_on_in_the_run_folder(folder, tmp_path):
    pytest.importorskip("jax")
    asked = config(folder, tmp_path / "run", "merge")
    result = run_rpo(asked)
    assert result.to_json()["handover"] == "merge"
    opened = {"path": f"{tmp_path}/run/merged", "adapters": [f"{tmp_path}/run/adapter"]}
    assert result.to_json()["opened_as"] == opened
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result.to_json()
    merge_adapter(folder / "base", folder / "cpt", tmp_path / "again")
    found, expected = ModelDirectory(tmp_path / "run" / "merged"), ModelDirectory(tmp_path / "again")
    for name in expected.names():
        np.testing.assert_array_equal(found.read(name), expected.read(name), err_msg=name)
    assert (tmp_path / "run" / "merged" / "tokenizer.json").exists()


def test_a_run_that_fails_at_its_input_leaves_no_merged_weights(folder, tmp_path):
    pytest.importorskip("jax")
    asked = config(folder, tmp_path / "run", "merge", pairs=PairConfig(max_length=2))
    with pytest.raises(UserError, match="no pair to train on"):
        run_rpo(asked)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_a_resumed_run_goes_on_against_the_reference_it_began_with(folder, tmp_path, engine):
    pytest.importorskip(engine)
    whole = run_rpo(config(folder, tmp_path / "whole", "continue"), engine)
    parts = config(folder, tmp_path / "parts", "continue")
    run_rpo(dataclasses.replace(parts, training=dataclasses.replace(parts.training, max_steps=1)), engine)
    resumed = run_rpo(dataclasses.replace(parts, resume=True), engine)
    assert resumed.summary.steps == whole.summary.steps == 3
    found, expected = read_adapter(resumed.summary.adapter), read_adapter(whole.summary.adapter)
    assert found.tensors.keys() == expected.tensors.keys()
    moved = read_adapter(folder / "cpt").tensors
    for name, value in expected.tensors.items():
        np.testing.assert_allclose(found.tensors[name], value, atol=1e-6, err_msg=name)
        assert np.abs(value - moved[name]).max() > 1e-3, name
    lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("parts", "whole")]
    rewards = [[line["rewards/chosen"] for line in run if "rewards/chosen" in line] for run in lines]
    np.testing.assert_allclose(*rewards, atol=1e-5)


def test_convert_measures_the_handovers_and_writes_them_beside_the_model(folder, tmp_path, capsys):
    pytest.importorskip("jax")
    out = tmp_path / "merged"
    arguments = ["convert", "--model", str(folder / "base"), "--adapter", str(folder / "cpt"), "--out", str(out)]
    measure = ["--held_text", str(folder / "text.jsonl"), "--quantization", "nf4", "--json", str(tmp_path / "result.json")]
    assert main([*arguments, *measure]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads((tmp_path / "merged.handover.json").read_text()) == result
    rows = {row["handover"]: row for row in result["handovers"]}
    assert list(rows) == ["merge", "stack", "continue"]
    assert result["held_tokens"] > 20
    for row in rows.values():
        assert 0.05 < row["weight_error"] <= row["worst_weight_error"] < 0.2
        assert row["kl"] > 0
    assert rows["merge"]["weight_error"] != rows["stack"]["weight_error"] == rows["continue"]["weight_error"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:4]] == list(rows)


def test_a_text_that_cannot_be_measured_on_is_refused_before_anything_is_written(folder, capsys):
    arguments = ["convert", "--model", str(folder / "base"), "--adapter", str(folder / "cpt"), "--out", str(folder / "out")]
    assert "nowhere.jsonl" in refused(folder, capsys, *arguments, "--held_text", str(folder / "nowhere.jsonl"))


@pytest.mark.parametrize("words", [["A"], ["A", "B"], ['["A", "B"]']], ids=str)
def test_adapters_are_given_one_or_several(words, tmp_path):
    from medllm.cli import COMMANDS, parse

    line = ["--model.path", "m", "--model.adapter", *words, "--run", "r", "--problems", "p"]
    model = parse("evaluate", COMMANDS["evaluate"], line).model
    assert model.adapters == (("A",) if words == ["A"] else ("A", "B"))
    assert model.adapter == ("A" if words == ["A"] else ("A", "B")), "a single one stays a plain string, as in a preset"
