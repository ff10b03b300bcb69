"""What each family does at the two ends of a text: the file's own encoding, transformers' templates, TRL's rows."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from medllm.config import PairConfig
from medllm.corpus.documents import Document
from medllm.corpus.packing import pack, tokenize_documents
from medllm.model.endings import read_endings
from medllm.model.tokenizer import Message, decode, encode, encode_continuation, encode_prompt, load_tokenizer
from medllm.preferences.records import Preference, Sample
from medllm.preferences.tokenization import tokenize_preferences
from parity_tests.family_tokenizers import FAMILIES, write_family
from parity_tests.preference_cases import trl_dataset, trl_sequences

DOCS = Path(__file__).parents[1] / "docs" / "tokens.md"
TEXTS = ("the fever 12345", "問題: é e\u0301 A", "  two  spaces\n\nx", "答え: <s>x</s> the<|im_end|>y", "")
SYSTEM, USER = Message("system", "医師国家試験を解きます。"), Message("user", "the fever? ")
SHOT = (Message("user", "問題"), Message("assistant", "答え:a"))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Its name and folder, the tokenizer as we open it, and as transformers' generic class does."""
    folder = write_family(tmp_path_factory.mktemp("families"), request.param)
    stock = PreTrainedTokenizerFast.from_pretrained(str(folder))
    stock.pad_token = stock.pad_token or stock.eos_token
    return SimpleNamespace(name=request.param, folder=folder, ours=load_tokenizer(folder), stock=stock)


def test_a_text_has_the_tokens_of_the_file(family):
    file = Tokenizer.from_file(str(family.folder / "tokenizer.json"))
    for text in TEXTS:
        assert encode(family.ours, text) == file.encode(text).ids
        assert family.ours.decode(encode(family.ours, text)) == file.decode(file.encode(text).ids, skip_special_tokens=False)


def test_documents_and_preferences_have_trls_tokens_with_one_beginning_and_one_end(family, tmp_path):
    settings = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    trainer = SimpleNamespace(_tokenizer=family.stock, chat_template=None, completion_only_loss=False)
    rows = Dataset.from_dict({"text": list(TEXTS)})
    theirs = SFTTrainer._prepare_dataset(trainer, rows, family.stock, settings, False, None, "train")["input_ids"]
    ours = [tokens.tolist() for tokens in tokenize_documents(family.ours, [Document(text, "memory") for text in TEXTS])]
    assert ours == list(theirs)
    end, front = family.ours.eos_token_id, encode(family.ours, "")
    assert ours[0].count(end) == 1
    assert ours[0][: len(front)] == front

    pairs = PairConfig(max_rejected=0)
    answers = [(Sample(" the answer", "a"),), (Sample("答え:b", "b"), Sample("  no\n", "b"))]
    preference = Preference("110A1", "問題: the fever\n Explanation:", Sample("fever 12", "a"), *answers)
    groups = tokenize_preferences(family.ours, [preference], pairs).groups
    found = [tuple(list(ids) for ids in tokens) for group in groups for tokens in group.pair_tokens()]
    assert found == trl_sequences(family.stock, trl_dataset(family.stock, [preference], pairs), pairs.max_length)
    for prompt, high, low in found:
        assert prompt[: len(front)] == front
        assert [(high + low).count(token) for token in {*front, end}] == [2 * (token == end) for token in {*front, end}]
        assert high[-1] == low[-1] == end


def test_padding_is_no_target_and_each_documents_end_is_one(family):
    end = family.ours.eos_token_id
    documents = tokenize_documents(family.ours, [Document("the fever", "memory"), Document("答え", "memory")])
    rows = pack(documents, 64, family.ours.pad_token_id)
    assert rows.targets.sum() == sum(len(tokens) - 1 for tokens in documents)
    assert (rows.tokens[rows.targets] == end).sum() == 2
    assert (rows.tokens[rows.segment_ids == 0] == family.stock.pad_token_id).all()


@pytest.mark.parametrize("turns", [(SYSTEM, USER), (USER,), (SYSTEM, *SHOT, USER)], ids=["system", "user", "shot"])
def test_a_conversation_has_the_tokens_that_transformers_gives_it(family, turns):
    expected = turns
    if family.name == "mistral" and turns[0] is SYSTEM:
        expected = (Message("user", f"{SYSTEM.content}\n\n{turns[1].content}"), *turns[2:])
    messages = [message.to_json() for message in expected]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False, "enable_thinking": False}
    ids = encode_prompt(family.ours, turns)
    assert ids == family.stock.apply_chat_template(messages, **options)
    if family.stock.bos_token and family.name != "llama 2":  # whose template begins every question
        assert ids.count(family.stock.bos_token_id) == 1
    assert family.stock.decode(ids).endswith("<think>\n\n</think>\n\n") == (family.name == "qwen3")


def test_what_a_model_writes_is_trained_on_as_the_tokens_it_wrote(family):
    for prompt in ("問題 A", "the fever\n答え:"):
        for response in (" the fever", "the", "答え: é", "\n A  x "):
            before, written = encode_continuation(family.ours, prompt, response)
            assert decode(family.ours, written) == response
            preference = Preference("p", prompt, Sample(decode(family.ours, written), "a"), rejected=(Sample("!", "b"),))
            (group,) = tokenize_preferences(family.ours, [preference], PairConfig()).groups
            assert [*group.prompt, *group.responses[0]] == [*before, *written, family.ours.eos_token_id]


def test_the_table_of_the_docs_says_what_is_done(family):
    rows = re.findall(r"^\| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    cells = {row.split(" | ")[0]: row.replace("\\|", "|").split(" | ") for row in rows}[family.name]
    _, begins, ends, stops, chat, padding = ([] if cell == "–" else re.findall("`(.+?)`", cell) for cell in cells)
    words = family.ours.convert_ids_to_tokens
    document = tokenize_documents(family.ours, [Document("the", "memory")])[0].tolist()
    assert words(encode(family.ours, "")) == begins
    assert words(document[-1:]) == ends
    assert sorted(words(list(read_endings(family.ours, family.folder).ids))) == sorted(stops)
    assert words(encode_prompt(family.ours, (USER,))[:1]) == chat
    assert [family.ours.pad_token] == padding


def test_a_file_that_its_class_would_open_otherwise_is_opened_as_it_is(tmp_path):
    """Digits in threes and no composing, in a folder that says it is Qwen2's."""
    folder = write_family(tmp_path, "llama 3")
    named = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    file, text = Tokenizer.from_file(str(folder / "tokenizer.json")), "123 e\u0301"
    assert encode(load_tokenizer(folder), text) == file.encode(text).ids
    by_class = AutoTokenizer.from_pretrained(str(folder))
    assert by_class(text)["input_ids"] != file.encode(text).ids, "the class keeps the file: it could be opened"


def test_the_qwen_tokenizer_has_the_same_tokens_by_its_two_files_and_by_tokenizer_json(tmp_path):
    folder = os.environ.get("QWEN_TOKENIZER_DIR")
    if not folder:
        pytest.skip("set QWEN_TOKENIZER_DIR to a folder with Qwen2.5's vocab.json and merges.txt")
    by_class = AutoTokenizer.from_pretrained(folder)
    by_class.save_pretrained(tmp_path)
    for ours in (load_tokenizer(folder), load_tokenizer(tmp_path)):
        for text in TEXTS:
            assert encode(ours, text) == by_class(text)["input_ids"]
            assert decode(ours, encode(ours, text)) == by_class.decode(by_class(text)["input_ids"], skip_special_tokens=True)
