"""What a server does otherwise than the model that was trained, named from its answers alone."""

import pytest

from medllm.engine import Generation
from medllm.exam.problem import Problem
from medllm.model.tokenizer import Message
from medllm.serving.asking import ways
from medllm.serving.findings import Answer, Asked, findings, way_result
from medllm.serving_command import check_lines
from medllm.stage_config import CheckServingConfig

PROBLEMS = tuple(Problem(f"q{n}", f"第{n}の空は何色か。", ("赤", "青", "緑"), ("b",)) for n in range(4))
CONFIG = CheckServingConfig("model", ("exam.jsonl",), shot_count=0)
TRAINED, CHAT, WORDING, BRACKETS, JSON = ways(CONFIG, (), chats=True)
OWN = Answer("b", cut_off=False, prompt_tokens=20)
STOPPED = Answer("b", cut_off=False, stopped="\n問題:", prompt_tokens=20)


def asked(way, served, own=OWN, **more):
    prompts = [way.ask(problem) for problem in PROBLEMS]
    return Asked(way, prompts, [served] * len(PROBLEMS), [own] * len(PROBLEMS) if own else [], **more)


def found(*all_asked):
    return findings(all_asked)


def served(text="b", prompt_tokens=20, **more):
    return Answer(text, more.pop("cut_off", False), prompt_tokens=prompt_tokens, **more)


def test_a_server_that_answers_as_the_engine_does_has_no_findings():
    assert found(asked(TRAINED, served()), asked(CHAT, served(prompt_tokens=None))) == {}
    # The stop string may stand at the end, and spaces may be trimmed.
    assert found(asked(TRAINED, served("b\n問題:"), STOPPED), asked(CHAT, served(" b"))) == {}


@pytest.mark.parametrize(
    ("name", "way", "answer", "own", "more"),
    [
        ("end token", TRAINED, served("b。空は赤い", cut_off=True), OWN, {}),
        ("stop string", TRAINED, served("b\n問題: 月は何色か。"), STOPPED, {}),
        ("BOS", TRAINED, served(prompt_tokens=21), OWN, {}),
        ("chat template", CHAT, served(prompt_tokens=27), OWN, {}),
        ("chat template", CHAT, served("c"), OWN, {}),
        ("thinking left on", CHAT, served("<think>\nさて"), OWN, {}),
        ("thinking left on", CHAT, served(thought="さて"), OWN, {}),
        ("thinking left on", CHAT, served("さて", prompt_tokens=18), OWN, {"thinking": [18] * 4}),
    ],
)
def test_what_is_not_kept_is_named(name, way, answer, own, more):
    others = [] if way is TRAINED else [asked(TRAINED, served())]
    assert name in found(*others, asked(way, answer, own, **more))
    # and it is the only thing that is wrong, but for the texts that then run on
    assert set(found(*others, asked(way, answer, own, **more))) <= {name, "runs on"}


@pytest.mark.parametrize(("turned", "texts", "named"), [(1, 0, False), (4, 0, True), (4, 3, False)])
def test_a_near_tie_that_turns_round_in_a_conversation_is_no_other_template(turned, texts, named):
    """Another template answers conversations otherwise, and texts as before."""

    def some(way, others):
        replies = [served("c" if number < others else "b") for number in range(4)]
        return Asked(way, [way.ask(problem) for problem in PROBLEMS], replies, [OWN] * 4)

    assert ("chat template" in found(some(TRAINED, texts), some(CHAT, turned))) is named


def test_what_the_model_is_less_sure_of_is_no_sign_of_a_template():
    foreign = [asked(way, served("c")) for way in (WORDING, BRACKETS, JSON)]
    assert found(asked(TRAINED, served()), asked(CHAT, served()), *foreign) == {}


def test_a_refused_conversation_is_another_template():
    refused = Asked(CHAT, [CHAT.ask(problem) for problem in PROBLEMS], [], [OWN] * 4, refused="no chat template is set")
    seen = found(asked(TRAINED, served()), refused)
    assert seen == {"chat template": "a conversation is refused: no chat template is set"}


def test_another_tokenizer_is_told_from_a_beginning():
    prompts = [TRAINED.ask(problem) for problem in PROBLEMS]
    replies = [served(prompt_tokens=20 + number) for number in range(4)]
    assert set(found(Asked(TRAINED, prompts, replies, [OWN] * 4))) == {"tokenizer"}


def test_a_text_that_the_length_cut_is_no_sign_of_an_end_token():
    own = Answer("b", cut_off=True, prompt_tokens=20)
    assert found(asked(TRAINED, served("b。空は"), own)) == {}


def test_rates_and_differences_by_hand():
    texts = ["b", "b\n問題: 月は", "わからない", "c"]
    prompts = [TRAINED.ask(problem) for problem in PROBLEMS]
    replies = [Answer(text, cut_off=text == "わからない") for text in texts]
    result = way_result(Asked(TRAINED, prompts, replies, [OWN] * 4), PROBLEMS)
    assert {name: result[name] for name in ("run_on", "cut_off", "unread", "score")} == {
        "run_on": 0.25,
        "cut_off": 0.25,
        "unread": 0.25,
        "score": 0.5,
    }
    assert result["difference"] == {"run_on": 0.25, "cut_off": 0.25, "unread": 0.25, "score": -0.5}
    assert result["other_texts"] == 3
    lines = list(
        check_lines(
            {
                "ok": False,
                "model": "m",
                "where": "w",
                "problems": 4,
                "findings": {"BOS": "seen"},
                "ways": {"trained prompt": result},
            }
        )
    )
    assert "0.500 (-0.500)" in lines[1]
    assert "3 of 4" in lines[1]
    assert lines[-1] == "check-serving: m at w, 4 problems: NOT kept: BOS"


@pytest.mark.parametrize(
    ("way", "text"),
    [
        (TRAINED, "b"),
        (WORDING, "(b)です"),
        (BRACKETS, "b. 青"),
        (JSON, '{"answer": "b"}'),
        (JSON, '```json\n{"answer": ["b"]}\n```'),
    ],
)
def test_each_way_is_read_as_it_asked(way, text):
    assert way.read(text, PROBLEMS[0]) == ("b",)


def test_foreign_prompts_are_conversations_where_there_is_a_template_and_texts_where_not():
    chats, texts = ways(CONFIG, (), chats=True), ways(CONFIG, (), chats=False)
    assert [way.name for way in chats] == ["trained prompt", "chat", "other wording", "【回答】", "JSON"]
    assert [way.name for way in texts] == ["trained prompt", "other wording", "【回答】", "JSON"]
    assert CHAT.ask(PROBLEMS[0]) == (Message("user", TRAINED.ask(PROBLEMS[0])),)
    assert all(isinstance(way.ask(PROBLEMS[0]), str) for way in texts)


def test_an_answer_of_an_engine_keeps_how_it_ended():
    made = Answer.own(Generation("b", (1,), "stop", "\n"), 7)
    assert (made.stopped, made.cut_off, made.prompt_tokens) == ("\n", False, 7)


def test_conversations_that_only_go_on_are_no_sign_of_another_template():
    longer = served("b。空は赤い")
    assert set(found(asked(TRAINED, served()), asked(CHAT, longer))) == {"end token"}
    nothing = Answer("", cut_off=False, prompt_tokens=20)  # of what begins with nothing, either may be the reason
    assert found(asked(TRAINED, served()), asked(CHAT, longer, nothing)) == {}


@pytest.mark.parametrize("text", ["b", "b\n問題:"], ids=["cut off", "left at the end"])
def test_a_text_that_a_stop_string_ended_counts_as_the_engines_own_does(text):
    result = way_result(asked(TRAINED, served(text), STOPPED), PROBLEMS)
    assert result["run_on"] == result["own"]["run_on"] == 1.0
    assert found(asked(TRAINED, served(text), STOPPED)) == {}  # it was held back, so nothing runs on there
    assert "runs on" in found(asked(TRAINED, served("b\n問題: 月は何色か。"), STOPPED))
