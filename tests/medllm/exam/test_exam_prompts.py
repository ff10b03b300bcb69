"""Prompts are what the benchmark's scripts send and what the paper prints, character for character."""

import pytest

from medllm.errors import UserError
from medllm.exam.answers import extract_answer
from medllm.exam.problem import Problem
from medllm.exam.prompts import curation_prompt, curation_response, evaluation_prompt, render_answer, stop_strings
from medllm.model.tokenizer import Message

COLOURS = ("赤", "青", "緑", "黒", "白")
SKY = Problem("s1", "ミロリ星の空は何色か。", COLOURS, ("c",), explanation="緑の雲がある。\n\n他は誤り。")
MOONS = Problem("s2", "ミロリ星の月はどれか。2つ選べ。", ("ア", "イ", "ウ", "エ", "オ"), ("a", "d"), explanation="アとエ。")
YEAR = Problem("n1", "ミロリ星の1年は何日か。", (), ("1200",), explanation="600×2。")

SKY_ASKED = (
    "問題: ミロリ星の空は何色か。\na: 赤\nb: 青\nc: 緑\nd: 黒\ne: 白\n必ずa,b,c,d,eの中からちょうど1個選んでください。\n答え:"
)
MOONS_ASKED = (
    "問題: ミロリ星の月はどれか。2つ選べ。\na: ア\nb: イ\nc: ウ\nd: エ\ne: オ\n"
    "必ずa,b,c,d,eの中からちょうど2個選んでください。\n答え:"
)


def ask(problem, shots=(), *, template="igakuqa", explanation=False, format="completion", answer_as="letters"):
    return evaluation_prompt(problem, shots, template=template, explanation=explanation, format=format, answer_as=answer_as)


def test_igakuqa_completion_is_the_published_wording_with_shots_between_blank_lines():
    assert ask(SKY) == SKY_ASKED
    assert ask(SKY, [MOONS, SKY]) == f"{MOONS_ASKED}a,d\n\n{SKY_ASKED}c\n\n{SKY_ASKED}"


def test_igakuqa_chat_is_the_published_layout():
    assert ask(SKY, [MOONS], format="chat") == (
        Message("system", "医師国家試験を解きます。"),
        Message("user", MOONS_ASKED),
        Message("assistant", "a,d"),
        Message("user", SKY_ASKED),
    )


def test_zero_shot_chat_is_the_system_message_and_the_question():
    assert [message.role for message in ask(SKY, format="chat")] == ["system", "user"]


def test_curation_template_is_the_papers_spaces_included():
    prompt = curation_prompt(SKY, [MOONS])
    assert prompt == (
        "Question: ミロリ星の月はどれか。2つ選べ。\na: ア\nb: イ\nc: ウ\nd: エ\ne: オ\n Explanation:アとエ。\n Answer:a,d\n\n"
        "Question: ミロリ星の空は何色か。\na: 赤\nb: 青\nc: 緑\nd: 黒\ne: 白\n Explanation:"
    )
    assert curation_response(SKY, answer_as="letters") == "緑の雲がある。\n\n他は誤り。\n Answer:c"
    assert ask(SKY, [MOONS], template="curation", explanation=True) == prompt


def test_curation_template_without_explanation_goes_from_options_to_answer():
    assert ask(SKY, [MOONS], template="curation") == (
        "Question: ミロリ星の月はどれか。2つ選べ。\na: ア\nb: イ\nc: ウ\nd: エ\ne: オ\n Answer:a,d\n\n"
        "Question: ミロリ星の空は何色か。\na: 赤\nb: 青\nc: 緑\nd: 黒\ne: 白\n Answer:"
    )


def test_igakuqa_with_explanation_shows_explanations_and_asks_for_one():
    prompt = ask(SKY, [MOONS], explanation=True)
    shot, question = prompt.split("\n\n")
    assert shot.endswith("\n解説:アとエ。\n答え:a,d")
    assert question.endswith("\n解説:")
    assert question.count("解説を書き") == 1
    assert "必ずa,b,c,d,eの中からちょうど1個選んでください。" in question


def test_answers_as_text_write_the_options_out():
    assert render_answer(MOONS, ("a", "d"), "text") == "ア、エ"
    assert curation_response(MOONS, answer_as="text") == "アとエ。\n Answer:ア、エ"
    prompt = ask(SKY, [MOONS], answer_as="text")
    assert "答え:ア、エ\n\n" in prompt
    assert "必ずa,b,c,d,eの中から" not in prompt


def test_an_option_of_several_lines_is_written_on_one():
    problem = Problem("x", "どれか。", ("一行", "二\n 行"), ("b",))
    assert render_answer(problem, ("b",), "text") == "二 行"


def test_numeric_problems_have_no_options_and_ask_for_a_number():
    assert ask(YEAR) == "問題: ミロリ星の1年は何日か。\n数値で答えてください。\n答え:"
    assert curation_prompt(YEAR, ()) == "Question: ミロリ星の1年は何日か。\n Explanation:"
    assert render_answer(YEAR, ("1200",), "text") == "1200"


def test_a_problem_with_two_accepted_answers_asks_for_one_and_shows_the_first():
    either = Problem("x", "どれか。", ("ア", "イ", "ウ", "エ"), ("a or d",), explanation="アでもエでも。")
    assert "ちょうど1個" in ask(either)
    assert curation_response(either, answer_as="letters").endswith(" Answer:a")


def test_lists_that_are_not_five_long():
    four = Problem("x", "どれか。", ("ア", "イ", "ウ", "エ"), ("a",))
    eight = Problem("y", "どれか。", tuple("一二三四五六七八"), ("h",))
    assert "必ずa,b,c,dの中からちょうど1個" in ask(four)
    assert "h: 八\n必ずa,b,c,d,eの中からちょうど1個" in ask(eight)


@pytest.mark.parametrize("template", ["igakuqa", "curation"])
@pytest.mark.parametrize("explanation", [False, True])
def test_stop_strings_cut_the_next_question_and_nothing_of_the_response(template, explanation):
    shot = ask(MOONS, [SKY], template=template, explanation=explanation)
    empty = ask(SKY, template=template, explanation=explanation)
    response, going_on = shot[len(empty) :].rsplit("\n\n", 1)
    stops = stop_strings(template, explanation)
    assert not any(stop in response for stop in stops)
    text = f"{response}\n\n{going_on}"
    cut = min(text.find(stop) for stop in stops if stop in text)
    assert text[:cut].rstrip("\n") == response
    assert extract_answer(text[:cut], SKY, explanation=explanation).answer == ("c",)
    assert extract_answer(text, SKY, explanation=explanation).answer == ("c",)


def test_a_shot_without_explanation_is_named():
    bare = Problem("s9", "どれか。", ("ア", "イ"), ("a",), source="shots.jsonl:4")
    for make in (
        lambda: curation_prompt(SKY, [bare]),
        lambda: curation_response(bare, answer_as="letters"),
        lambda: ask(SKY, [bare], explanation=True),
    ):
        with pytest.raises(UserError, match=r"shots\.jsonl:4: problem s9 has no explanation"):
            make()
    assert ask(SKY, [bare]).startswith("問題: どれか。\na: ア")


def test_a_letter_without_an_option_is_refused():
    with pytest.raises(UserError, match="problem s1 has no option 'f': its options are abcde"):
        render_answer(SKY, ("f",), "text")
