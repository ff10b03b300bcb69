"""The engine from a model directory to an adapter that changes what the model says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_medllm import engine as engine_module
from jax_medllm.engine import JaxEngine
from jax_medllm.model.decoder import DenseDecoder
from jax_medllm.train.reference_cache import compute_reference
from jax_medllm.weights.read import model_tensors
from medllm.config import LoraConfig, ModelConfig, OptimizerConfig, PairConfig, PreferenceLoss, Sampling, TrainingConfig
from medllm.corpus.packing import PackedRows
from medllm.engine import Continuation
from medllm.errors import UserError
from medllm.model.adapter import read_adapter
from medllm.model.directory import write_model
from medllm.preferences.records import Preference, Sample
from medllm.preferences.tokenization import tokenize_preferences
from medllm.run import Run
from medllm.stage_config import CptConfig, RpoConfig
from tests.small_model import small_config

LETTERS = "abcdefghijklmnopqrstuvwxyz_.:"
SMALL = small_config(vocab_size=40, max_positions=96)
LORA = LoraConfig(rank=8, alpha=16)
FAST = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    # Wider than at initialization: with embeddings of 0.02 no adapter could make a token likely.
    scales = {True: 32, False: 4}
    tensors = (
        (name, tensor * (scales["embed" in name] if tensor.ndim > 1 else 1))
        for name, tensor in model_tensors(DenseDecoder(SMALL, rngs=nnx.Rngs(0)))
    )
    write_model(folder, SMALL.to_hf(), tensors)
    vocabulary = {"<end>": 0, **{letter: i + 1 for i, letter in enumerate(LETTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<end>|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(str(folder))
    return folder


def model_config(directory, **changes):
    return ModelConfig(str(directory), dtype="float32", **changes)


def ids(text):
    return tuple(LETTERS.index(letter) + 1 for letter in text)


def test_cpt_teaches_a_text_and_the_adapter_reopened_recites_it(directory, tmp_path):
    line = "the_liver_is_in_the_right_upper_part."
    tokens = np.array([[*ids(line), 0]] * 4, np.int32)
    rows = PackedRows(tokens, np.ones_like(tokens), np.tile(np.arange(tokens.shape[1], dtype=np.int32), (4, 1)))
    training = TrainingConfig(epochs=80, batch_size=4, accumulation=1, log_every=10, remat="none")
    config = CptConfig(model_config(directory), str(tmp_path / "run"), lora=LORA, optimizer=FAST, training=training)
    run = Run(config.run, config)
    engine = JaxEngine(config.model)
    summary = engine.train_cpt(rows, config, run)
    assert summary.steps == 80
    assert summary.loss == run.metrics()[-1]["loss"] < 0.1
    assert summary.rate > 0
    assert read_adapter(run.path / "adapter").lora.rank == 8

    asked = [Continuation(ids("the_liver_"), (*ids("is_in_the_right_upper_part."), 0))]
    taught = JaxEngine(model_config(directory, adapter=summary.adapter))
    before, after = engine.logprobs(asked)[0], taught.logprobs(asked)[0]
    assert after.shape == (28,)
    assert after.sum() > before.sum() + 28
    prompts = ["the_liver_", "the_liver_is_in_"]
    (one,), (two,) = taught.generate(prompts, Sampling(max_new_tokens=40))
    assert one.finish == "stop"
    assert one.tokens == ids("is_in_the_right_upper_part.")
    assert two.tokens == ids("the_right_upper_part.")
    (cut,), _ = taught.generate(prompts, Sampling(max_new_tokens=40, stop=("upper",)))
    assert cut.tokens == ids("is_in_the_right_upper")


def preference(index):
    word = "abc"[index % 3]
    return Preference(
        f"p{index}",
        f"question_{word}:",
        Sample(f"_{word}_it_is.", word),
        chosen=(Sample(f"_{word}.", word),),
        rejected=(Sample("_xyz_no.", "x"),),
    )


def train(config, count, run):
    engine = JaxEngine(config.model)
    data = tokenize_preferences(engine.tokenizer, [preference(i) for i in range(count)], config.pairs)
    return engine.train_preferences(data, config, run)


@pytest.mark.parametrize("unit", ["problem", "pair"])
def test_rpo_raises_the_margin_of_the_hierarchy(directory, tmp_path, unit):
    config = RpoConfig(
        model_config(directory),
        str(tmp_path / "run"),
        preferences="preferences.jsonl",
        loss=PreferenceLoss(beta=0.1, alpha=1.0),
        pairs=PairConfig(unit=unit, max_length=64),
        lora=LORA,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.0),
        training=TrainingConfig(epochs=8, batch_size=3, accumulation=1),
    )
    run = Run(config.run, config)
    summary = train(config, 3, run)
    lines = run.metrics()
    assert summary.steps == len(lines) == (8 if unit == "problem" else 24)
    assert lines[0]["dpo_loss"] == pytest.approx(np.log(2), abs=1e-5)
    epoch = lines[-len(lines) // 8 :]  # whose steps hold all pairs
    assert np.mean([line["rewards/margins"] for line in epoch]) > 0.05
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.25
    assert len(list(run.path.glob("reference-*.safetensors"))) == 1
    assert 0 < summary.padding < 1
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "nll", "grad_norm", "learning_rate"} < lines[0].keys()


def test_a_later_run_over_the_same_data_reads_the_reference_from_the_folder_that_was_named(directory, tmp_path, monkeypatch):
    computed = []

    def counted(model, data):
        computed.append(len(data.groups))
        return compute_reference(model, data)

    monkeypatch.setattr(engine_module, "compute_reference", counted)
    losses = []
    for name, cache, count in (("one", "kept", 3), ("two", "kept", 3), ("other", "kept", 2), ("without", None, 3)):
        config = RpoConfig(
            model_config(directory),
            str(tmp_path / name),
            preferences="preferences.jsonl",
            pairs=PairConfig(max_length=64),
            lora=LORA,
            training=TrainingConfig(epochs=1, batch_size=3, accumulation=1),
            reference_cache=cache and str(tmp_path / cache),
        )
        run = Run(config.run, config)
        summary = train(config, count, run)
        losses.append(summary.loss)
    assert computed == [3, 2]
    assert losses[0] == losses[1] == pytest.approx(losses[3], abs=1e-6)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert {file.parent.name for file in tmp_path.glob("*/reference-*")} == {"kept"}


def test_a_loss_that_there_is_not_is_refused_on_opening(directory, tmp_path):
    model = model_config(directory)
    config = RpoConfig(model, str(tmp_path / "run"), "preferences.jsonl", loss=PreferenceLoss("rop"))
    with pytest.raises(UserError, match=r"loss\.name is 'rop'"):
        JaxEngine(model, config)


def test_dpo_trains_by_its_name_and_logs_its_own_metrics(directory, tmp_path):
    config = RpoConfig(
        model_config(directory),
        str(tmp_path / "run"),
        preferences="preferences.jsonl",
        loss=PreferenceLoss("dpo", beta=0.1),
        pairs=PairConfig(max_length=64),
        lora=LORA,
        training=TrainingConfig(epochs=1, batch_size=3, accumulation=1),
    )
    run = Run(config.run, config)
    train(config, 3, run)
    (line,) = run.metrics()
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert line.keys() == {
        "step",
        "loss",
        *rewards,
        "learning_rate",
        "grad_norm",
        "seconds",
        "compile_seconds",
        "pairs_per_second",
    }
    assert line["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_on_opening(directory, tmp_path):
    folder = tmp_path / "small"
    narrow = dataclasses.replace(SMALL, vocab_size=20)
    write_model(folder, narrow.to_hf(), model_tensors(DenseDecoder(narrow, rngs=nnx.Rngs(0))))
    with pytest.raises(UserError, match="vocabulary"):
        JaxEngine(ModelConfig(str(folder), tokenizer=str(directory), dtype="float32"))
