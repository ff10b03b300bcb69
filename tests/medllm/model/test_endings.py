"""What ends a continuation: the union of three files, and stops that are special tokens."""

from __future__ import annotations

import json

import pytest

from medllm.errors import UserError
from medllm.model.endings import Endings, read_endings
from medllm.model.tokenizer import load_tokenizer
from tests.medllm.model.test_text_begins import byte_level


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level("<bos> $A").save_pretrained(folder)
    return load_tokenizer(folder)


def endings(tokenizer, folder, generation=None, config=None):
    for name, settings in (("generation_config.json", generation), ("config.json", config)):
        if settings is not None:
            (folder / name).write_text(json.dumps(settings))
    return read_endings(tokenizer, folder)


@pytest.mark.parametrize(
    ("generation", "config", "more"),
    [
        (None, None, ()),
        ({"eos_token_id": [3, 5]}, {"eos_token_id": 7}, (3, 5, 7)),
        ({"eos_token_id": 3, "temperature": 0.7, "suppress_tokens": None}, {"eos_token_id": [3, 7]}, (3, 7)),
        ({}, {"eos_token_id": None}, ()),
    ],
)
def test_end_tokens_are_those_of_tokenizer_generation_config_and_config(tokenizer, tmp_path, generation, config, more):
    assert endings(tokenizer, tmp_path, generation, config) == Endings((tokenizer.eos_token_id, *more))


def test_stops_that_are_special_tokens_end_by_their_ids_wherever_they_are_named(tokenizer, tmp_path):
    found = endings(tokenizer, tmp_path, {"stop_strings": ["\n問題:", "<bos>"]})
    assert found == Endings((tokenizer.eos_token_id, tokenizer.bos_token_id), ("\n問題:",))
    assert Endings((9,)).with_stops(tokenizer, ("<eos>", "\n", "<bos>", "\n")) == Endings(
        (9, tokenizer.eos_token_id, tokenizer.bos_token_id), ("\n",)
    )


@pytest.mark.parametrize(
    ("generation", "named"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token id"),
        ({"eos_token_id": [1, None]}, "eos_token_id is"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"stop_strings": [""]}, "stop_strings is"),
        ({"stop_strings": "a<eos>"}, "holds the special token <eos>"),
        ({"suppress_tokens": [4]}, "suppress_tokens forbids or forces tokens"),
        ({"forced_eos_token_id": 4}, "forced_eos_token_id forbids or forces tokens"),
    ],
)
def test_endings_that_cannot_be_followed_are_refused_by_name(tokenizer, tmp_path, generation, named):
    with pytest.raises(UserError, match=named):
        endings(tokenizer, tmp_path, generation)
