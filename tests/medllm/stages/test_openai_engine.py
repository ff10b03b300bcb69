"""The API engine against a server on the loopback interface."""

import logging
import time

import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install 'medllm[eval]'")

from medllm.config import ModelConfig, Sampling
from medllm.engines import open_engine, open_scorer, open_trainer
from medllm.errors import UserError
from medllm.exam.evaluation import evaluate
from medllm.exam.problem import Problem
from medllm.model.tokenizer import Message
from medllm.stage_config import EvaluateConfig, ServerConfig
from tests.fake_server import Server, reply

KEY = "sk-secret-of-the-test"
CHAT = (Message("system", "解きます。"), Message("user", "空は何色か。"))


@pytest.fixture
def server(monkeypatch):
    running = Server()
    monkeypatch.setenv("OPENAI_BASE_URL", running.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with running.running():
        yield running


def engine(**server):
    stage = EvaluateConfig(ModelConfig("tiny-model"), "run", ("p",), server=ServerConfig(**server))
    return open_engine("openai", ModelConfig("tiny-model"), stage)


def test_a_conversation_goes_to_the_chat_endpoint(server):
    ((generation,),) = engine().generate([CHAT], Sampling(max_new_tokens=9))
    ((path, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "tiny-model",
        "messages": [{"role": "system", "content": "解きます。"}, {"role": "user", "content": "空は何色か。"}],
        "max_tokens": 9,
        "temperature": 0.0,
        "top_p": 1.0,
    }
    assert server.keys == [f"Bearer {KEY}"]
    assert (generation.text, generation.tokens, generation.finish) == ("c", (), "stop")


def test_fields_that_a_server_needs_go_with_every_request_and_give_way_to_settings(server):
    asked = engine(fields={"min_p": 0, "top_k": 0})
    asked.generate([CHAT, "空は。"], Sampling(max_new_tokens=5))
    asked.generate(["空は。"], Sampling(max_new_tokens=5, temperature=1.0, top_k=20))
    assert [(body["min_p"], body["top_k"]) for _, body in server.requests] == [(0, 0), (0, 0), (0, 20)]
    with pytest.raises(UserError, match=r"server.fields is \['n'\]; expected no field that is sent anyway"):
        ServerConfig(fields={"n": 2})


def test_a_text_goes_to_the_completions_endpoint_with_all_settings(server):
    sampling = Sampling(max_new_tokens=5, temperature=0.7, top_p=0.9, top_k=20, seed=2, stop=("\n\n",))
    engine().generate(["問題: 空は。\n答え:"], sampling)
    ((path, body),) = server.requests
    assert path == "/v1/completions"
    assert (body["prompt"], body["max_tokens"], body["stop"]) == ("問題: 空は。\n答え:", 5, ["\n\n"])
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.7, 0.9, 20)


def test_samples_come_in_the_order_of_prompts_each_with_its_own_seed(server):
    def respond(path, body):
        time.sleep(0.02 if body["prompt"] == "0" else 0.0)
        return 200, reply(path, f"{body['prompt']}/{body['seed']}")

    server.respond = respond
    sampling = Sampling(temperature=1.0, samples=2, seed=1)
    generated = engine().generate(["0", "1", "2"], sampling)
    texts = [[generation.text for generation in of_prompt] for of_prompt in generated]
    assert [[text.split("/")[0] for text in of_prompt] for of_prompt in texts] == [["0"] * 2, ["1"] * 2, ["2"] * 2]
    seeds = {text.split("/")[1] for of_prompt in texts for text in of_prompt}
    assert len(seeds) == 2
    other = engine().generate(["0"], Sampling(temperature=1.0, samples=2, seed=2))
    assert seeds.isdisjoint({generation.text.split("/")[1] for generation in other[0]})


def test_no_more_requests_are_open_than_the_batch_size(server):
    def respond(path, body):
        time.sleep(0.03)
        return 200, reply(path, "c")

    server.respond = respond
    engine().generate(["x"] * 8, Sampling(), batch_size=2)
    assert server.most_open == 2


def test_stop_strings_beyond_the_apis_four_are_cut_here(server):
    server.respond = lambda path, body: (200, reply(path, "c5d2e", finish="length"))
    ((generation,),) = engine().generate(["x"], Sampling(stop=("1", "2", "3", "4", "5")))
    assert server.requests[0][1]["stop"] == ["1", "2", "3", "4"]
    assert (generation.text, generation.finish, generation.stopped) == ("c", "stop", "5")


def test_a_reply_that_ran_out_of_tokens_says_so(server):
    server.respond = lambda path, body: (200, reply(path, "cut", finish="length"))
    assert engine().generate([CHAT], Sampling())[0][0].finish == "length"


def test_half_a_character_at_the_end_of_a_reply_is_cut_off(server):
    server.respond = lambda path, body: (200, reply(path, "c🤔\ud83e", finish="length"))
    assert engine().generate(["x"], Sampling())[0][0].text == "c🤔"


def test_a_busy_server_is_asked_again(server):
    def respond(path, body):
        if len(server.requests) < 3:
            return 429, {"error": {"message": "slow down"}}
        return 200, reply(path, "c")

    server.respond = respond
    assert engine().generate(["x"], Sampling())[0][0].text == "c"
    assert len(server.requests) == 3


def test_an_exam_is_sat_through_the_api(server):
    problem = Problem("q", "空は何色か。", ("赤", "青", "緑"), ("b",))
    server.respond = lambda path, body: (200, reply(path, "答え：ｂ"))
    config = EvaluateConfig(ModelConfig("tiny-model"), "run", ("p",), format="chat")
    assert [prediction.prediction for prediction in evaluate(engine(), [problem], (), config)] == ["b"]


def refused(server, status, message, prompt="x"):
    server.respond = lambda path, body: (status, {"error": {"message": message}})
    with pytest.raises(UserError) as error:
        engine().generate([prompt], Sampling())
    return error.value


def test_the_key_stands_in_no_error_and_no_log(server, caplog):
    caplog.set_level(logging.DEBUG)
    error = refused(server, 401, f"Incorrect API key provided: {KEY}")
    assert "401" in str(error)
    assert "check OPENAI_BASE_URL, OPENAI_API_KEY and --model.path" in str(error)
    assert KEY not in str(error)
    assert error.__cause__ is None
    assert error.__suppress_context__
    server.respond = lambda path, body: (200, reply(path, "c"))
    engine().generate(["x"], Sampling())
    assert KEY not in caplog.text


def test_refusals_say_what_to_do(server):
    assert "needs --format chat" in str(refused(server, 404, "no such route"))
    assert "check OPENAI_BASE_URL" in str(refused(server, 404, "no such model", CHAT))
    assert "--sampling settings" in str(refused(server, 400, "context too long"))
    server.respond = lambda path, body: (200, {"error": "elsewhere"})
    with pytest.raises(UserError, match="the reply holds no text"):
        engine(retries=0).generate(["x"], Sampling())


def test_a_server_that_is_not_there_is_named_without_its_password(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://someone:hidden@127.0.0.1:9/v1")
    with pytest.raises(UserError, match=r"'tiny-model' at http://127\.0\.0\.1:9/v1/: no answer") as error:
        engine(retries=0).generate(["x"], Sampling())
    assert "hidden" not in str(error.value)


def test_openais_own_server_gets_its_own_name_for_the_limit(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.openai.com/v1")
    assert engine()._client.chat_limit == "max_completion_tokens"


def test_what_an_api_cannot_do_is_refused(server, monkeypatch):
    with pytest.raises(UserError, match=r"engine 'openai' cannot train; use --engine jax or --engine torch"):
        open_trainer("openai", ModelConfig("tiny-model"))
    with pytest.raises(UserError, match=r"name the folder of the model's tokenizer \(--server\.tokenizer\)"):
        open_scorer("openai", ModelConfig("tiny-model"))
    assert not {"train_cpt", "train_preferences"} & set(dir(engine()))
    with pytest.raises(UserError, match=r"cannot apply --model\.adapter"):
        open_engine("openai", ModelConfig("tiny-model", adapter="adapter"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="asks from one process: start it without torchrun"):
        engine()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="needs OPENAI_API_KEY"):
        engine()
