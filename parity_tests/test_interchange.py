"""What one stack writes the other continues: greedy continuations of 20 prompts, token for token, of a real model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from jax_medllm.engine import JaxEngine
from jax_medllm.weights.adapters import adapter_tensors
from jax_medllm.weights.read import load_model, model_tensors, read_model
from medllm.config import ModelConfig, Sampling
from medllm.mini.diet import cpt_documents
from medllm.mini.study import BASE
from medllm.mini.world import make_world
from medllm.model.adapter import merge_adapter, read_adapter, write_adapter
from medllm.model.directory import ModelDirectory, write_model
from medllm.model.tokenizer import encode, end_token, load_tokenizer

NEW = 16
Texts = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The embedded model, with a generation config that must come along."""
    folder = tmp_path_factory.mktemp("interchange") / "base"
    shutil.copytree(BASE, folder)
    GenerationConfig(max_new_tokens=77, eos_token_id=end_token(load_tokenizer(BASE))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base) -> Path:
    """Written by PEFT: random A and B with an update of a few percent of the weights, ranks differing by kind and layer."""
    settings = PeftLoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        rank_pattern={"layers.1.mlp.up_proj": 3, "k_proj": 4},
        alpha_pattern={"down_proj": 8},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # A too: PEFT draws it from the process's own generator
                size = (3 * parameter.shape[1]) ** -0.5 if "lora_A" in name else 0.03
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(base.parent / "adapter")
    return base.parent / "adapter"


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """The beginnings of 20 texts about the invented world."""
    documents = cpt_documents(make_world(), 1)
    return [text[:12] for text in documents[:: len(documents) // 20][:20]]


def torch_continuations(model: torch.nn.Module, folder: Path, prompts: list[str]) -> Texts:
    """transformers' own generate, with the tokenizer and the generation config of the opened folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    assert model.generation_config.max_new_tokens == 77
    end = model.generation_config.eos_token_id
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = model.eval().generate(**inputs, do_sample=False, max_new_tokens=NEW, pad_token_id=tokenizer.pad_token_id)
    rows = output[:, batch["input_ids"].shape[1] :].tolist()
    return [tuple(row[: row.index(end)] if end in row else row) for row in rows]


def opened_by_transformers(folder: Path, prompts: list[str]) -> Texts:
    return torch_continuations(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder, prompts)


def opened_by_peft(base: Path, adapter: Path, prompts: list[str]) -> Texts:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return torch_continuations(PeftModel.from_pretrained(model, adapter), base, prompts)


def opened_by_jax(prompts: list[str], path: Path, adapter: Path | None = None) -> Texts:
    engine = JaxEngine(ModelConfig(str(path), None if adapter is None else str(adapter), dtype="float32"))
    return [one.tokens for (one,) in engine.generate(prompts, Sampling(max_new_tokens=NEW))]


@pytest.fixture(scope="module")
def expected(base, adapter, prompts) -> Texts:
    """PEFT on the base with the adapter it wrote."""
    found = opened_by_peft(base, adapter, prompts)
    without = opened_by_transformers(base, prompts)
    assert sum(one != other for one, other in zip(found, without, strict=True)) >= 5, "the adapter changes what is said"
    assert len(set(found)) >= 15
    return found


@pytest.fixture(scope="module")
def merged(base, adapter) -> Path:
    merge_adapter(base, adapter, base.parent / "merged")
    return base.parent / "merged"


@pytest.fixture(scope="module")
def written_by_jax(base, adapter) -> Path:
    """The adapter in its trainable place, written out again."""
    given = read_adapter(adapter)
    model = read_model(ModelDirectory(base), lora=given)
    write_adapter(base.parent / "jax_adapter", given.lora, adapter_tensors(model), str(base))
    return base.parent / "jax_adapter"


@pytest.fixture(scope="module")
def exported_by_jax(base, adapter) -> Path:
    """A whole model written from JAX arrays, its frozen adapter in the weights."""
    model = load_model(ModelConfig(str(base), str(adapter), dtype="float32"))
    write_model(base.parent / "jax_model", model.config.to_hf(), model_tensors(model), companions_from=base)
    return base.parent / "jax_model"


@pytest.mark.parametrize("folder", ["merged", "exported_by_jax"])
def test_a_merged_directory_continues_as_base_and_adapter_do_on_both_stacks(folder, prompts, expected, request):
    path = request.getfixturevalue(folder)
    assert opened_by_transformers(path, prompts) == expected
    assert opened_by_jax(prompts, path) == expected


def test_an_adapter_written_by_peft_is_continued_alike_by_jax(base, adapter, prompts, expected):
    assert opened_by_jax(prompts, base, adapter) == expected


def test_an_adapter_written_by_jax_is_continued_alike_by_peft(base, written_by_jax, prompts, expected):
    assert opened_by_peft(base, written_by_jax, prompts) == expected


def test_the_prompts_are_the_same_tokens_to_both_stacks(base, merged, prompts):
    ours, theirs = load_tokenizer(merged), AutoTokenizer.from_pretrained(merged)
    assert len(prompts) == 20
    for prompt in prompts:
        np.testing.assert_array_equal(encode(ours, prompt), theirs(prompt, add_special_tokens=False)["input_ids"])
