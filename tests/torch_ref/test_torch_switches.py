"""The reference engine's own settings: the same numbers another way, or one line that says why they cannot be had here."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from trl import DPOTrainer

import torch_ref.cpt
from medllm.cli import main
from medllm.config import (
    LoraConfig,
    OptimizerConfig,
    PairConfig,
    PreferenceLoss,
    PreferenceRecipe,
    Recipe,
    TorchConfig,
    TrainingConfig,
)
from medllm.corpus.packing import pack
from medllm.engines import open_trainer
from medllm.errors import UserError
from medllm.preferences.pairs import trl_rows
from medllm.preferences.records import Preference, Sample
from medllm.preferences.tokenization import tokenize_preferences
from medllm.run import Run
from medllm.stage_config import CptConfig, RpoConfig
from tests.small_torch_model import TEXTS
from torch_ref import TorchEngine, open_model
from torch_ref import switches as switches_here
from torch_ref.cpt import RowFeatures, one_long_row
from torch_ref.rpo import dpo_trainer

LORA = LoraConfig(rank=4, alpha=8)

pytest_plugins = ["tests.small_torch_model"]


def preferences(count=3):
    return [
        Preference(
            f"p{i}", f"Question: what is {i}?", ground_truth=Sample(f" because {TEXTS[i % 4]}", "a"),
            chosen=(Sample(f" so {TEXTS[(i + 1) % 4]}", "a"),), rejected=(Sample(f" no, {'bcd'[i % 3]}", "b"),),
        )
        for i in range(count)
    ]  # fmt: skip


def rpo_config(model, run, handover="merge", epochs=2, **switches):
    return RpoConfig(
        model=model, run=str(run), preferences="memory", pairs=PairConfig(max_length=200), lora=LORA,
        optimizer=OptimizerConfig(3e-3, warmup_ratio=0), training=TrainingConfig(epochs=epochs, batch_size=1, accumulation=1),
        handover=handover, torch=TorchConfig(**switches),
    )  # fmt: skip


def cpt_config(model, run, **switches):
    training = TrainingConfig(epochs=1, batch_size=2, accumulation=1)
    return CptConfig(
        model=model, run=str(run), lora=LORA, optimizer=OptimizerConfig(1e-2), training=training, torch=TorchConfig(**switches)
    )


def rows():
    return pack([np.arange(1, length) for length in (9, 12, 20, 6, 17, 5, 8, 23)], 24, 0)


def train(config):
    run = Run(config.run, config, resume=config.resume)
    engine = open_trainer("torch", config.model, config)
    if isinstance(config, CptConfig):
        return run.metrics, engine.train_cpt(rows(), config, run)
    data = tokenize_preferences(engine.tokenizer, preferences(), config.pairs)
    return run.metrics, engine.train_preferences(data, config, run)


def figures(lines, *names):
    return np.array([[line[name] for name in names] for line in lines])


@pytest.mark.parametrize(
    ("quantized", "handover"), [(False, None), (False, "stack"), (False, "continue"), (True, "stack"), (True, "continue")]
)
def test_a_reference_computed_ahead_gives_the_losses_of_one_computed_in_each_step(dense, nf4, tmp_path, quantized, handover):
    model = nf4 if quantized else dense
    if handover:
        _, first = train(cpt_config(model, tmp_path / "cpt"))
        model = dataclasses.replace(model, adapter=first.adapter)
    names = ("loss", "rewards/chosen", "rewards/rejected", "grad_norm")
    logged = {}
    for ahead in (False, True):
        metrics, _ = train(rpo_config(model, tmp_path / str(ahead), handover or "merge", precompute_reference=ahead))
        logged[ahead] = figures(metrics(), *names)
    assert (logged[True][0, 1:3] == 0).all(), "at step 0 the reference is the policy"
    assert np.abs(logged[True][-1, 1:3]).min() > 1e-3, "afterwards it is not"
    np.testing.assert_allclose(logged[True], logged[False], rtol=2e-2 if quantized else 1e-5, atol=5e-3 if quantized else 1e-6)


def test_the_time_of_a_reference_computed_ahead_is_part_of_the_seconds_and_of_the_rate(dense, tmp_path, monkeypatch):
    compute = DPOTrainer._precompute_ref_logps

    def slowly(self, *arguments):
        time.sleep(3)
        return compute(self, *arguments)

    monkeypatch.setattr(DPOTrainer, "_precompute_ref_logps", slowly)
    _, summary = train(rpo_config(dense, tmp_path / "run", epochs=2, precompute_reference=True))
    pairs = len(trl_rows(preferences(), PairConfig()))
    assert summary.seconds > 3
    assert 0 < summary.rate < pairs / (3 / 2), "half of it in each of two epochs"


def test_written_out_attention_trains_as_the_fused_one(dense, tmp_path):
    assert open_model(dense).config._attn_implementation == "sdpa"
    assert open_model(dense, TorchConfig("eager")).config._attn_implementation == "eager"
    logged = [
        figures(train(config(dense, tmp_path / f"{attention}{config.__name__}", attention=attention))[0](), "loss", "grad_norm")
        for config in (cpt_config, rpo_config)
        for attention in ("sdpa", "eager")
    ]
    np.testing.assert_allclose(logged[1], logged[0], rtol=1e-4)
    np.testing.assert_allclose(logged[3], logged[2], rtol=1e-4)


def test_rows_end_to_end_give_the_loss_of_rows_side_by_side(dense):
    features = RowFeatures(rows())
    some = [features[index] for index in range(3)]
    model = open_model(dense)
    long, short = one_long_row(some), default_collate(some)
    assert long["input_ids"].shape == (1, 3 * 24)
    with torch.no_grad():
        losses = [model(**batch, use_cache=False).loss.item() for batch in (long, short)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_flash_attention_gets_rows_end_to_end_and_liger_is_asked_of_the_trainers(dense, tmp_path, monkeypatch):
    asked = {}

    class Stop(Exception):
        pass

    def trainer(**settings):
        asked.update(settings)
        raise Stop

    monkeypatch.setattr(torch_ref.cpt, "Trainer", trainer)
    monkeypatch.setattr(torch_ref.model, "check_switches", lambda *_: None)
    plain = torch_ref.cpt.open_model
    monkeypatch.setattr(torch_ref.cpt, "open_model", lambda model, _: plain(model))
    for attention, collator in (("sdpa", default_collate), ("flash_attention_2", one_long_row)):
        config = cpt_config(dense, tmp_path / attention, attention=attention, liger=True)
        with pytest.raises(Stop):
            TorchEngine(dense).train_cpt(rows(), config, Run(config.run, config))
        assert asked["data_collator"] is collator
        assert asked["args"].use_liger_kernel
    config = rpo_config(dense, tmp_path / "rpo", liger=True)
    pairs, run = trl_rows(preferences(), PairConfig()), Run(config.run, config)
    built = dpo_trainer(dense, TorchEngine(dense).tokenizer, pairs, config, run, batch=1, accumulation=1)
    assert built.args.use_liger_kernel
    assert not built.precompute_ref_logps


@pytest.mark.parametrize(
    ("capability", "switches", "expected"),
    [
        (None, {"attention": "flash_attention_2"}, "GPU of compute capability 8.0 or later, torch sees none here"),
        (None, {"liger": True}, "needs an NVIDIA GPU"),
        ((7, 5), {"attention": "flash_attention_2"}, "8.0 or later, here it is 7.5"),
        ((8, 0), {"attention": "flash_attention_3"}, "9.0 or later, here it is 8.0"),
        ((9, 0), {"attention": "flash_attention_3"}, "package 'flash-attn-3'"),
        ((9, 0), {"attention": "flash_attention_2"}, "package 'flash-attn'"),
        ((9, 0), {"liger": True}, "package 'liger-kernel'"),
    ],
)
def test_a_switch_that_cannot_be_had_here_is_refused(dense, monkeypatch, capability, switches, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(switches_here, "_installed", lambda module: False)
    with pytest.raises(UserError, match=expected) as refused:
        TorchEngine(dense, Recipe(torch=TorchConfig(**switches)))
    assert "\n" not in str(refused.value)


def test_flash_attention_is_refused_in_fp32(dense, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(switches_here, "_installed", lambda module: True)
    with pytest.raises(UserError, match=r"computes in bf16 only, and --model\.dtype is 'float32'"):
        TorchEngine(dense, Recipe(torch=TorchConfig("flash_attention_2")))


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (PreferenceRecipe(loss=PreferenceLoss("rop")), r"loss\.name is 'rop': engine torch knows 'rpo', 'dpo'"),
        (PreferenceRecipe(loss=PreferenceLoss("simpo")), r"loss\.name is 'simpo': engine torch knows .*'dpo_norm'; give one"),
        (PreferenceRecipe(loss=PreferenceLoss("ipo", alpha=2.0)), r"loss\.alpha is 2\.0, which loss 'ipo' does not read"),
        (Recipe(training=TrainingConfig(remat="projections")), r"training\.remat is 'projections': engine torch knows"),
    ],
)
def test_what_the_engine_does_not_know_is_refused_on_opening(dense, stage, expected):
    with pytest.raises(UserError, match=expected):
        TorchEngine(dense, stage)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("stage", "words", "expected"),
    [
        ("cpt", ["--engine=torch", "--torch.attention=flash_attention_2"], "needs an NVIDIA GPU"),
        ("cpt", ["--torch.attention=eager"], "--torch.attention is 'eager', a setting of the torch engine alone"),
        ("cpt", ["--torch.liger=true"], "add --engine torch"),
        ("cpt", ["--engine=torch", "--torch.precompute_reference=true"], "continued pretraining has no reference"),
        ("rpo", ["--torch.precompute_reference=true"], "--torch.precompute_reference is True"),
        ("rpo", ["--engine=torch", "--torch.liger=true"], "--torch.liger is true: needs an NVIDIA GPU"),
    ],
)
def test_a_wrong_switch_is_one_line_and_leaves_nothing_behind(folder, tmp_path, capsys, stage, words, expected):
    work = tmp_path / "work.jsonl"
    line = '{"problem_id": "1", "prompt": "p", "ground_truth": {"text": " a", "answer": "a"}, "chosen": [], "rejected": '
    work.write_text(line + '[{"text": " b", "answer": "b"}]}\n' if stage == "rpo" else '{"text": "a"}\n')
    data = "--preferences" if stage == "rpo" else "--corpus.documents"
    given = [stage, f"--model.path={folder}", "--model.dtype=float32", f"--run={tmp_path / 'run'}", data, str(work)]
    assert main([*given, *words]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_resumed_with_other_switches(dense, tmp_path):
    config = rpo_config(dense, tmp_path / "run")
    short = dataclasses.replace(config, training=dataclasses.replace(config.training, max_steps=2))
    train(short)
    other = dataclasses.replace(config, resume=True, torch=TorchConfig("eager", precompute_reference=True))
    metrics, _ = train(other)
    whole, _ = train(rpo_config(dense, tmp_path / "whole"))
    np.testing.assert_allclose(figures(metrics(), "step", "loss"), figures(whole(), "step", "loss"), rtol=1e-4)
