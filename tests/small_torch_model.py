"""The torch engine's tests' model and its fixtures: two layers, a tokenizer trained on a few lines, in a directory."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from medllm.config import ModelConfig

END = "<|endoftext|>"
TEXTS = ["the fever went down", "a cough and a cold", "rest, water and sleep help", "the answer is a"]


def write_small_model(path: Path) -> None:
    """A Qwen2 directory of two layers with a byte-level tokenizer, and generation defaults that would change every answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(linear.bias, std=0.1)
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The directory."""
    path = tmp_path_factory.mktemp("model")
    write_small_model(path)
    return path


@pytest.fixture
def dense(folder):
    """The model as it is."""
    return ModelConfig(path=str(folder), dtype="float32")


@pytest.fixture
def nf4(folder):
    """The model with its layers in 4 bits."""
    return ModelConfig(path=str(folder), dtype="bfloat16", quantization="nf4")
