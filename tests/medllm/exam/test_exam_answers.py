"""An answer is found in every form models write it in, and none is invented."""

import itertools
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from medllm.exam.answers import Reading, extract_answer
from medllm.exam.problem import LETTERS, Problem
from medllm.exam.prompts import render_answer

ONE = Problem("1", "どれか。", ("赤い石", "青い石", "ビタミンＣ", "青い石板", "B型の星"), ("c",))
TWO = Problem("2", "2つ選べ。", ("赤い石", "青い石", "ビタミンＣ", "青い石板", "B型の星"), ("b", "d"))
NUMBER = Problem("3", "何日か。", (), ("1200",))
DECIMAL = Problem("4", "何倍か。", (), ("1.2",))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("c", "c"),
        (" C\n", "c"),
        ("ｃ。", "c"),
        ("(c)", "c"),
        ("（ｃ）", "c"),
        ("【c】", "c"),
        ("「c」です。", "c"),
        ("答え: c", "c"),
        ("答え：Ｃ", "c"),
        ("**答え:** c", "c"),
        ("**Answer: c**", "c"),
        ("Answer: a", "a"),
        ("Final answer: (d)", "d"),
        ("The answer is (d).", "d"),
        ("正解はcです。", "c"),
        ("正解は、ｃである。", "c"),
        ("答えはc", "c"),
        ("答え:\nc", "c"),
        ("c: ビタミンC", "c"),
        ("c. ビタミンC", "c"),
        ("c ビタミンC", "c"),
        ("(c)ビタミンC", "c"),
        ("選択肢cが正しい。", "c"),
        ("c\n\nビタミンCだからである。aは誤り。", "c"),
        ("ビタミンC", "c"),
        ("ビタミンＣです。", "c"),
        ("青い石", "b"),
        ("青い石板", "d"),
        ("Ｂ型の星", "e"),
        ("答え: 「青い石板」", "d"),
        ("問題です\n答え: a\n問題: 次はどれか。\n答え: b", "a"),
    ],
)
def test_single_answers_are_found(text, answer):
    assert extract_answer(text, ONE, explanation=False).answer == (answer,)


@pytest.mark.parametrize(
    "text",
    [
        "b,d",
        "d, b",
        "ｂ，ｄ",
        "b、d",
        "bとd",
        "b と d",
        "b・d",
        "b/d",
        "b d",
        "bd",
        "(b)と(d)",
        "（ｂ）、（ｄ）",
        "答え: b、d",
        "正解はbとdです。",
        "Answer: b and d",
        "b: 青い石, d: 青い石板",
        "青い石、青い石板",
        "青い石板と青い石",
        "青い石および青い石板です。",
    ],
)
def test_two_answers_are_found_in_order(text):
    assert extract_answer(text, TWO, explanation=False).answer == ("b", "d")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n \n",
        "f",
        "画像がないため、答えられません。",
        "MRI(a)と標本(b)が示されていないため判断できません。",
        "aまたはb",
        "a or b",
        "a型の星",
        "赤い石は誤りで、青い石が正しい。",
        "A 57-year-old man",
        "答え:",
        "答え: わかりません",
    ],
)
def test_no_single_answer_gives_none(text):
    assert extract_answer(text, ONE, explanation=False).answer == ()


def test_fewer_letters_than_wanted_are_what_was_answered_and_more_are_none():
    assert extract_answer("b", TWO, explanation=False).answer == ("b",)
    assert extract_answer("a,b,c", TWO, explanation=False) == Reading(reason="too_many")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("aは誤り。bも誤り。cが正しい。\n Answer:c", ("c",)),
        ("答え: aと思うかもしれない。\n答え: bでもない。\n Answer:c", ("c",)),
        ("正解はaではない。\n答え:c", ("c",)),
        ("cである。\n 答え: c\n\n補足: 正解はaではない。", ("c",)),
        ("考えると、正解はcである。", ("c",)),
        ("cは正しい。\n Answer:c\n\nQuestion: 次の問題\na: 赤\n Explanation:略\n Answer:a", ("c",)),
        ("aは誤り。bも誤り。cが正しい。", ()),
        ("正解はcである。\nなぜなら、", ()),
        ("aは誤り。\nよって正解はc。\n", ("c",)),
        ("aは誤り。\n Answer:", ()),
        ("正解はaではない。\n Answer:", ()),
        ("c", ("c",)),
        ("", ()),
    ],
)
def test_with_explanation_only_the_last_answer_counts(text, answer):
    assert extract_answer(text, ONE, explanation=True).answer == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1200", ("1200",)),
        ("1,200", ("1200",)),
        ("１，２００日", ("1200",)),
        ("1200.0", ("1200",)),
        ("答え: 約1200日です", ("1200",)),
        ("600×2=1200", ("1200",)),
        ("1,201", ("1201",)),
        ("−5", ("-5",)),
        ("3.25倍", ("3.25",)),
        ("600×2", ()),
        ("1,2", ()),
        ("不明", ()),
    ],
)
def test_numbers_are_found(text, answer):
    assert extract_answer(text, NUMBER, explanation=False).answer == answer


def test_an_equal_number_is_written_as_the_gold_answer():
    assert extract_answer("１．２０", DECIMAL, explanation=False).answer == ("1.2",)
    assert extract_answer("12", DECIMAL, explanation=False).answer == ("12",)
    assert extract_answer("3×0.4を計算する。\n Answer:1.2倍", DECIMAL, explanation=True).answer == ("1.2",)


def test_options_with_the_same_text_are_not_told_apart_by_it():
    twins = Problem("x", "どれか。", ("赤", "赤", "青"), ("a",))
    assert extract_answer("赤", twins, explanation=False).answer == ()
    assert extract_answer("青", twins, explanation=False).answer == ("c",)
    assert extract_answer("b", twins, explanation=False).answer == ("b",)


def test_an_option_that_contains_the_separator_is_read_by_the_number_of_answers():
    lists = ("赤", "青", "赤、青")
    assert extract_answer("赤、青", Problem("x", "1つ選べ。", lists, ("c",)), explanation=False).answer == ("c",)
    assert extract_answer("赤、青", Problem("x", "2つ選べ。", lists, ("a", "b")), explanation=False).answer == ("a", "b")


FULL_WIDTH = {ord(letter): ord(letter) + 0xFEE0 for letter in "abcdefghABCDEFGH,"}
padding = st.text(st.sampled_from(" 　\t"), max_size=3)
lead = st.sampled_from(["", "答え:", "答え：", "Answer:", "Answer: ", "解説文。\n Answer:", "aは誤り。\n答え: "])


@pytest.mark.parametrize("count", [2, 4, 5, 8])
def test_every_set_of_letters_comes_back(count):
    letters = LETTERS[:count]
    for size in range(1, count + 1):
        for chosen in itertools.combinations(letters, size):
            problem = Problem("x", "どれか。", tuple(f"選択肢{number}番" for number in range(count)), chosen)
            answer = render_answer(problem, chosen, "letters")
            assert extract_answer(answer, problem, explanation=False).answer == chosen
            assert extract_answer(f"説明。\n Answer:{answer}", problem, explanation=True).answer == chosen


@given(st.sets(st.sampled_from("abcdefgh"), min_size=1), padding, padding, lead, st.booleans(), st.booleans())
def test_letters_come_back_through_width_case_and_padding(chosen, before, after, lead, wide, upper):
    letters = tuple(sorted(chosen))
    problem = Problem("x", "どれか。", tuple(f"選択肢{number}番" for number in range(8)), letters)
    answer = render_answer(problem, letters, "letters")
    answer = answer.upper() if upper else answer
    answer = answer.translate(FULL_WIDTH) if wide else answer
    assert extract_answer(f"{lead}{before}{answer}{after}", problem, explanation=False).answer == letters


# Words of kanji, kana, digits and the punctuation options have; a word that reads as a list of letters is no option's text.
words = st.text(st.sampled_from("赤青緑石板星型症候群ビタミンアイウ〈〉()12３％-・ xyzＸＹ"), min_size=2, max_size=8)


@st.composite
def text_problems(draw):
    fold = {}
    for word in draw(st.lists(words, min_size=2, max_size=8)):
        plain = " ".join(unicodedata.normalize("NFKC", word).lower().split())
        if plain:
            fold.setdefault(plain, word)
    choices = tuple(fold.values())
    assume(len(choices) >= 2)
    letters = draw(st.sets(st.sampled_from(LETTERS[: len(choices)]), min_size=1, max_size=3))
    return Problem("x", "どれか。", choices, tuple(sorted(letters)))


@given(text_problems(), padding, padding, lead)
def test_option_texts_come_back(problem, before, after, lead):
    answer = render_answer(problem, problem.answer, "text")
    assert extract_answer(f"{lead}{before}{answer}{after}", problem, explanation=False).answer == problem.answer


@given(st.integers(-(10**9), 10**9), padding, padding, lead, st.booleans())
def test_numbers_come_back(number, before, after, lead, separated):
    problem = Problem("x", "何日か。", (), (str(number),))
    written = f"{number:,}" if separated else str(number)
    assert extract_answer(f"{lead}{before}{written}{after}", problem, explanation=False).answer == (str(number),)


@given(st.text(), st.booleans(), st.sampled_from([ONE, TWO, NUMBER, Problem("y", "どれか。", ("", "("), ("a",))]))
def test_any_text_gives_sorted_letters_of_the_problem_or_nothing(text, explanation, problem):
    found = extract_answer(text, problem, explanation=explanation).answer
    if problem.is_numeric:
        assert len(found) <= 1
    else:
        assert list(found) == sorted(set(found) & set(LETTERS[: len(problem.choices)]))


@pytest.mark.parametrize(("known", "reason"), [(None, "cut_off"), (True, "cut_off"), (False, "no_label")])
def test_what_is_known_of_a_texts_end_goes_before_its_last_words(known, reason):
    problem = Problem("x", "", ("赤い石", "青い石", "白い砂"), ("a",))
    assert extract_answer("まず、選択肢aについて考えると", problem, explanation=True, cut_off=known).reason == reason
