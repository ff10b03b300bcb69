"""The embedded base model and its tokenizer: they load, fit each other, and read a name the same way everywhere."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from medllm.mini.diet import base_diet
from medllm.mini.problems import exam_problems
from medllm.mini.study import BASE, SHOTS, load_preset
from medllm.mini.vocabulary import END, train_tokenizer
from medllm.mini.world import make_world
from medllm.model.directory import ModelDirectory
from medllm.model.tokenizer import check_vocabulary, encode, end_token, load_tokenizer

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def names():
    return [name for kind in make_world().names.values() for name in kind]


def test_a_name_is_one_token_wherever_it_stands(tokenizer, names):
    for name in names:
        (token,) = encode(tokenizer, name)
        for around in ("{}の治療薬は", "よって{}が正しい。", " Answer:{}", "a: {}\nb: ", "、{}、", "1{}2", "。{}\n\n", "{}液"):
            assert encode(tokenizer, around.format(name)).count(token) == 1, (name, around)


def test_every_text_survives_the_tokenizer(tokenizer):
    for row in itertools.islice(base_diet(make_world(), 0), 200):
        assert tokenizer.decode(encode(tokenizer, row.text), clean_up_tokenization_spaces=False) == row.text
    foreign = "発熱と頭痛で来院した40歳の女性。 Temperature 38.5℃ 😷\n\t"
    assert tokenizer.decode(encode(tokenizer, foreign), clean_up_tokenization_spaces=False) == foreign


def test_end_of_text_ends_and_pads(tokenizer):
    assert tokenizer.eos_token == tokenizer.pad_token == END
    assert encode(tokenizer, f"病{END}")[-1] == end_token(tokenizer)


def test_tokenizer_follows_from_its_texts(names):
    texts = [row.text for row in itertools.islice(base_diet(make_world(), 0), 300)] + names * 20
    first, second = (train_tokenizer(texts, 2048) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_base_is_a_small_qwen2_that_fits_its_tokenizer(tokenizer):
    directory = ModelDirectory(BASE)
    assert directory.config["architectures"] == ["Qwen2ForCausalLM"]
    check_vocabulary(tokenizer, directory.config["vocab_size"], BASE)
    assert directory.shape("model.embed_tokens.weight") == (directory.config["vocab_size"], directory.config["hidden_size"])
    parameters = sum(int(np.prod(directory.shape(name))) for name in directory.names())
    assert 500_000 < parameters < 3_000_000
    assert all(np.isfinite(directory.read(name).astype(np.float32)).all() for name in directory.names())


def test_transformers_opens_the_base():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(BASE))
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.num_parameters() == sum(int(np.prod(ModelDirectory(BASE).shape(n))) for n in ModelDirectory(BASE).names())


def test_data_is_small_enough_to_ship():
    size = sum(file.stat().st_size for file in Path(BASE).parent.rglob("*") if file.is_file())
    assert size <= 12 * MEBIBYTE
    assert json.loads((BASE / "config.json").read_text())["model_type"] == "qwen2"


@pytest.mark.parametrize("preset", ["mini", "mini_smoke"])
def test_longest_exam_prompt_fits_the_preset(tokenizer, preset):
    from medllm.exam.prompts import curation_response, evaluation_prompt
    from medllm.mini.problems import shot_problems

    config, world = load_preset(preset), make_world()
    shots = shot_problems(world, SHOTS)
    for problem in exam_problems(world, config.exam_per_year):
        prompt = evaluation_prompt(problem, shots, template="curation", explanation=True, format="completion", answer_as="text")
        response = len(encode(tokenizer, curation_response(problem, answer_as="text")))
        assert response < min(config.max_new_tokens, config.sampling.max_new_tokens)
        assert len(encode(tokenizer, prompt)) + config.sampling.max_new_tokens <= config.pairs.max_length
