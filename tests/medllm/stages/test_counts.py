"""What results count is what was trained on, and what was found in it: the same on both engines."""

from __future__ import annotations

import json
import shutil

import pytest

from medllm.cli import main
from medllm.mini.study import BASE
from medllm.model.tokenizer import control_tokens, encode, load_tokenizer

END = load_tokenizer(BASE).eos_token


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def result(*words: str) -> dict:
    assert main([*words, "--json", "result.json"]) == 0
    with open("result.json", encoding="utf-8") as stream:
        return json.load(stream)


TRAINING = ["--model.dtype", "float32", "--training.epochs", "1", "--training.accumulation", "1", "--lora.rank", "2"]


@pytest.mark.parametrize("engine", ["jax", "torch"])
@pytest.mark.parametrize("packing", ["packed", "wrapped"])
def test_documents_tokens_and_rows_are_those_that_train_something(folder, capsys, engine, packing):
    model = folder / "model"
    shutil.copytree(BASE, model)
    settings = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": "〇"}, "content": ""}
    (model / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    texts = [f"一つ目{END}である。", "〇〇", "", f"一つ目{END}である"]
    tokenizer = load_tokenizer(model)
    sizes = [len(encode(tokenizer, texts[place])) + 1 for place in (0, 3)]
    assert sizes[0] - sizes[1] == 1
    trained = sum(sizes) - 1  # a row of one token is left, which predicts nothing
    length = trained if packing == "wrapped" else sizes[1]
    documents = lines(folder / "d.jsonl", *({"text": text} for text in texts))
    corpus = ["--corpus.documents", documents, "--corpus.length", str(length), "--corpus.packing", packing]
    found = result("cpt", "--engine", engine, "--model.path", str(model), "--run", "run", *corpus, *TRAINING)
    assert found["skipped"] == {"empty text": 1, "text of no token": 1}
    assert (found["documents"], found["tokens"], found["rows"]) == (2, trained, trained // length)
    assert found["control_tokens"] == {END: 2}
    assert f"control tokens written out in the texts: {END} 2" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_pairs_are_those_that_were_trained_on(folder, capsys, engine):
    def sample(text):
        return {"text": text, "answer": "a"}

    preferences = lines(
        folder / "p.jsonl",
        {
            "problem_id": "1",
            "prompt": f"問{END}",
            "ground_truth": sample("甲。"),
            "chosen": [sample(f"甲。{END}")],
            "rejected": [sample("乙。")],
        },
        {"problem_id": "2", "prompt": "", "ground_truth": sample("甲。"), "chosen": [], "rejected": [sample("乙。")]},
        {"problem_id": "3", "prompt": "問", "ground_truth": sample("甲。"), "chosen": [], "rejected": []},
    )
    settings = ["--preferences", preferences, "--training.batch_size", "1", *TRAINING]
    found = result("rpo", "--engine", engine, "--model.path", str(BASE), "--run", "run", *settings)
    assert (found["problems"], found["pairs"], found["steps"]) == (3, 2, 1)
    assert found["dropped_pairs"] == {"both responses are the same tokens": 1, "no token of the prompt is left": 1}
    assert found["control_tokens"] == {END: 1}, "an end token behind a response is its end"
    said = capsys.readouterr().out
    assert "1 pairs dropped: both responses are the same tokens" in said
    assert f"{END} 1" in said


def test_control_tokens_in_problems_are_counted(folder, capsys):
    problem = {"problem_id": "1", "problem_text": f"どれか{END}。", "choices": ["甲", f"乙{END}{END}"], "answer": ["a"]}
    problems = lines(folder / "e.jsonl", problem | {"explanation": "甲。"})
    few = ["--problems", problems, "--sampling.max_new_tokens", "2", "--shot_count", "0", "--model.dtype", "float32"]
    for number, command in enumerate(("evaluate", "curate", "evaluate --method options")):
        found = result(*command.split(), "--model.path", str(BASE), "--run", f"run{number}", *few)
        assert found["control_tokens"] == {END: 3}
        assert f"{END} 3" in capsys.readouterr().out


def test_control_tokens_are_those_a_tokenizer_reads_as_such():
    tokenizer = load_tokenizer(BASE)
    texts = [f"甲{END}乙{END}", "<|no such token|>", END[:-1]]
    ids = [token for text in texts for token in encode(tokenizer, text)]
    assert control_tokens(tokenizer, texts) == {END: ids.count(tokenizer.eos_token_id)} == {END: 2}
