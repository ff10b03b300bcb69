"""A real server, ``transformers serve``: the right contract, and wrong ones, each named by what is served."""

import importlib.util
import json
import os
import sys

import pytest

from medllm.cli import main
from tests.served_folder import OFF, PLAIN, THINKS, adapter_on, beside, check, published, sit, write_exam
from tests.server_process import free_port, up

NEEDED = ("jax", "torch", "openai", "fastapi", "uvicorn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}; pip install 'medllm[eval,serve,jax,torch]'")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its address; it serves any folder that a request names."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with up([*command, "--device", "cpu", "--dtype", "float32"], port, log, answers="/health", environment=environment) as url:
        yield url


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    return write_exam(tmp_path_factory.mktemp("exam"))


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_a_server_that_keeps_the_contract_answers_as_the_engine_does(server, exam, tmp_path, capsys, engine):
    folder = published(tmp_path / "right")
    code, result = check(exam, "--url", server, "--model", folder, "--engine", engine)
    assert (code, result["findings"]) == (0, {})
    for way in result["ways"].values():
        assert (way["other_texts"], way["prompt_tokens"]) == (0, [0])
        assert set(way["difference"].values()) == {0.0}
    assert result["ways"]["trained prompt"]["run_on"] == 0
    assert "the contract is kept" in capsys.readouterr().out


WRONG = {
    "end token": ({"stop": None}, {"stop": None, "end": 9}),
    "stop string": ({}, {"stop": None}),
    "BOS": ({}, {"bos": True}),
    "chat template": ({}, {"template": "質問者:" + PLAIN + "\n回答者:"}),
    "thinking left on": ({"template": OFF + THINKS}, {"template": THINKS}),
}


@pytest.mark.parametrize(("name", "right", "wrong"), [(name, *both) for name, both in WRONG.items()], ids=list(WRONG))
def test_a_wrong_contract_is_named(server, exam, tmp_path, capsys, name, right, wrong):
    """Padding that is the end token and was trained on is refused before it is served (test_publish.py)."""
    right, wrong = published(tmp_path / "right", **right), published(tmp_path / "wrong", **wrong)
    code, result = check(exam, "--url", server, "--model", wrong, "--folder", right)
    assert code == 1
    assert set(result["findings"]) - {"runs on"} == {name}
    assert f"NOT kept: {name}" in capsys.readouterr().out


def test_an_engine_alone_is_asked_without_a_server(exam, tmp_path, capsys):
    code, result = check(exam, "--model", published(tmp_path / "right"))
    assert (code, result["where"], result["findings"]) == (0, "jax", {})
    assert all("own" not in way and way["asked"] == 2 for way in result["ways"].values())


def test_a_model_that_is_no_folder_needs_a_server(exam, capsys):
    assert main(["check-serving", "--model", "nowhere", "--problems", str(exam / "exam.jsonl"), "--shot_count", "0"]) == 2
    assert "name the server that has a model of this name (--url)" in capsys.readouterr().err


def test_a_server_sits_the_exam_and_curates_as_the_engine_does(server, exam, tmp_path, monkeypatch):
    """Greedy texts are the engine's own; samples come one by one, where the server does not take several a request."""
    monkeypatch.setenv("OPENAI_BASE_URL", server)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    folder = published(tmp_path / "right", stop=None)  # a request's own stop strings take the place of the folder's
    own = sit(exam, tmp_path / "jax", "--engine", "jax", "--model.path", folder, "--model.dtype", "float32")
    assert sit(exam, tmp_path / "openai", "--engine", "openai", "--model.path", folder) == own
    files = ["--problems", str(exam / "exam.jsonl"), "--sampling.max_new_tokens", "24", "--model.path", folder]
    drawn = "--engine openai --shot_count 1 --problems_until 2030 --sampling.samples 2".split()
    assert main(["curate", "--run", str(tmp_path / "drawn"), *drawn, *files]) == 0
    result = json.loads((tmp_path / "drawn/result.json").read_text("utf-8"))
    assert (result["samples"], result["server"]["url"]) == (4, f"{server}/")
    assert 2 <= result["server"]["requests"] <= 4


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_an_adapter_is_served_where_its_base_lies_beside_it(server, exam, tmp_path, capsys, engine):
    base, right = published(tmp_path / "base", stop=None), published(tmp_path / "right")
    adapter = adapter_on(base, tmp_path / "adapter", right)
    whole = beside(adapter, base, tmp_path / "whole")
    asked = ("--url", server, "--model", whole, "--engine", engine)
    for folder in (adapter, whole):
        code, result = check(exam, *asked, "--folder", folder)
        assert (code, result["findings"]) == (0, {})
        assert {way["other_texts"] for way in result["ways"].values()} == {0}
    _, without = check(exam, *asked, "--folder", right)
    assert sum(way["other_texts"] for way in without["ways"].values()) > 3
