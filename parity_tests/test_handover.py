"""CPT → RPO by each hand-over on both engines: the reference, the model that comes out, and what the hand-over costs."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from peft import PeftModel
from transformers import Qwen2ForCausalLM

from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.weights.handover import handover_errors
from jax_medllm.weights.read import load_model
from medllm.config import LoraConfig, ModelConfig, OptimizerConfig, PairConfig, PreferenceLoss, TrainingConfig
from medllm.corpus.packing import PackedRows, pack
from medllm.engines import open_trainer
from medllm.model.adapter import merge_adapter, read_adapter
from medllm.model.directory import ModelDirectory
from medllm.preferences.records import write_preferences
from medllm.run import Run
from medllm.stage_config import CptConfig, RpoConfig
from medllm.stages.rpo import run_rpo
from parity_tests.preference_cases import letters, preferences
from parity_tests.tolerances import FLOAT32_FORWARD, FLOAT32_TRAJECTORY_LOSS, HANDOVER_KL, HANDOVER_WEIGHT_ERROR
from torch_ref.model import open_model

HANDOVERS = ("merge", "stack", "continue")
TOKENS = np.array([[1, 7, 3, 9, 2, 11, 5, 4, 30, 21]])


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("handover") / "base"
    shutil.copytree(tiny_model(), folder)
    letters().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cpt(base, tiny_adapter) -> Path:
    """The adapter of stage 1: not zero, its ranks differing by kind and layer."""
    return tiny_adapter(base, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"up_proj": 3.0})


@pytest.fixture(scope="module")
def preference_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("preferences") / "preferences.jsonl"
    write_preferences(path, preferences())
    return path


def rpo_config(base: Path, cpt: Path, preference_file: Path, run: Path, handover: str) -> RpoConfig:
    """All pairs in one step, so that the order of the data plays no part."""
    return RpoConfig(
        ModelConfig(str(base), str(cpt), dtype="float32"),
        str(run),
        str(preference_file),
        loss=PreferenceLoss(alpha=0.0, nll_reduction="micro_batch_tokens"),
        pairs=PairConfig(unit="pair", max_length=40),
        lora=LoraConfig() if handover == "continue" else LoraConfig(rank=3, alpha=6.0),
        optimizer=OptimizerConfig(1e-2, weight_decay=0.1, warmup_ratio=0.0),
        training=TrainingConfig(epochs=4, batch_size=8, accumulation=1, remat="none"),
        handover=handover,
    )


@pytest.fixture(scope="module")
def runs(base, cpt, preference_file, tmp_path_factory):
    """(engine, handover) → the finished run and its result."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for engine in ("jax", "torch"):
        for handover in HANDOVERS:
            config = rpo_config(base, cpt, preference_file, folder / f"{engine}-{handover}", handover)
            found[engine, handover] = (folder / f"{engine}-{handover}", run_rpo(config, engine))
    return found


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "rewards/margins" in line]


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def jax_logits(model: DenseDecoder) -> np.ndarray:
    inputs = {"segment_ids": jnp.ones_like(TOKENS), "positions": jnp.arange(TOKENS.shape[1])[None]}
    return np.asarray(model.logits(model.hidden(jnp.asarray(TOKENS), **inputs)))


def dense(base: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32)


def by_peft(base: Path, cpt: Path, adapter: str, handover: str) -> torch.nn.Module:
    """What the hand-over means, in PEFT's own words."""
    if handover == "continue":
        return PeftModel.from_pretrained(dense(base), adapter)
    model = PeftModel.from_pretrained(dense(base), cpt)
    if handover == "merge":
        return PeftModel.from_pretrained(model.merge_and_unload(), adapter)
    model.load_adapter(adapter, "second")
    model.base_model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize("handover", HANDOVERS)
@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_the_reference_of_the_first_step_is_the_model_with_stage_1s_adapter(runs, engine, handover):
    """With the adapter missing from the reference, or from the policy, the rewards would not be zero (trl#4723, trl#1193)."""
    lines = metrics(runs[engine, handover][0])
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert lines[0][name] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["rewards/margins"] > 1e-2
    assert lines[-1]["loss"] < lines[0]["loss"] - 1e-2


@pytest.mark.parametrize("handover", HANDOVERS)
@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_the_result_opens_in_peft_and_in_both_engines_with_the_same_logits(runs, base, cpt, engine, handover):
    _, result = runs[engine, handover]
    expected = torch_logits(by_peft(base, cpt, result.summary.adapter, handover))
    opened = result.opened_as
    FLOAT32_FORWARD.assert_close(jax_logits(load_model(opened)), expected, "JAX")
    FLOAT32_FORWARD.assert_close(torch_logits(open_model(opened)), expected, "torch_ref")
    untrained = torch_logits(PeftModel.from_pretrained(dense(base), cpt))
    assert np.abs(expected - untrained).max() > 1e-2, "training has changed the model"


def test_an_adapter_trained_further_takes_the_same_steps_on_both_engines(runs, cpt):
    """The one hand-over where both begin with the same matrices; its reference decides every reward after the first step."""
    ours, theirs = (metrics(runs[engine, "continue"][0]) for engine in ("jax", "torch"))
    for name in ("loss", "rewards/chosen", "rewards/rejected", "grad_norm"):
        FLOAT32_TRAJECTORY_LOSS.assert_close([line[name] for line in ours], [line[name] for line in theirs], name)
    settings = read_adapter(cpt).lora
    assert all(read_adapter(runs[engine, "continue"][1].summary.adapter).lora == settings for engine in ("jax", "torch"))


@pytest.mark.parametrize(("handover", "quantization"), [("stack", "nf4"), ("continue", "nf4"), ("stack", "nf4-single")])
def test_over_nf4_the_reference_is_as_exact(base, cpt, preference_file, tmp_path, handover, quantization):
    for engine in ("jax", "torch"):
        config = rpo_config(base, cpt, preference_file, tmp_path / engine, handover)
        model = dataclasses.replace(config.model, quantization=quantization)
        training = dataclasses.replace(config.training, max_steps=1)
        run_rpo(dataclasses.replace(config, model=model, training=training), engine)
        (line,) = metrics(tmp_path / engine)
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert line["rewards/chosen"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("quantization", ["none", "nf4-single"])  # of which a CPU makes what the JAX engine makes, bit for bit
def test_continued_pretraining_goes_on_top_of_an_adapter_on_both_engines(base, cpt, tmp_path, quantization):
    rows = pack([np.resize(TOKENS[0], 12).astype(np.int32)] * 2, 12, 0)
    first = {}
    for adapter in (None, str(cpt)):
        for engine in ("jax", "torch"):
            config = CptConfig(
                ModelConfig(str(base), adapter, quantization=quantization, dtype="float32"),
                str(tmp_path / f"{engine}-{adapter is None}"),
                lora=LoraConfig(rank=2, alpha=4.0),
                optimizer=OptimizerConfig(1e-2, warmup_ratio=0.0),
                training=TrainingConfig(epochs=4, batch_size=2, accumulation=1, remat="none"),
            )
            run = Run(config.run, config)
            summary = open_trainer(engine, config.model).train_cpt(rows, config, run)
            losses = [line["loss"] for line in run.metrics()]
            assert losses[-1] < losses[0] - 0.01
            assert read_adapter(summary.adapter).lora.rank == 2, "a second adapter, not the first one trained further"
            first[engine, adapter] = losses[0]
    for adapter in (None, str(cpt)):
        FLOAT32_TRAJECTORY_LOSS.assert_close(first["jax", adapter], first["torch", adapter], "loss")
    assert abs(first["jax", None] - first["jax", str(cpt)]) > 1e-2


def bitsandbytes_nf4(weight: torch.Tensor) -> torch.Tensor:
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    return bnb.dequantize_4bit(packed, state)


def test_the_cost_of_each_handover_is_that_of_bitsandbytes_and_torch(base, cpt, tmp_path):
    rows = pack([np.arange(5, 29, dtype=np.int32), np.arange(2, 16, dtype=np.int32)[::-1].copy()], 32, 0)
    merge_adapter(base, cpt, tmp_path / "merged")
    adapter, directory = read_adapter(cpt), ModelDirectory(base)
    found = handover_errors(directory, [adapter], ModelDirectory(tmp_path / "merged"), rows, "nf4")
    assert [row["handover"] for row in found] == list(HANDOVERS)

    exact = PeftModel.from_pretrained(dense(base), cpt).merge_and_unload()
    models = {"merge": PeftModel.from_pretrained(dense(base), cpt).merge_and_unload(), "stack": dense(base)}
    models["continue"] = models["stack"]
    for model in (models["merge"], models["stack"]):
        for layer in (layer for name, layer in model.named_modules() if name.endswith("_proj")):
            layer.weight.data = bitsandbytes_nf4(layer.weight.data)
    models["stack"] = models["continue"] = PeftModel.from_pretrained(models["stack"], cpt).merge_and_unload()
    for row in found:
        model = models[row["handover"]]
        errors, norms = {}, {}
        for module in adapter.modules():
            name = f"{module}.weight"
            wanted = exact.get_parameter(name).detach().double()
            errors[name] = (model.get_parameter(name).detach().double() - wanted).norm().item()
            norms[name] = wanted.norm().item()
        relative = {name: errors[name] / norms[name] for name in errors}
        total = math.hypot(*errors.values()) / math.hypot(*norms.values())
        assert total > 0.05, "4 bits are felt"
        HANDOVER_WEIGHT_ERROR.assert_close(row["weight_error"], total, "all adapted weights")
        HANDOVER_WEIGHT_ERROR.assert_close(row["worst_weight_error"], max(relative.values()), "the worst weight")
        HANDOVER_WEIGHT_ERROR.assert_close(relative[row["worst_weight"]], max(relative.values()), "its name")
        HANDOVER_KL.assert_close(row["kl"], torch_kl(exact, model, rows), f"KL of {row['handover']}")


def torch_kl(exact: torch.nn.Module, model: torch.nn.Module, rows: PackedRows) -> float:
    """Mean over the tokens of all documents, each document computed alone, in float64 from fp32 logits."""
    each = []
    for tokens, segments in zip(rows.tokens, rows.segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):
            document = torch.from_numpy(tokens[segments == segment]).long()[None]
            with torch.no_grad():
                p, q = (one(document).logits[0].double().log_softmax(-1) for one in (exact, model))
            each.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    return torch.cat(each).mean().item()
