"""The reference engine on models small enough to train in a second, against transformers, PEFT and TRL called directly."""

import dataclasses
import json
import math
import shutil

import numpy as np
import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from medllm.config import LoraConfig, ModelConfig, OptimizerConfig, PairConfig, PreferenceLoss, Sampling, TrainingConfig
from medllm.corpus.packing import pack
from medllm.engine import Continuation
from medllm.errors import UserError
from medllm.preferences.pairs import trl_rows
from medllm.preferences.records import Preference, Sample
from medllm.preferences.tokenization import tokenize_preferences
from medllm.run import Run
from medllm.stage_config import CptConfig, RpoConfig
from tests.small_torch_model import END, TEXTS
from torch_ref import TorchEngine, add_adapter, open_model
from torch_ref.cpt import RowFeatures
from torch_ref.model import trainable_base
from torch_ref.rpo import dpo_trainer

pytest_plugins = ["tests.small_torch_model"]


def cpt_config(model, run, **training):
    settings = {"epochs": 2, "batch_size": 2, "accumulation": 2, **training}
    return CptConfig(
        model=model, run=str(run), lora=LoraConfig(rank=4, alpha=8), optimizer=OptimizerConfig(1e-2),
        training=TrainingConfig(**settings),
    )  # fmt: skip


def rpo_config(model, run, *, alpha=10.0, nll="micro_batch_tokens", unit="pair", max_length=200, handover="merge", **training):
    settings = {"epochs": 1, "batch_size": 4, "accumulation": 1, **training}
    return RpoConfig(
        model=model, run=str(run), preferences="memory", loss=PreferenceLoss(alpha=alpha, nll_reduction=nll),
        pairs=PairConfig(unit=unit, max_length=max_length), lora=LoraConfig(rank=4, alpha=8),
        optimizer=OptimizerConfig(3e-3, warmup_ratio=0), training=TrainingConfig(**settings), handover=handover,
    )  # fmt: skip


def rows(count=12, length=24, packing="packed"):
    rng = np.random.default_rng(0)
    documents = [np.resize(rng.integers(1, 6, 3), rng.integers(5, 20)) for _ in range(count)]
    return pack(documents, length, 0, packing)


def preferences(count=4):
    return [
        Preference(
            f"p{i}", f"Question: what is {i}?\n Explanation:",
            ground_truth=Sample(f" because {TEXTS[i % 4]}\n Answer:a", "a"),
            chosen=(Sample(f" so {TEXTS[(i + 1) % 4]}\n Answer:a", "a"),),
            rejected=(Sample(f" no\n Answer:{'bcd'[i % 3]}", "b"),),
        )
        for i in range(count)
    ]  # fmt: skip


def train(config, work):
    run = Run(config.run, config, resume=config.resume)
    engine = TorchEngine(config.model)
    if isinstance(config, CptConfig):
        return run, engine.train_cpt(work, config, run)
    return run, engine.train_preferences(tokenize_preferences(engine.tokenizer, work, config.pairs), config, run)


def adapter_of(summary):
    return load_file(f"{summary.adapter}/adapter_model.safetensors")


def single_rows(model, packed):
    """Logits of each document of a packed row, computed alone."""
    for tokens, segments in zip(packed.tokens, packed.segment_ids, strict=True):
        yield [model(torch.tensor(tokens[segments == s])[None].long()).logits[0] for s in range(1, segments.max() + 1)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_do_not_see_each_other(folder, attention, checkpointing):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).train()
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = rows()
    assert (packed.segment_ids.max(1) > 1).any()
    assert (packed.segment_ids == 0).any(), "a row with padding is part of the claim"
    features = RowFeatures(packed)
    batch = {name: torch.stack([features[i][name] for i in range(len(features))]) for name in ("input_ids", "position_ids")}
    logits = model(**batch).logits
    for row, documents in enumerate(single_rows(model, packed)):
        alone = torch.cat(documents)
        torch.testing.assert_close(logits[row, : len(alone)], alone, atol=2e-5, rtol=1e-5)


def test_labels_are_the_targets_of_the_rows_and_nothing_else():
    packed = rows()
    features = RowFeatures(packed)
    labels = np.stack([features[i]["labels"].numpy() for i in range(len(features))])
    assert ((labels != -100) == packed.targets).all()
    assert (labels[packed.targets] == packed.tokens[packed.targets]).all()


@pytest.mark.parametrize("packing", ["packed", "wrapped"])
def test_cpt_lowers_the_loss_and_leaves_an_adapter_that_peft_loads(dense, tmp_path, packing):
    run, summary = train(cpt_config(dense, tmp_path / "run", epochs=6), rows(packing=packing))
    logged = run.metrics()
    assert [line["step"] for line in logged] == list(range(1, summary.steps + 1))
    assert {"loss", "learning_rate", "grad_norm"} <= set(logged[0])
    assert logged[0]["learning_rate"] == 0, "the first warmup step"
    assert logged[-1]["loss"] == summary.loss < 0.8 * logged[0]["loss"]
    assert summary.rate > 0
    model = peft.PeftModel.from_pretrained(open_model(dense), summary.adapter)
    stored = adapter_of(summary)
    assert len(stored) == 2 * 2 * 7
    assert all(value.dtype == torch.float32 and value.abs().sum() > 0 for value in stored.values())
    loaded = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(loaded[name], value) for name, value in stored.items())
    base = open_model(dense)
    tokens = torch.arange(1, 9)[None]
    assert not torch.allclose(model(tokens).logits, base(tokens).logits)


def test_cpt_loss_is_one_token_mean_over_accumulated_rows_of_unequal_length(dense, tmp_path):
    packed = pack([np.arange(1, 24), np.arange(1, 4)], 24, 0)
    run, _ = train(cpt_config(dense, tmp_path / "run", epochs=1, batch_size=1, accumulation=2), packed)
    model = open_model(dense)
    with torch.no_grad():
        logits = [model(torch.arange(1, end)[None]).logits[0, :-1].double() for end in (24, 4)]
    nll = torch.cat([-x.log_softmax(-1)[torch.arange(len(x)), torch.arange(2, len(x) + 2)] for x in logits])
    assert run.metrics()[0]["loss"] == pytest.approx(nll.mean().item(), rel=1e-5)


def test_training_resumed_from_a_checkpoint_ends_where_an_uninterrupted_one_does(dense, tmp_path):
    _, whole = train(cpt_config(dense, tmp_path / "whole"), rows())
    half = cpt_config(dense, tmp_path / "half", max_steps=2)
    _, stopped = train(half, rows())
    assert stopped.steps == 2 < whole.steps
    with (tmp_path / "half" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 0.0}\n')  # logged, then killed before its checkpoint
    run, resumed = train(dataclasses.replace(half, training=cpt_config(dense, "").training, resume=True), rows())
    assert resumed.steps == whole.steps
    assert [line["step"] for line in run.metrics()] == list(range(1, whole.steps + 1))
    assert all(line["loss"] > 0 for line in run.metrics())
    for name, value in adapter_of(whole).items():
        torch.testing.assert_close(adapter_of(resumed)[name], value, atol=1e-6, rtol=0)


def test_a_run_that_has_reached_its_last_step_takes_no_other_on_resuming(dense, tmp_path):
    short = cpt_config(dense, tmp_path / "run", max_steps=2)
    _, done = train(short, rows())
    before = adapter_of(done)
    run, again = train(dataclasses.replace(short, resume=True), rows())
    assert (again.steps, again.loss) == (2, pytest.approx(done.loss))
    assert [line["step"] for line in run.metrics()] == [1, 2]
    for name, value in adapter_of(again).items():
        assert torch.equal(before[name], value)


@pytest.mark.parametrize("alpha", [0.0, 10.0])
def test_rpo_starts_at_ln_2_plus_the_weighted_nll(dense, tmp_path, alpha):
    run, summary = train(rpo_config(dense, tmp_path / "run", alpha=alpha, epochs=2), preferences())
    first, last = run.metrics()[0], run.metrics()[-1]
    work = trl_rows(preferences(), PairConfig())
    assert first["pairs_per_step"] == 4
    assert summary.steps == len(work) * 2 // 4
    if alpha == 0:
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    else:
        assert first["loss"] > math.log(2)
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] > 0
    assert any(value.abs().max() > 0 for name, value in adapter_of(summary).items() if "lora_B" in name)


def test_sequence_reduction_averages_over_each_response_and_trl_over_the_micro_batch(dense, tmp_path):
    """Both against the definition, from the engine's own log-probabilities of the untrained model."""
    work = preferences(2)
    engine = TorchEngine(dense)
    encode = engine.tokenizer.encode
    pairs = trl_rows(work, PairConfig())
    values = engine.logprobs([Continuation(tuple(encode(p["prompt"])), tuple(encode(p["chosen"] + END))) for p in pairs])
    expected = {
        "sequence": math.log(2) + 10 * np.mean([-v.mean() for v in values]),
        "micro_batch_tokens": math.log(2) - 10 * np.concatenate(values).mean(),
    }
    assert abs(expected["sequence"] - expected["micro_batch_tokens"]) > 1e-2
    for nll, loss in expected.items():
        config = rpo_config(dense, tmp_path / nll, nll=nll, batch_size=len(pairs))
        run, _ = train(config, work)
        assert run.metrics()[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_batch_counted_in_problems_becomes_their_mean_number_of_pairs(dense, tmp_path):
    run, summary = train(rpo_config(dense, tmp_path / "run", unit="problem", batch_size=2), preferences(4))
    assert run.metrics()[0]["pairs_per_step"] == 6
    assert summary.steps == 2


def test_an_earlier_adapter_stays_in_the_reference_of_preference_training(dense, tmp_path):
    """With both adapters off the DPO loss would not begin at ln 2, and the rewards would not begin at zero."""
    _, first = train(cpt_config(dense, tmp_path / "cpt"), rows())
    stacked = dataclasses.replace(dense, adapter=first.adapter)
    tokens = torch.arange(1, 9)[None]
    loaded = open_model(stacked)
    assert isinstance(loaded, peft.PeftModel)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    expected = loaded(tokens).logits
    assert not torch.allclose(expected, open_model(dense)(tokens).logits)
    torch.testing.assert_close(trainable_base(loaded)(tokens).logits, expected, atol=0, rtol=0)
    run, summary = train(rpo_config(stacked, tmp_path / "rpo", alpha=0.0, handover="stack"), preferences())
    assert run.metrics()[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.metrics()[0]["rewards/chosen"] == 0
    assert len(adapter_of(summary)) == 2 * 2 * 7


@pytest.mark.parametrize("quantization", ["nf4", "nf4-single"])
def test_nf4_is_quantized_as_documented_and_trains_on_this_cpu(nf4, quantization):
    model = open_model(dataclasses.replace(nf4, quantization=quantization))
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", quantization == "nf4", 64)
        assert layer.compute_dtype == torch.bfloat16
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = model(tokens).logits  # an evaluation-mode pass first: this is what repacks weights on AVX512-BF16
        assert torch.equal(model(tokens).logits, before)
    tuned = add_adapter(model, LoraConfig(rank=4))
    assert torch.equal(tuned(tokens).logits, before)
    tuned(tokens, labels=tokens).loss.backward()
    gradients = {name: parameter.grad for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert len(gradients) == 2 * 2 * 7
    assert all(gradient is not None for gradient in gradients.values())
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if "lora_B" in name)
    assert {parameter.dtype for parameter in tuned.parameters() if parameter.requires_grad} == {torch.float32}


def test_a_bitsandbytes_directory_opens_as_it_is(nf4, folder, tmp_path):
    model = open_model(nf4)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        model.save_pretrained(tmp_path / "packed")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / name, tmp_path / "packed" / name)
        engine = TorchEngine(dataclasses.replace(nf4, path=str(tmp_path / "packed")))
        assert torch.equal(engine.model(tokens).logits, expected)


def test_qlora_runs_through_both_stages(nf4, tmp_path):
    run, first = train(cpt_config(nf4, tmp_path / "cpt", epochs=3, batch_size=4), rows())
    assert first.loss < run.metrics()[0]["loss"]
    stacked = dataclasses.replace(nf4, adapter=first.adapter)
    run, _ = train(rpo_config(stacked, tmp_path / "rpo", epochs=2, handover="stack"), preferences(2))
    assert run.metrics()[-1]["loss"] < run.metrics()[0]["loss"]
    assert run.metrics()[0]["rewards/chosen"] == 0


def test_the_adapter_is_trained_in_bf16_over_nf4_and_in_fp32_over_dense_weights(dense, nf4, tmp_path):
    for model, dtype in ((dense, torch.float32), (nf4, torch.bfloat16)):
        config = rpo_config(model, tmp_path / model.quantization)
        pairs = trl_rows(preferences(), PairConfig())
        tokenizer = TorchEngine(model).tokenizer
        trainer = dpo_trainer(model, tokenizer, pairs, config, Run(config.run, config), batch=1, accumulation=1)
        assert {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad} == {dtype}


def test_the_seed_alone_decides_the_fresh_adapter(dense):
    def weights(seed):
        return peft.get_peft_model_state_dict(add_adapter(open_model(dense), LoraConfig(rank=4, seed=seed)))

    one, again, other = weights(1), weights(1), weights(2)
    a = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one[a], other[a])
    assert one[a].shape == (4, 96)
    bound = 1 / math.sqrt(96)
    assert 0.9 * bound < one[a].abs().max() <= bound
    assert all(value.abs().max() == 0 for name, value in one.items() if "lora_B" in name)


def test_what_cannot_be_opened_or_trained_is_refused_in_one_line(dense, folder, tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        TorchEngine(ModelConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="no such adapter folder"):
        TorchEngine(dataclasses.replace(dense, adapter=str(tmp_path / "nowhere")))
    foreign = tmp_path / "code"
    foreign.mkdir()
    for file in folder.iterdir():
        (foreign / file.name).symlink_to(file)
    (foreign / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    with pytest.raises(UserError, match="never run"):
        TorchEngine(dataclasses.replace(dense, path=str(foreign)))
    with pytest.raises(UserError, match=r"prompt 0: \d+ tokens.*context of 256"):
        TorchEngine(dense).generate(["a"], Sampling(max_new_tokens=256))
    partly = cpt_config(dense, tmp_path / "partly", remat="projections")
    with pytest.raises(UserError, match=r"training\.remat is 'projections': engine torch knows 'none' and 'layer'"):
        train(partly, rows())


def test_a_loss_that_is_no_number_ends_the_run(dense, tmp_path):
    config = dataclasses.replace(cpt_config(dense, tmp_path / "run"), optimizer=OptimizerConfig(1e38, warmup_ratio=0))
    with pytest.raises(UserError, match=r"step 2: the loss is (nan|inf)"):
        train(config, rows())


@pytest.mark.parametrize("change", ["drop", "cut"])
def test_a_model_with_a_tensor_missing_or_misshapen_is_refused(dense, folder, tmp_path, change):
    shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    if change == "drop":
        del tensors[name]
    save_file(tensors, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        open_model(dataclasses.replace(dense, path=str(tmp_path / "broken")))


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(dense, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="multiple of 4"):
        train(cpt_config(dense, tmp_path / "run", batch_size=6), rows())
