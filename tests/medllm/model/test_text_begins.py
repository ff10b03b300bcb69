"""A text begins with what its tokenizer begins it with, once, wherever it goes: training, curation, scoring, generation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import medllm.mini
from medllm.config import PairConfig
from medllm.corpus.documents import Document
from medllm.corpus.packing import tokenize_documents
from medllm.errors import UserError
from medllm.exam.option_scores import score_options
from medllm.exam.problem import Problem
from medllm.model.tokenizer import Message, encode, encode_continuation, encode_prompt, encode_texts, load_tokenizer
from medllm.preferences.records import Preference, Sample
from medllm.preferences.tokenization import tokenize_preferences

BASE = Path(medllm.mini.__file__).parent / "data" / "base"
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
PROMPT, RESPONSE = "問1: どれか。", "甲である。"


def byte_level(template: str | None) -> PreTrainedTokenizerFast:
    """A token a byte, but ``xy`` is one; ``template`` says where the special ones go."""
    vocab = {token: index for index, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "xy"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("x", "y")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<bos>", "<eos>")])
    if template:
        special = [(name, core.token_to_id(name)) for name in ("<bos>", "<eos>")]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level("<bos> $A").save_pretrained(folder)
    return load_tokenizer(folder)


class Scorer:
    """Keeps what it is asked about, and finds all of it equally likely."""

    name = "scorer"

    def logprobs(self, continuations, batch_size=32):
        self.seen = continuations
        return [np.full(len(one.completion), -1.0) for one in continuations]


def all_ways(tokenizer) -> dict[str, list[int]]:
    """The tokens of one text, prompt and response, on each way it takes to a model."""
    preference = Preference("p", PROMPT, Sample(RESPONSE, "a"), rejected=(Sample("乙。", "b"),))
    (group,) = tokenize_preferences(tokenizer, [preference], PairConfig()).groups
    (document,) = tokenize_documents(tokenizer, [Document(PROMPT + RESPONSE, "memory")])
    prompt, completion = encode_continuation(tokenizer, PROMPT, RESPONSE)
    end = [tokenizer.eos_token_id]
    return {
        "document": document.tolist(),
        "preference": [*group.prompt, *group.responses[0]],
        "option": [*prompt, *completion, *end],
        "prompt": [*encode_prompt(tokenizer, PROMPT), *encode_continuation(tokenizer, PROMPT, RESPONSE)[1], *end],
        "text": [*encode(tokenizer, PROMPT + RESPONSE), *end],
    }


def test_all_ways_of_a_text_give_the_same_tokens_with_one_bos_before_them(tokenizer):
    ways = all_ways(tokenizer)
    (expected,) = {tuple(ids) for ids in ways.values()}
    assert expected[0] == tokenizer.bos_token_id
    assert expected.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(expected) == f"<bos>{PROMPT}{RESPONSE}<eos>"


def test_a_tokenizer_without_a_bos_gives_what_it_gave(tmp_path):
    for folder in (BASE, tmp_path):
        if folder is tmp_path:
            byte_level(None).save_pretrained(folder)
        plain = load_tokenizer(folder)
        ids = plain(PROMPT + RESPONSE, add_special_tokens=False)["input_ids"]
        assert plain.decode(ids) == PROMPT + RESPONSE
        assert {tuple(way) for way in all_ways(plain).values()} == {(*ids, plain.eos_token_id)}


def test_a_conversation_begins_as_its_template_writes_it(tokenizer):
    ids = encode_prompt(tokenizer, (Message("user", "どれか。"),))
    assert tokenizer.decode(ids) == "<bos>user: どれか。\nassistant:"
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_options_of_an_exam_are_scored_after_a_prompt_with_a_bos(tokenizer):
    engine = Scorer()
    score_options(engine, tokenizer, [Problem("x", "空は。", ("赤", "青"), ("a",))])
    for one in engine.seen:
        assert one.prompt[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in one.prompt[1:] + one.completion


def test_what_merges_into_its_prompt_is_a_token_of_what_follows_it(tokenizer):
    prompt, completion = encode_continuation(tokenizer, "zx ", "y")
    assert (tokenizer.decode(prompt), tokenizer.decode(completion)) == ("<bos>zx", " y"), "the space goes with the word"
    prompt, completion = encode_continuation(tokenizer, "zx", "y")
    assert (tokenizer.decode(prompt), tokenizer.decode(completion)) == ("<bos>z", "xy")
    assert len(completion) == 1


@pytest.mark.parametrize("template", ["{{ raise_exception('no system') }}", "{{ messages[0]['content'] + 1 }}"])
def test_a_template_that_refuses_a_conversation_is_a_users_error(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    for turns in ((Message("user", "x"),), (Message("system", "s"), Message("user", "x"))):
        with pytest.raises(UserError, match=r"refuses the conversation: .*; use --format completion"):
            encode_prompt(tokenizer, turns)


def test_the_system_text_goes_into_the_users_turn_where_the_template_leaves_it_out(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}")
    ids = encode_prompt(tokenizer, (Message("system", "Be brief."), Message("user", "x"), Message("user", "z")))
    assert tokenizer.decode(ids) == "[Be brief.\n\nx][z]"


def test_a_template_that_writes_a_bos_needs_one(tmp_path):
    byte_level("<bos> $A").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"writes bos_token, and tokenizer_config\.json names none"):
        encode_prompt(load_tokenizer(tmp_path), (Message("user", "x"),))


@pytest.mark.parametrize(
    ("template", "changed", "named"),
    [
        ("<bos> $A <eos>", {}, "puts a token behind every text"),
        ("<bos> $A", {"add_bos_token": False}, "add_bos_token is false in tokenizer_config.json"),
        (None, {"add_bos_token": True}, "add_bos_token is true in tokenizer_config.json"),
        (None, {"add_prefix_space": True}, "add_prefix_space is true in tokenizer_config.json"),
        (None, {"split_special_tokens": True}, "does not read its end-of-text token <eos> as one token"),
        (None, {"auto_map": {"AutoTokenizer": ["own.Own", None]}}, "asks for code of its own"),
        (None, {"eos_token": None}, "has no end-of-text token"),
    ],
)
def test_a_tokenizer_that_training_and_generation_could_not_use_alike_is_refused(tmp_path, template, changed, named):
    byte_level(template).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **changed}))
    with pytest.raises(UserError, match=named):
        load_tokenizer(tmp_path)


def test_truncation_and_padding_in_the_file_cut_and_fill_no_text(tmp_path):
    byte_level(None).save_pretrained(tmp_path)
    core = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    core.enable_truncation(4)
    core.enable_padding(length=6)
    core.save(str(tmp_path / "tokenizer.json"))
    assert list(map(len, encode_texts(load_tokenizer(tmp_path), ["a", "abcdefgh"]))) == [1, 8]
