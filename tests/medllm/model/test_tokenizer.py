"""A folder's tokenizer has the tokens of transformers' AutoTokenizer, without the price of importing torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import medllm.mini
from medllm.model.tokenizer import load_tokenizer

BASE = Path(medllm.mini.__file__).parent / "data" / "base"
TEXTS = ("第3問 アモキ病の徴候はどれか。\n", "don't 12 34  two spaces\n\nx", "１２３ＡＢＣ é e\u0301 <|endoftext|>a", "")


@pytest.mark.parametrize("model", [True, False], ids=["beside-a-model", "alone"])
@pytest.mark.parametrize(
    "named", [None, "TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast"]
)
def test_has_the_tokens_that_autotokenizer_makes_of_the_folder(tmp_path, model, named):
    settings = json.loads((BASE / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **({"tokenizer_class": named} if named else {})}))
    for name in ("tokenizer.json", *(["config.json"] if model else [])):
        shutil.copy(BASE / name, tmp_path / name)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours(text, add_special_tokens=False)["input_ids"] == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_special_tokens_that_only_the_class_names_are_its(tmp_path):
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(BASE / name, tmp_path / name)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert load_tokenizer(tmp_path).special_tokens_map == theirs.special_tokens_map
    assert theirs.eos_token == "<|endoftext|>"


def test_the_jax_engine_trains_and_answers_without_importing_torch(tmp_path):
    program = f"""
import sys
import numpy as np
from medllm.bench.shapes import CptShape, ModelShape
from medllm.config import ModelConfig, Sampling, TrainingConfig
from medllm.stage_config import CptConfig
from medllm.engines import open_trainer
from medllm.run import Run
engine = open_trainer("jax", ModelConfig({str(BASE)!r}, dtype="float32"))
shape = CptShape(ModelShape(vocabulary=64), rows=1, length=8, steps=2)
config = CptConfig(ModelConfig({str(BASE)!r}, dtype="float32"), {str(tmp_path / "run")!r}, training=TrainingConfig(1, 1, 1))
with Run(config.run, config) as run:
    engine.train_cpt(shape.data(), config, run)
engine.generate(["問"], Sampling(max_new_tokens=1))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
