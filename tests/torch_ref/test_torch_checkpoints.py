"""A run of the reference engine that is ended or damaged anywhere goes on, and takes no number that is not finite."""

import dataclasses
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from medllm.checkpoints import CHECKSUMS, Saving
from medllm.config import OptimizerConfig
from medllm.errors import Stopped, UserError
from medllm.run import Run
from tests.torch_ref.test_torch_engine import adapter_of, cpt_config, preferences, rows, rpo_config, train
from torch_ref import run_log
from torch_ref.engine import TorchEngine
from torch_ref.run_log import RunLog

pytest_plugins = ["tests.small_torch_model", "tests.small_disk"]


def going_on(config):
    return dataclasses.replace(config, resume=True)


def kept(run):
    return sorted(folder.name for folder in (run.path / "checkpoints").iterdir())


@pytest.mark.parametrize("damage", ["half-written", "flipped"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(dense, tmp_path, damage, capsys):
    config = cpt_config(dense, tmp_path / "run", checkpoint_every=1, max_steps=4)
    run, whole = train(config, rows())
    expected = adapter_of(whole)
    last = run.path / "checkpoints" / "checkpoint-4"
    if damage == "flipped":
        content = (last / "optimizer.pt").read_bytes()
        (last / "optimizer.pt").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        (last / CHECKSUMS).unlink()
        (last / "trainer_state.json").unlink()
    capsys.readouterr()
    shutil.rmtree(run.path / "adapter")
    run, again = train(going_on(config), rows())
    said = capsys.readouterr().err
    assert "going on at step 3 of 4" in said
    assert ("checkpoint-4: is damaged, optimizer.pt is not what was written" in said) == (damage == "flipped")
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]
    assert kept(run) == ["checkpoint-3", "checkpoint-4"]
    for name, value in expected.items():
        torch.testing.assert_close(adapter_of(again)[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("max_steps", [0, 2])
def test_a_run_that_ended_before_its_adapter_was_written_writes_it(dense, tmp_path, max_steps):
    config = cpt_config(dense, tmp_path / "run", max_steps=max_steps)
    run, whole = train(config, rows())
    expected, lines = adapter_of(whole), run.metrics()
    shutil.rmtree(run.path / "adapter")
    run, again = train(going_on(config), rows())
    assert (again.steps, again.loss) == (whole.steps, lines[-1]["loss"])
    assert again.seconds >= lines[-1]["seconds"] > 0
    assert 0 < again.rate < float("inf")
    for name, value in expected.items():
        assert torch.equal(adapter_of(again)[name], value)


def test_a_signal_ends_a_run_after_its_step_and_it_goes_on(dense, tmp_path, monkeypatch):
    _, whole = train(cpt_config(dense, tmp_path / "whole"), rows())
    config = cpt_config(dense, tmp_path / "run")
    before = RunLog.on_pre_optimizer_step

    def signalled(log, args, state, control, **others):
        if state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        before(log, args, state, control, **others)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped after step 2 of"):
        patch.setattr(RunLog, "on_pre_optimizer_step", signalled)
        train(config, rows())
    assert not (tmp_path / "run" / "adapter").exists()
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2" / CHECKSUMS).exists()
    run, again = train(going_on(config), rows())
    assert [line["step"] for line in run.metrics()] == list(range(1, whole.steps + 1))
    for name, value in adapter_of(whole).items():
        torch.testing.assert_close(adapter_of(again)[name], value, atol=1e-6, rtol=0)


def test_the_latest_checkpoints_are_kept_and_the_multiples(dense, tmp_path):
    config = cpt_config(dense, tmp_path / "run", checkpoint_every=1, keep=1, keep_every=2, max_steps=3)
    run, _ = train(config, rows())
    assert kept(run) == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_is_due_when_its_minutes_are_over(dense, tmp_path, monkeypatch):
    seconds = iter(range(0, 6000, 60))

    def clock():
        return next(seconds)  # a minute at each look

    monkeypatch.setattr(run_log, "Saving", lambda training: Saving(training, clock))
    run, summary = train(cpt_config(dense, tmp_path / "run", checkpoint_minutes=2, keep=9, max_steps=4), rows())
    assert kept(run) == ["checkpoint-2", "checkpoint-4"]
    tokens = [line["tokens_per_second"] for line in run.metrics()]
    assert min(tokens) > 0
    assert summary.steps == 4


def test_a_disk_that_fills_is_one_line_and_the_run_goes_on(dense, tmp_path, small_disk, monkeypatch):
    config = cpt_config(dense, small_disk.folder / "run", checkpoint_every=1, max_steps=4)
    _, whole = train(dataclasses.replace(config, run=str(tmp_path / "whole")), rows())
    expected = adapter_of(whole)
    before = RunLog.on_pre_optimizer_step

    def filling(log, args, state, control, **others):
        if state.global_step == 2:
            small_disk.fill()
        before(log, args, state, control, **others)

    engine = TorchEngine(config.model)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"run.*: the disk is full"):
        patch.setattr(RunLog, "on_pre_optimizer_step", filling)
        with Run(config.run, config) as run:
            engine.train_cpt(rows(), config, run)
    small_disk.make_room()
    run, again = train(going_on(config), rows())
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]
    for name, value in expected.items():
        torch.testing.assert_close(adapter_of(again)[name], value, atol=1e-6, rtol=0)


def poison(monkeypatch, at):
    """The gradient of micro-batch ``at`` of the run, counted from 1, has a NaN; its loss has none."""
    log = RunLog.watching
    count = iter(range(1, 99))

    def watching(self, trainer):
        compute = trainer.training_step

        def poisoned(model, *arguments):
            loss = compute(model, *arguments)
            if next(count) == at:
                next(one for one in model.parameters() if one.grad is not None).grad[0, 0] = float("nan")
            return loss

        trainer.training_step = poisoned
        return log(self, trainer)

    monkeypatch.setattr(RunLog, "watching", watching)


def test_a_gradient_that_is_no_number_is_named_and_saved_nowhere(dense, tmp_path, monkeypatch):
    poison(monkeypatch, 5)
    config = cpt_config(dense, tmp_path / "run", checkpoint_every=1)
    with pytest.raises(UserError, match=r"step 3: the loss is \d.* by micro-batch 2 \(documents [\d, ]+\)"):
        train(config, rows())
    assert sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_the_problems_of_such_a_step_are_named(dense, tmp_path, monkeypatch):
    poison(monkeypatch, 1)
    config = rpo_config(dense, tmp_path / "run", batch_size=2)
    with pytest.raises(UserError, match=r"step 1: .* by micro-batch 1 \(problems p\d, p\d\)"):
        train(config, preferences())


def test_a_step_that_is_left_out_changes_no_weight(dense, tmp_path, monkeypatch, capsys):
    _, whole = train(cpt_config(dense, tmp_path / "two", max_steps=2), rows())
    poison(monkeypatch, 5)
    run, summary = train(cpt_config(dense, tmp_path / "run", max_steps=3, on_nan="skip"), rows())
    assert run.metrics()[2]["skipped"] == 1
    assert "step 3: " in capsys.readouterr().err
    for name, value in adapter_of(whole).items():
        assert torch.equal(adapter_of(summary)[name], value)


def test_an_adapter_that_is_not_finite_is_not_saved(dense, tmp_path):
    config = cpt_config(dense, tmp_path / "run", checkpoint_every=1)
    with pytest.raises(UserError, match="not finite"):
        train(dataclasses.replace(config, optimizer=OptimizerConfig(1e38, warmup_ratio=0)), rows())
    for file in (tmp_path / "run" / "checkpoints").rglob("adapter_model.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(file).values())
