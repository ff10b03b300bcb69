"""What becomes of a run when its server fails: nothing is lost, nothing is asked twice, and the message says what to do."""

import json
import time
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install 'medllm[eval]'")

from medllm.cli import main
from medllm.journal import JOURNAL
from medllm.remote.client import _asked_wait
from medllm.remote.pace import Pace
from medllm.stage_config import ServerConfig
from tests.fake_server import Server, Wrong, asked, by_rule, reply

PROBLEMS = [
    {"problem_id": f"p{n}", "problem_text": f"問{n}", "choices": ["一", "二", "三"], "answer": ["a"], "explanation": f"解{n}"}
    for n in range(6)
]
KEY, PASSWORD = "sk-secret-of-the-test", "hidden-in-the-address"
FILTER = {"error": {"message": "filtered", "code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}


@pytest.fixture
def server(tmp_path, monkeypatch):
    running = Server(respond=by_rule)
    monkeypatch.setenv("OPENAI_BASE_URL", running.url.replace("//", f"//someone:{PASSWORD}@"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr("medllm.remote.pace._FIRST_WAIT", 0.01)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in PROBLEMS))
    with running.running():
        yield running


def evaluate(*more, run="run"):
    exam = "--problems problems.jsonl --shot_count 0 --template curation --explanation true".split()
    return main(["evaluate", "--engine", "openai", "--model.path", "m", "--run", run, *exam, *more])


def curate(*more, run="run", retries="2"):
    settings = "--problems problems.jsonl --shot_count 1 --problems_until 2030 --sampling.samples 3".split()
    return main(
        ["curate", "--engine", "openai", "--model.path", "m", "--run", run, *settings, "--server.retries", retries, *more]
    )


def result(run="run"):
    found = json.loads(Path(run, "result.json").read_text())
    return {name: value for name, value in found.items() if name != "seconds"}


def preferences(run="run"):
    return Path(run, "preferences.jsonl").read_text()


def sometimes(wrong, when):
    """By rule, but ``wrong`` for the requests whose numbers are in ``when``."""

    numbers = iter(range(1000))

    def respond(path, body):
        return wrong if next(numbers) in when else by_rule(path, body)

    return respond


PASSING = {
    "too many requests": Wrong(b'{"error": {"message": "slow down"}}', 429, headers={"retry-after": "0.01"}),
    "failed": Wrong(b"{}", 500),
    "overloaded": Wrong(b"<html>overloaded</html>", 503, "text/html"),
    "half a reply": Wrong(json.dumps(reply("", "c")).encode(), half=True),
    "a page": Wrong(b"<html>Sign in</html>", kind="text/html"),
    "a page that says it is JSON": Wrong(b"<html>Sign in</html>"),
    "other JSON": Wrong(b'{"error": {"message": "upstream"}}'),
    "a list": Wrong(b"[1, 2]"),
    "no choices": Wrong(b'{"choices": [], "usage": null}'),
    "odd choices": Wrong(b'{"choices": [{"text": 1}, null]}'),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_changes_nothing(server, fault):
    assert curate(run="whole") == 0
    server.requests.clear()
    server.respond = sometimes(PASSING[fault], {0, 2, 3})
    assert curate() == 0
    assert preferences() == preferences("whole")
    assert len(server.requests) == 6 + 3
    found = result()
    assert (found["server"].pop("retries"), found) == (3, result("whole") | {"server": found["server"]})


STAYING = {
    "too many requests": (PASSING["too many requests"], "(429: Error code: 429"),
    "failed": (PASSING["failed"], "failed (500: Error code: 500"),
    "half a reply": (PASSING["half a reply"], "no answer (APIConnectionError)"),
    "a page": (PASSING["a page"], "the reply holds no text: <html>Sign in</html>"),
    "a page that says it is JSON": (PASSING["a page that says it is JSON"], "a reply that is broken (JSONDecodeError)"),
    "other JSON": (PASSING["other JSON"], 'the reply holds no text: {"error":'),
}


@pytest.mark.parametrize("fault", STAYING)
def test_a_fault_that_stays_ends_the_run_by_few_requests_and_the_run_goes_on(server, capsys, fault):
    """Three answers are kept; a server that answers nobody is tried by one request at a time."""
    wrong, said = STAYING[fault]
    server.respond = sometimes(wrong, range(3, 1000))
    assert curate("--server.concurrency", "2") == 2
    line = capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert line.startswith(f"medllm: model 'm' at {server.url}/: ")
    assert line.count("\n") == 1
    assert said in line
    assert "3 of 6 problems are kept, the same command goes on with the others" in line
    assert len(server.requests) <= 3 + 2 + 3  # those that came, those under way when it began, and the tries
    server.requests.clear()
    server.respond = by_rule
    assert curate() == 0
    assert "medllm: going on at 3 of 6 problems\n" in capsys.readouterr().err
    assert len(server.requests) == 3
    assert curate(run="whole") == 0
    assert preferences() == preferences("whole")
    assert result() == result("whole")
    assert curate() == 2
    assert "already holds a finished run" in capsys.readouterr().err


def test_a_quota_that_is_used_up_is_asked_once(server, capsys):
    told = {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}}
    server.respond = lambda path, body: (429, told)
    assert evaluate() == 2
    assert "the quota is used up (429" in capsys.readouterr().err
    assert len(server.requests) == 1


def test_a_wait_that_is_longer_than_the_patience_ends_the_run(server, capsys):
    server.respond = lambda path, body: Wrong(b"{}", 429, headers={"retry-after": "86400"})
    assert evaluate() == 2
    assert len(server.requests) == 1
    assert "lower --server.concurrency" in capsys.readouterr().err


def test_a_server_that_is_too_slow_is_asked_again(server, capsys):
    def respond(path, body):
        time.sleep(0.6 if len(server.requests) == 1 else 0.0)
        return by_rule(path, body)

    server.respond = respond
    assert evaluate("--server.timeout", "0.3") == 0
    assert result()["server"]["retries"] == 1


def test_filtered_and_missing_texts_are_answers_counted_by_name(server):
    """The server's content filter in three forms, and null: none of them an error, none a wrong answer without a word."""
    said = {
        "問0": lambda path: (400, FILTER),
        "問1": lambda path: (200, reply(path, "半分 Answer:a", finish="content_filter")),
        "問2": lambda path: (200, reply(path, None)),
        "問3": lambda path: (200, refused(path)),
        "問4": lambda path: (200, reply(path, None, finish="length")),
        "問5": lambda path: (200, reply(path, "解\n Answer:a")),
    }

    def refused(path):
        one = reply(path, None)
        one["choices"][0]["message"]["refusal"] = "I cannot help with that."
        return one

    server.respond = lambda path, body: said[next(name for name in said if name in asked(path, body))](path)
    assert evaluate("--format", "chat", "--server.retries", "0") == 0
    assert result()["readings"]["reasons"] == {"cut_off": 1, "filtered": 4}
    assert (result()["score"]["correct"], result()["endings"]["unread"]) == (1, 5)
    assert [json.loads(line)["finish"] for line in Path("run", JOURNAL).read_text().splitlines()].count("filtered") == 4
    server.respond = lambda path, body: (
        (400, FILTER) if "問1" in asked(path, body).rsplit("Question", 1)[1] else by_rule(path, body)
    )
    assert curate(run="curated") == 0
    assert (result("curated")["samples"], result("curated")["filtered"]) == (18, 3)
    kept = [json.loads(line) for line in preferences("curated").splitlines()]
    assert kept[1]["chosen"] == kept[1]["rejected"] == []


def test_a_prompt_that_is_refused_is_named_by_its_problem(server, capsys):
    server.respond = lambda path, body: (
        (400, {"error": {"message": "too long"}}) if "問4" in asked(path, body) else by_rule(path, body)
    )
    assert evaluate("--server.concurrency", "1") == 2
    line = capsys.readouterr().err
    assert "problems.jsonl:5: problem p4: model 'm'" in line
    assert "refused (400: " in line
    assert "4 of 6 problems are kept" in line


@pytest.mark.parametrize("n", ["taken", "refused", "not heard"])
def test_samples_come_in_one_request_where_the_server_takes_it(server, n):
    def respond(path, body):
        if n == "refused" and body.get("n", 1) > 1:
            return 400, {"error": {"message": "n must be 1"}}
        return by_rule(path, {name: value for name, value in body.items() if name != "n"} if n == "not heard" else body)

    server.respond = respond
    assert curate("--server.concurrency", "1") == 0
    assert len(server.requests) == {"taken": 6, "refused": 1 + 18, "not heard": 18}[n]
    server.respond = by_rule
    assert curate(run="whole") == 0
    assert preferences() == preferences("whole")
    assert result()["server"]["requests"] == {"taken": 6, "refused": 18, "not heard": 18}[n]


def test_what_was_asked_and_what_it_cost_is_recorded_and_no_secret(server, tmp_path):
    assert evaluate("--server.input_price", "2", "--server.output_price", "10") == 0
    read = sum(len(asked(*one)) for one in server.requests)
    assert result()["server"] == {
        "url": f"{server.url}/",
        "models": {"rule-1": 6},
        "fingerprints": {"fp_1": 6},
        "requests": 6,
        "retries": 0,
        "prompt_tokens": read,
        "completion_tokens": 54,
        "requests_without_usage": 0,
        "cost": pytest.approx((2 * read + 10 * 54) / 1e6),
    }
    written = b"".join(file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert KEY.encode() not in written
    assert PASSWORD.encode() not in written


def test_a_dry_run_asks_and_writes_nothing(server, tmp_path, capsys):
    prices = ["--server.input_price", "1", "--server.output_price", "1", "--dry_run", "true", "--json", "dry.json"]
    assert curate(*prices, "--sampling.max_new_tokens", "100") == 0
    assert (server.requests, (tmp_path / "run").exists()) == ([], False)
    found = json.loads((tmp_path / "dry.json").read_text())
    assert curate(run="real") == 0
    read = sum(len(asked(*one).encode()) for one in server.requests) / 3
    assert (found["requests"], found["most_completion_tokens"]) == (6, 6 * 3 * 100)
    assert found["prompt_tokens"] == pytest.approx(read, abs=1)
    assert found["most_cost"] == pytest.approx((read + 1800) / 1e6, abs=1e-6)
    assert "curate: 6 requests, about" in capsys.readouterr().out
    assert (
        main(["evaluate", "--model.path", "m", "--run", "r", "--problems", "problems.jsonl", "--shot_count", "0", *prices[-4:]])
        == 2
    )
    assert "add --engine openai, not jax" in capsys.readouterr().err


def test_other_settings_and_other_prompts_are_refused_by_name(server, tmp_path, capsys):
    server.respond = sometimes(Wrong(b"{}", 401), range(3, 1000))
    assert evaluate("--server.concurrency", "1") == 2
    assert "check OPENAI_BASE_URL, OPENAI_API_KEY" in capsys.readouterr().err
    assert evaluate("--sampling.max_new_tokens", "7") == 2
    assert "was begun with sampling.max_new_tokens = 512, now it is 7" in capsys.readouterr().err
    changed = [PROBLEMS[0] | {"problem_text": "別の問"}, *PROBLEMS[1:]]
    (tmp_path / "problems.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in changed))
    assert evaluate() == 2
    assert "problem p0 was answered under another prompt" in capsys.readouterr().err


def test_settings_of_a_server_are_not_for_an_engine_here(tmp_path, capsys, server):
    assert (
        main(
            [
                "evaluate",
                "--model.path",
                "m",
                "--run",
                "r",
                "--problems",
                "problems.jsonl",
                "--shot_count",
                "0",
                "--server.retries",
                "9",
            ]
        )
        == 2
    )
    assert "--server.retries is 9, a setting of the openai engine alone; add --engine openai" in capsys.readouterr().err


class Clock:
    """Time that passes where it is waited for."""

    now = 100.0

    def wait(self, seconds=None):
        assert seconds is not None, "waits for nothing"
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("medllm.remote.pace.monotonic", lambda: clock.now)
    return clock


def paced(clock, **settings):
    pace = Pace(ServerConfig(**settings))
    pace._changed.wait = clock.wait
    return pace


def test_requests_are_spread_over_the_minute_by_both_limits(clock):
    pace = paced(clock, requests_per_minute=30, tokens_per_minute=6000)
    times = []
    for tokens in (100, 500, 100):
        times.append(pace.begin(tokens) - 100.0)
        pace.answered()
    assert times == pytest.approx([0, 2, 7])  # 2 s a request; 500 tokens are a twelfth of a minute


def test_waits_double_and_a_server_that_asks_for_one_gets_it(clock):
    pace, times = paced(clock, retries=9), []
    for wait in (None, None, None, 40.0, None):
        began = pace.begin(1)
        times.append(began - 100.0)
        assert pace.failed(began, wait)
    assert times == pytest.approx([0, 0.5, 1.5, 3.5, 43.5])


def test_one_request_goes_alone_until_the_server_answers(clock):
    pace = paced(clock, concurrency=3, retries=1)
    began = pace.begin(1)
    with pytest.raises(AssertionError, match="waits for nothing"):
        pace.begin(1)
    pace.answered()
    together = [pace.begin(1), pace.begin(1)]
    assert [pace.failed(one) for one in together] == [True, True]  # under way together, they count once
    assert not pace.failed(pace.begin(1))
    assert began == 100.0


def test_a_wait_is_asked_for_in_three_ways():
    assert _asked_wait({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert _asked_wait({"retry-after": "3"}) == 3.0
    assert _asked_wait({"retry-after": "Fri, 31 Dec 2100 23:59:59 GMT"}) == pytest.approx(4133980799 - time.time(), abs=5)
    assert _asked_wait({}) is None
