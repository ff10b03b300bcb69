"""Why scores with and without explanation part: each cause by its text, and what the rule for contradictions may not take."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from medllm.errors import UserError
from medllm.exam.answers import extract_answer
from medllm.exam.conclusions import concluded
from medllm.exam.flips import CAUSES, Answered, cause_of, find_flips, read_answered
from medllm.exam.loaders import load_problems
from medllm.exam.predictions import read_predictions
from medllm.exam.problem import Problem

CHOICES = ("肺炎", "気胸", "自然気胸", "肺塞栓症", "心筋炎")
ONE = Problem("one", "最も考えられるのはどれか。1つ選べ。", CHOICES, ("d",))
WRONG = Problem("wrong", "誤っているのはどれか。1つ選べ。", CHOICES, ("d",))
TWO = Problem("two", "考えられるのはどれか。2つ選べ。", CHOICES, ("a", "d"))
ENGLISH = Problem(
    "english", "What is the most likely diagnosis?", ("pneumonia", "pleurisy", "asthma", "pulmonary embolism"), ("d",)
)
NOT = Problem("not", "Which of these is not a cause?", ("pneumonia", "pleurisy", "asthma", "pulmonary embolism"), ("d",))
NUMBER = Problem("number", "何mLか。", (), ("120",))

# What the explanation names; the answer behind it never counts.
NAMED = [
    (ONE, "胸痛がある。よって肺塞栓症が正しい。\n答え:a", "d"),
    (ONE, "胸痛がある。したがって、正解はdである。\n答え: a", "d"),
    (ONE, "胸痛がある。\n以上より d\n答え: a", "d"),
    (ONE, "bは誤り。\nよってdが正解。他の選択肢は誤りである。\n答え:a", "d"),
    (ONE, "突然の胸痛である。診断は自然気胸である。\n Answer:a", "c"),
    (ONE, "最も可能性が高いのは肺塞栓症である。\n答え:a", "d"),
    (ONE, "答え: a\n解説: 突然の胸痛である。よってdが正しい。", "d"),
    (ONE, "<think>よってaが正しい。</think>胸痛がある。よってdを選択する。\n答え:a", "d"),
    (ONE, '{"explanation": "胸痛がある。よって肺塞栓症が正しい。", "answer": "a"}', "d"),
    (ONE, "よってdが正しい。\n答え:a\n問題: 次の問題。よってeが正しい。\n答え:e", "d"),
    (ONE, "突然の胸痛である。したがって、肺塞栓症が最も考えられる。\n答え:a", "d"),
    (ONE, "### 結論:\n胸痛が突然なので、肺塞栓症が最も適切な診断である。\n【回答】a", "d"),
    (TWO, "よってb、dが正しい。\n答え:a,d", "bd"),
    (TWO, "所見は肺炎、肺塞栓症である。よって肺炎、肺塞栓症が正しい。\n答え:a,b", "ad"),
    (WRONG, "aからcは正しい。よってdを選ぶ。\n答え:a", "d"),
    (WRONG, "aからcは正しい。したがって正解はdである。\n答え:a", "d"),
    (ENGLISH, "The pain is sudden. Therefore, the correct answer is D.\nAnswer: a", "d"),
    (ENGLISH, "The pain is sudden. The diagnosis is pulmonary embolism.\nAnswer: a", "d"),
    (ENGLISH, "Fever is absent. Thus option d is correct. The other options are wrong.\nAnswer: a", "d"),
    (NOT, "All others are. So the answer is d.\nAnswer: a", "d"),
]
# What names nothing for certain.
UNNAMED = [
    (ONE, "胸痛がある。\n答え:a"),
    (ONE, "答え:a"),
    (ONE, ""),
    (ONE, "肺炎では熱が出る。dは稀である。\n答え:a"),
    (ONE, "よってdは誤りである。\n答え:a"),
    (ONE, "したがってdではない。\n答え:a"),
    (ONE, "よってbまたはdが正しい。\n答え:a"),
    (ONE, "鑑別すべき疾患は肺塞栓症である。\n答え:a"),
    (ONE, "肺塞栓症との鑑別が必要である。\n答え:a"),
    (ONE, "したがって、肺塞栓症は考えられない。\n答え:a"),
    (ONE, "したがって、A型の肺塞栓症が考えられる。\n答え:d"),  # a letter that may be another option's
    (ONE, "よってdが正しい。しかし熱がある。\n答え:a"),
    (ONE, "よってb、dが正しい。\n答え:a"),  # more than are wanted
    (TWO, "よってdが正しい。\n答え:a"),  # fewer
    (ONE, "a: 誤り。\nb: 誤り。\nd: 正しい。\ne: 誤り。\n答え:a"),
    (ONE, "a: 合わない。\nb: 合わない。\nd: 合わない。\ne: よく合う。\n答え:a"),
    (WRONG, "よってdが正しい。\n答え:a"),  # true of d, and so no answer
    (ENGLISH, "Pulmonary embolism must be ruled out.\nAnswer: a"),
    (ENGLISH, "Therefore it is not pulmonary embolism.\nAnswer: a"),
    (ENGLISH, "Therefore the answer could be d.\nAnswer: a"),
    (ENGLISH, "Pulmonary embolism is a differential diagnosis.\nAnswer: a"),
    (NOT, "Thus pneumonia is correct.\nAnswer: a"),
    (NUMBER, "60×2=120である。\n答え:100"),
]


@pytest.mark.parametrize(("problem", "text", "letters"), NAMED)
def test_the_concluding_sentence_names_an_option(problem, text, letters):
    assert "".join(concluded(text, problem)) == letters


@pytest.mark.parametrize(("problem", "text"), UNNAMED)
def test_what_does_not_name_for_certain_names_nothing(problem, text):
    assert concluded(text, problem) == ()


def test_published_explanations_conclude_with_the_answers_they_give():
    """JMLE2026-Bench's five models are hardly ever of two minds: where the rule says they are, the rule is wrong."""
    real = os.environ.get("MEDLLM_REAL_DATA")
    if not real:
        pytest.skip("set MEDLLM_REAL_DATA to a folder with jmle2026/")
    problems = load_problems(f"{real}/jmle2026/jmle2026_dataset.json").problems
    asked = {problem.problem_id: problem for problem in problems if not problem.is_numeric}
    counts = Counter()
    for file in sorted(Path(real, "jmle2026/results").glob("*.json")):
        for said in read_predictions(file):
            if problem := asked.get(said.problem_id):
                answer = extract_answer(said.explanation, problem, explanation=True).answer
                named = concluded(said.explanation, problem) if answer else ()
                counts["read"] += bool(answer)
                counts["explained"] += bool(answer) and len(said.explanation) > 60
                counts["named"] += bool(named)
                counts["contradicts"] += bool(named) and set(named) != set(answer)
    print(dict(counts))
    assert counts["named"] > 150
    assert counts["contradicts"] <= 1


CAUSED = [
    # no answer
    ("胸痛がある。\n問題: 次の問題はどれか。\n答え:b", "", {}, "ran_on"),
    ("胸痛がある。", "", {"stop": "\n問題:"}, "ran_on"),
    ("胸痛がある。\n問題: 次の問題はどれか。", "", {"cut_off": True}, "ran_on"),  # what was cut off was another question
    ("胸痛がある。そして熱も", "", {"cut_off": True}, "cut_off"),
    ("胸痛がある。そして熱も", "", {}, "cut_off"),  # as the text itself shows
    ("胸痛がある。よって\nAnswer: ない薬", "", {"cut_off": False}, "unread"),  # it ended by itself, with no option
    ("胸痛がある。", "", {"stop": "###"}, "unread"),
    ("わかりません。", "", {}, "unread"),
    ("よってdが正しい。\n答え: aまたはb", "", {}, "unread"),
    # an answer
    ("よってdが正しい。\n答え:a", "a", {}, "contradicts"),
    ("よってaが正しい。\n答え:a", "a", {}, "reasoning"),
    ("胸痛がある。\n答え:a", "a", {}, "reasoning"),
    ("よってaが正しい。\n答え:a\n問題: 次の問題はどれか。", "a", {}, "reasoning"),
    ("よってaが正しい。\n答え:a", "a", {"stop": "\n問題:"}, "reasoning"),
    ("よってdが正しい。\n答え:a\nさらに熱も", "a", {"cut_off": True}, "contradicts"),
]


@pytest.mark.parametrize(("text", "prediction", "ended", "cause"), CAUSED)
def test_the_first_cause_that_holds_is_the_cause(text, prediction, ended, cause):
    assert cause_of(ONE, Answered(text, prediction, False, **ended), explanation=True) == cause


def test_every_cause_is_in_words_and_in_the_order_it_is_asked_for():
    assert list(CAUSES) == ["ran_on", "cut_off", "unread", "contradicts", "reasoning"]


def answers(**texts):
    """Answers to problems called by their keyword: right where the prediction is d."""
    return {key: Answered(text, prediction, prediction == "d") for key, (text, prediction) in texts.items()}


PROBLEMS = {key: Problem(key, ONE.text, CHOICES, ("d",)) for key in "pqrs"}


def test_flips_go_both_ways_and_each_has_the_cause_of_the_answer_that_is_wrong():
    plain = answers(p=("d", "d"), q=("b", "b"), r=("d", "d"), s=("わかりません。", ""))
    explained = answers(p=("よってdが正しい。\n答え:a", "a"), q=("答え:d", "d"), r=("答え:d", "d"), s=("答え:d", "d"))
    flips = find_flips(PROBLEMS, plain, explained)
    assert [(flip.problem_id, flip.lost, flip.cause) for flip in flips] == [
        ("p", True, "contradicts"),
        ("q", False, "reasoning"),
        ("s", False, "unread"),
    ]


def test_answers_to_other_problems_are_refused():
    with pytest.raises(UserError, match=r"not to the same problems: 1 differ, e\.g\. q; evaluate both"):
        find_flips(PROBLEMS, answers(p=("d", "d")), answers(p=("d", "d"), q=("d", "d")))
    with pytest.raises(UserError, match="problem z was answered but is not among the problems"):
        find_flips(PROBLEMS, answers(z=("d", "d")), answers(z=("a", "a")))


def write_run(folder, lines, journal=None, **result):
    folder.mkdir()
    predictions = [{"problem_id": key, "prediction": said, "explanation": text} for key, said, text in lines]
    rows = [{"problem_id": key, "correct": said == "d", "points": 1, "prediction": said} for key, said, _ in lines]
    (folder / "predictions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in predictions))
    (folder / "result.json").write_text(json.dumps({"stage": "evaluate", "score": {"results": rows}} | result))
    if journal:
        (folder / "answers.journal").write_text("".join(f"{json.dumps(row)}\n" for row in journal))
    return folder


def test_a_run_folder_says_how_its_texts_ended(tmp_path):
    kept = [
        {"problem_id": "p", "finish": "length", "stopped": ""},
        {"problem_id": "q", "finish": "length", "stopped": ""},
        {"problem_id": "q", "finish": "stop", "stopped": "\n問題:"},  # the later of two counts
    ]
    lines = [("p", "", "熱が"), ("q", "d", "答え:d")]
    said = read_answered(write_run(tmp_path / "run", lines, kept))
    assert said == {"p": Answered("熱が", "", False, True, ""), "q": Answered("答え:d", "d", True, False, "\n問題:")}
    assert read_answered(write_run(tmp_path / "bare", lines))["p"] == Answered("熱が", "", False, None, "")


def test_a_folder_without_answers_is_refused(tmp_path):
    with pytest.raises(UserError, match="the run has not finished"):
        read_answered(tmp_path)
    with pytest.raises(UserError, match="holds no answers of a 'medllm evaluate'"):
        read_answered(write_run(tmp_path / "options", [("p", "d", "d")], stage="options"))
    run = write_run(tmp_path / "other", [("p", "d", "d")])
    (run / "predictions.jsonl").write_text('{"problem_id": "q", "prediction": "d"}\n')
    with pytest.raises(UserError, match=r"problem 'p' of result\.json has no line in predictions\.jsonl"):
        read_answered(run)
