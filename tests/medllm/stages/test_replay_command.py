"""``medllm replay``: what a run says of a step that is not finite is what its batch says when it is computed alone."""

import dataclasses
import json
import re

import numpy as np
import pytest

from medllm.cli import main
from medllm.model.directory import ModelDirectory, write_model
from medllm.replay import first_batch, read_batch
from tests.killed_training import inputs

pytest_plugins = ["tests.small_torch_model"]


@pytest.fixture(scope="module")
def overflowing(folder, tmp_path_factory):
    """The small model, whose second layer's gate and up projections are each finite and their product is not."""
    base = ModelDirectory(folder)
    tensors = {name: np.array(base.read(name)) for name in base.names()}
    for kind in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{kind}.weight"] *= np.float32(1e25)
    out = tmp_path_factory.mktemp("overflowing") / "model"
    write_model(out, base.config, tensors.items(), companions_from=folder)
    return out


def train(engine, stage, model, folder, *more):
    words = f"--engine {engine} --run {folder / 'run'} --model.path {model} --model.dtype float32 --lora.rank 2".split()
    loop = "--training.epochs 1 --training.batch_size 2 --training.accumulation 2".split()
    return main([stage, *words, *loop, *inputs(stage, folder), *more])


def contents(run):
    return {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def replayed(folder, capsys):
    """What ``medllm replay`` says, and its JSON; it changed nothing in the run."""
    before = contents(folder / "run")
    assert main(["replay", str(folder / "run"), "--json", str(folder / "found.json")]) == 0
    assert contents(folder / "run") == before
    return capsys.readouterr().out, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize(("engine", "stage"), [("jax", "rpo"), ("torch", "cpt"), ("torch", "rpo")])
def test_a_layer_that_overflows_is_named_by_the_run_and_by_its_batch_alone(engine, stage, overflowing, tmp_path, capsys):
    pytest.importorskip(engine)
    assert train(engine, stage, overflowing, tmp_path) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    of = {"cpt": "documents [^)]+", "rpo": r"problems p\d+(?:, p\d+)?"}[stage]
    assert re.search(rf"step 1: the loss is nan.*by micro-batch 1 \({of}\).*, first in layer 1: activation product;", said)
    assert f"medllm replay {tmp_path / 'run'} computes it alone" in said
    out, found = replayed(tmp_path, capsys)
    assert "micro-batch 1: first not finite: layer 1: activation product" in out
    assert found["micro_batches"][0]["first"]["layer"] == 1
    assert (found["step"], found["engine"], found["finite"]) == (1, engine, False)
    readings = found["micro_batches"][0]["readings"]
    assert not [one for one in readings if one["wrong"] and one["layer"] == 0 and "gradient" not in one["what"]]
    assert sorted(file.name for file in (tmp_path / "run" / "not_finite").iterdir()) == ["step-1.safetensors"]


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_the_adapter_is_that_of_the_newest_checkpoint_before_the_step(engine, overflowing, folder, tmp_path, capsys):
    pytest.importorskip(engine)
    bad, good = tmp_path / "bad", tmp_path / "good"
    for home in (bad, good):
        home.mkdir()
    assert train(engine, "cpt", overflowing, bad) == 2
    kept = "--training.max_steps 3 --training.checkpoint_every 1 --training.keep 3 --optimizer.learning_rate 0.1".split()
    assert train(engine, "cpt", folder, good, *kept) == 0
    batch, losses = read_batch(first_batch(bad / "run")), {}
    for step, words in ((3, "adapter: the checkpoint of step 2\n"), (1, "adapter: fresh, as no checkpoint")):
        dataclasses.replace(batch, step=step).keep(good / "run")
        out, found = replayed(good, capsys)  # the first step that was kept is taken
        assert words in out
        assert found["finite"]
        losses[step] = found["micro_batches"][0]["loss"]
    assert abs(losses[3] - losses[1]) > 0.01


def test_a_folder_without_such_a_batch_and_a_file_that_is_none_are_refused(folder, tmp_path, capsys):
    assert main(["replay", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such run folder" in capsys.readouterr().err
    assert main(["replay", str(tmp_path)]) == 2
    assert "has kept no batch whose numbers were not finite" in capsys.readouterr().err
    assert main(["replay", str(tmp_path), "--batch", str(folder / "model.safetensors")]) == 2
    assert "is no batch that a run kept" in capsys.readouterr().err
