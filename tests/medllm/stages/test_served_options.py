"""Options scored by a server that gives back the log-probabilities of its prompt, as vLLM does."""

import json
import threading
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install 'medllm[eval]'")
pytest.importorskip("torch", reason="torch is not installed: pip install 'medllm[torch]'")

import torch
from transformers import AutoModelForCausalLM

from medllm.cli import main
from medllm.exam.option_journal import OPTION_JOURNAL
from medllm.mini.study import BASE
from medllm.model.tokenizer import decode, load_tokenizer
from tests.fake_server import Server, Wrong, reply

ASKED = {"What goes down?": "a", "What stays?": "b", "What helps?": "c", "And you?": "a"}
PROBLEMS = [
    {"problem_id": f"p{n}", "problem_text": text, "choices": ["rest", "fever and cough", "water"], "answer": [answer]}
    for n, (text, answer) in enumerate(ASKED.items())
]


@pytest.fixture(scope="module")
def served():
    """What a server says to a request for the log-probabilities of token ids: its own words of them, then one token more."""
    model = AutoModelForCausalLM.from_pretrained(str(BASE), dtype=torch.float32)
    tokenizer, one = load_tokenizer(BASE), threading.Lock()

    def respond(path, body):
        assert (path, body["echo"], body["logprobs"]) == ("/v1/completions", True, 1)
        ids = body["prompt"]
        with one, torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        following = int(logprobs[-1].argmax())
        found = [None, *(float(logprobs[place, token]) for place, token in enumerate([*ids[1:], following]))]
        tokens = {"tokens": [decode(tokenizer, [token]) for token in [*ids, following]], "token_logprobs": found}
        said = reply(path, decode(tokenizer, [*ids, following]), finish="length", model="served-1")
        said["choices"][0]["logprobs"] = tokens
        said["usage"] = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        return 200, said

    return respond


@pytest.fixture
def server(served, tmp_path, monkeypatch):
    running = Server(respond=served)
    monkeypatch.setenv("OPENAI_BASE_URL", running.url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr("medllm.remote.pace._FIRST_WAIT", 0.01)
    monkeypatch.chdir(tmp_path)
    Path("problems.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in PROBLEMS))
    with running.running():
        yield running


def score(*more, run="run", method="options", tokenizer=str(BASE)):
    words = ["evaluate", "--engine", "openai", "--model.path", "m", "--run", run, "--problems", "problems.jsonl"]
    return main([*words, "--method", method, *(["--server.tokenizer", tokenizer] if tokenizer else []), *more])


def result(run="run"):
    return json.loads(Path(run, "result.json").read_text())


@pytest.mark.parametrize("method", ["options", "letters"])
def test_a_server_scores_options_as_the_engine_here_does(server, method):
    assert score(method=method) == 0
    here = ["evaluate", "--engine", "torch", "--model.path", str(BASE), "--model.dtype", "float32", "--run", "here"]
    assert main([*here, "--problems", "problems.jsonl", "--method", method]) == 0
    for ours, theirs in zip(result()["results"], result("here")["results"], strict=True):
        assert ours.pop("nll") == pytest.approx(theirs.pop("nll"), rel=1e-5)
        assert ours == theirs
    assert result("here")["server"] is None
    account = result()["server"]
    assert (account["requests"], account["models"]) == (12, {"served-1": 12})
    assert account["prompt_tokens"] == sum(len(body["prompt"]) for _, body in server.requests)


def test_no_option_that_is_kept_is_asked_for_again(server, served, capsys):
    numbers = iter(range(1000))
    server.respond = lambda path, body: served(path, body) if next(numbers) < 5 else Wrong(b"{}", 401)
    assert score("--server.concurrency", "1") == 2
    assert "refused (401" in capsys.readouterr().err
    kept = [json.loads(line) for line in Path("run", OPTION_JOURNAL).read_text().splitlines()]
    assert [(one["problem_id"], one["option"]) for one in kept] == [(f"p{n // 3}", n % 3) for n in range(5)]
    server.respond = served
    before = len(server.requests)
    assert score() == 0
    assert "going on at 5 of 12 options" in capsys.readouterr().err
    assert len(server.requests) - before == 7
    assert max(Counter(str(body["prompt"]) for _, body in server.requests[before:]).values()) == 1
    assert result()["server"]["requests"] == 12
    assert score(run="whole") == 0
    assert result()["results"] == result("whole")["results"]


def with_logprobs(change):
    """The server's replies, otherwise."""

    def respond(served, path, body):
        status, said = served(path, body)
        change(said["choices"][0])
        return status, said

    return respond


def other_words(choice):
    choice["text"] = "something else altogether"


def lacking_one(choice):
    choice["logprobs"]["token_logprobs"][2] = None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda choice: choice["logprobs"].update(token_logprobs=[-0.5]), "gives 1 log-probabilities for"),  # llama.cpp's
        (lambda choice: choice.update(logprobs=None), "gives 0 log-probabilities for"),
        (lacking_one, "it does not score what it is given"),
        (other_words, "must be the served model's own"),
    ],
    ids=["only-what-it-wrote", "none", "lacking-one", "other-words"],
)
def test_what_is_no_score_of_the_prompt_is_refused(server, served, capsys, change, said):
    server.respond = lambda path, body: with_logprobs(change)(served, path, body)
    assert score() == 2
    assert said in capsys.readouterr().err
    assert not Path("run", OPTION_JOURNAL).exists()


@pytest.mark.parametrize(
    ("status", "message"),
    [(500, "Only no echo is supported"), (500, "9 validation errors: prompt is no string"), (422, "prompt is no string")],
    ids=["llama.cpp", "llama-cpp-python", "in-order"],
)
def test_a_server_that_does_not_take_the_question_is_asked_once(server, capsys, status, message):
    server.respond = lambda path, body: (status, {"error": {"message": message}})
    assert score("--server.concurrency", "1") == 2
    assert len(server.requests) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "refused" in line]
    assert "problem p0: model 'm' at" in line
    assert "it does not score what it is given" in line


def test_fields_that_the_server_needs_go_with_every_option(server):
    assert score("--server.fields", '{"cache_prompt": false}', "--server.concurrency", "1") == 0
    assert {body["cache_prompt"] for _, body in server.requests} == {False}


def test_a_reply_that_ends_with_the_prompt_is_a_score_too(server, served):
    def without_the_last(choice):
        choice["logprobs"]["token_logprobs"].pop()

    assert score(run="whole") == 0
    server.respond = lambda path, body: with_logprobs(without_the_last)(served, path, body)
    assert score() == 0
    assert result()["results"] == result("whole")["results"]


def test_a_tokenizer_is_asked_for_before_anything_else(server, capsys):
    assert score(tokenizer=None) == 2
    assert "name the folder of the model's tokenizer (--server.tokenizer)" in capsys.readouterr().err
    assert server.requests == []
    assert not Path("run").exists()


def test_a_content_filter_refuses_by_the_name_of_the_problem(server, capsys):
    server.respond = lambda path, body: (400, {"error": {"message": "filtered", "code": "content_filter"}})
    assert score("--server.concurrency", "1") == 2
    assert "problem p0: model 'm' at" in capsys.readouterr().err


def test_a_dry_run_counts_an_option_as_a_request(server):
    assert score("--dry_run", "true", "--json", "dry.json") == 0
    found = json.loads(Path("dry.json").read_text())
    assert (server.requests, found["requests"], found["most_completion_tokens"]) == ([], 12, 12)
