"""``medllm bench`` holds JAX against the fastest of what the reference can be set to, and shows the rest."""

from __future__ import annotations

import dataclasses

import pytest

from medllm.bench import compare as comparing
from medllm.bench import variants
from medllm.bench.compare import compare, table
from medllm.bench.shapes import CptShape, GenerateShape, ModelShape, RpoShape
from medllm.bench.variants import ALL, GPU, VARIANTS, choose
from medllm.config import TorchConfig, TrainingConfig
from medllm.errors import UserError

TINY = ModelShape(layers=2, width=32, mlp=48, heads=2, kv_heads=1, vocabulary=128, rank=2)
SHAPES = {"cpt": CptShape(TINY, steps=5), "rpo": RpoShape(TINY, steps=5), "generate": GenerateShape(TINY, problems=40)}
BOTH = ("jax", "torch")


@pytest.fixture
def measured(monkeypatch):
    """What was asked of the engines, in order; rates and peaks are looked up by what is asked."""
    asked = []

    def measure(engine, name, **settings):
        if name == "matmul":
            return {"gflops": 100.0}
        asked.append((engine, settings))
        torch = settings.get("torch") or {}
        if torch.get("attention") == "eager":
            raise RuntimeError("the child process ended early: SIGKILL")
        rate = 8.0 if engine == "jax" else {"layer": 2.0, "none": 4.0}[settings["remat"]]
        peak = 1.0 if engine == "jax" else {"layer": 3.0, "none": 5.0}[settings["remat"]]
        return {"rate": rate, "compile_s": 0.0, "peak_rss_bytes": peak * 2**30}

    monkeypatch.setattr(comparing, "measure", measure)
    monkeypatch.setattr(variants, "measure", measure)
    monkeypatch.setattr(variants, "_installed", lambda module: False)
    return asked


def test_the_ratio_is_to_the_fastest_variant_and_the_others_are_shown(measured):
    result = compare("cpt", SHAPES["cpt"], engines=BOTH, runs=2, torch_variant=ALL, remat="projections")
    assert result.to_json()["torch_variant"] == "kept"
    assert result.ratio == 2.0
    assert result.memory_ratio == pytest.approx(1 / 5)
    *lines, last = table(result)
    text = {line.split()[0]: line for line in lines}
    assert text["kept"].endswith("fastest")
    assert text["recomputed"].endswith("leanest")
    assert "2   peak 3.00 GiB" in text["recomputed"]
    assert "not run: the child process ended early: SIGKILL" in text["eager"]
    assert "not run: the package 'flash_attn' is not installed" in text["flash"]
    assert "2.00 times as fast as torch" in last


def test_each_variant_is_tried_once_and_shortly_and_the_fastest_measured_in_full(measured):
    compare("cpt", SHAPES["cpt"], engines=BOTH, runs=2, torch_variant=ALL, remat="projections")
    steps = [(engine, settings["shape"]["steps"], settings["remat"]) for engine, settings in measured]
    trials = [("torch", 2, "layer"), ("torch", 2, "none"), ("torch", 2, "none")]
    assert steps == [*trials, *[("jax", 5, "projections"), ("torch", 5, "none")] * 2]
    assert all("torch" not in settings for engine, settings in measured if engine == "jax")


def test_a_variant_asked_for_by_name_is_measured_without_trials(measured):
    loss = {"remat": "layer", "nll_reduction": "micro_batch_tokens"}
    result = compare("rpo", SHAPES["rpo"], engines=BOTH, runs=1, torch_variant="pair", **loss)
    assert [engine for engine, _ in measured] == ["jax", "torch"]
    assert [settings["nll_reduction"] for _, settings in measured] == ["micro_batch_tokens", "sequence"]
    assert "torch ran as 'pair': one pair a pass" in table(result)[2]


def test_a_mean_over_each_response_leaves_only_the_variants_that_can_take_it(measured):
    choice = choose("all", "rpo", SHAPES["rpo"], {"nll_reduction": "sequence"}, lambda line: None)
    tried = {trial.variant.name for trial in choice.trials if trial.rate is not None}
    assert tried == {"pair", "pair-precomputed", "pair-kept", "pair-kept-precomputed"}


@pytest.mark.parametrize(
    ("problems", "expected"), [(3, [3]), (16, [16]), (17, [16, 17]), (40, [16, 32, 40]), (64, [16, 32, 64])]
)
def test_batches_of_answers_are_tried_on_one_batch_each(monkeypatch, problems, expected):
    tried = []

    def measure(engine, name, *, shape, batch_size, profile):
        tried.append(shape["problems"])
        assert batch_size >= shape["problems"]
        return {"rate": batch_size, "compile_s": 0.0, "peak_rss_bytes": 1}

    monkeypatch.setattr(variants, "measure", measure)
    choose("all", "generate", dataclasses.replace(SHAPES["generate"], problems=problems), {}, lambda line: None)
    assert tried == expected


def test_where_nothing_runs_the_first_reason_is_said(monkeypatch):
    def refuse(*_, **__):
        raise UserError("no such thing")

    monkeypatch.setattr(variants, "measure", refuse)
    with pytest.raises(UserError, match="ran in no variant; the first: no such thing"):
        choose("all", "cpt", SHAPES["cpt"], {}, lambda line: None)


def test_a_variant_that_lacks_something_is_refused_by_name(measured):
    with pytest.raises(
        UserError, match="--torch_variant liger: the package 'liger_kernel' is not installed; give another, or all"
    ):
        compare("cpt", SHAPES["cpt"], engines=BOTH, runs=1, torch_variant="liger", remat="layer")
    assert not measured


@pytest.mark.parametrize("devices", [{}, {"devices": "NVIDIA H100"}])
def test_what_needs_a_gpu_is_tried_where_there_is_one(measured, monkeypatch, devices):
    monkeypatch.setattr(variants, "environment", lambda: devices)
    monkeypatch.setattr(variants, "_installed", lambda module: True)
    choice = choose("all", "cpt", SHAPES["cpt"], {}, lambda line: None)
    needing = [trial for trial in choice.trials if GPU in trial.variant.needs]
    assert len(needing) == 2
    assert all((trial.reason is None) == bool(devices) for trial in needing)


def test_variants_are_settings_the_engine_has_and_have_names_of_their_own():
    for action, ones in VARIANTS.items():
        assert len({one.name for one in ones}) == len(ones)
        assert len({repr(one.settings) for one in ones}) == len(ones)
        for one in ones if action != "generate" else ():
            TorchConfig(**one.settings["torch"])
            assert TrainingConfig(remat=one.settings["remat"]).remat in ("none", "layer")
