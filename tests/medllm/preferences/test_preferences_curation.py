"""Curation: the model's answers sorted below the verified explanation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from medllm.config import ModelConfig, Sampling
from medllm.engine import Generation
from medllm.errors import UserError
from medllm.exam.problem import Problem
from medllm.exam.prompts import curation_prompt
from medllm.host.progress import Progress
from medllm.model.tokenizer import Prompt
from medllm.preferences.curation import check_problems, curate
from medllm.preferences.records import Sample
from medllm.stage_config import CurateConfig
from medllm.stages.curate import build_preferences


class ScriptedEngine:
    """Answers each question, found by its text at the end of the prompt, with the given continuations."""

    def __init__(self, script: dict[str, list[str | Generation]]):
        self.script = script
        self.prompts: list[Prompt] = []
        self.samplings: list[Sampling] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> list[list[Generation]]:
        self.prompts += prompts
        if progress:
            progress(len(prompts), len(prompts))
        self.samplings.append(sampling)
        return [
            [text if isinstance(text, Generation) else Generation(text, (), "stop") for text in self.script[asked(prompt)]]
            for prompt in prompts
        ]


def asked(prompt: Prompt) -> str:
    return prompt.rsplit("Question: ", 1)[1].split("\n", 1)[0]


def problem(number: int, **fields) -> Problem:
    settings = {
        "problem_id": f"110A{number}",
        "text": f"問{number}",
        "choices": ("一", "二", "三"),
        "answer": ("a",),
        "explanation": f"解説{number}",
        "year": 2016,
        "source": f"p.jsonl:{number}",
        **fields,
    }
    return Problem(**settings)


def config(**fields) -> CurateConfig:
    sampling = Sampling(temperature=1.0, top_p=0.95, samples=4, seed=7, max_new_tokens=64)
    settings = {"model": ModelConfig("m"), "run": "r", "problems": (), "shot_count": 0, "sampling": sampling, **fields}
    return CurateConfig(**settings)


def test_right_answers_are_chosen_wrong_missing_and_cut_ones_rejected():
    samples = [
        "よい\n Answer:a",
        "わるい\n Answer:b\n",
        "よい\n Answer:a\n\n",
        "答えがない",
        Generation("長い\n Answer:a", (), "length"),
    ]
    curation = curate(ScriptedEngine({"問1": samples}), [problem(1)], [], config())
    (found,) = curation.preferences
    assert found.problem_id == "110A1"
    assert found.prompt == "Question: 問1\na: 一\nb: 二\nc: 三\n Explanation:"
    assert found.ground_truth == Sample("解説1\n Answer:a", "a")
    assert [(sample.text, sample.answer) for sample in found.chosen] == [("よい\n Answer:a", "a")]
    assert [(sample.text, sample.answer) for sample in found.rejected] == [
        ("わるい\n Answer:b", "b"),
        ("答えがない", ""),
        ("長い\n Answer:a", "a"),
    ]
    report = curation.report
    assert (report.problems, report.samples, report.right, report.duplicates) == (1, 5, 2, 1)
    assert (report.chosen, report.rejected, report.unanswered, report.cut_off) == (1, 3, 1, 1)
    assert report.problems_with == {"ground truth > chosen": 1, "ground truth > rejected": 1, "chosen > rejected": 1}


def test_each_sample_remembers_how_it_came_about():
    curation = curate(ScriptedEngine({"問1": ["x", "y"]}), [problem(1)], [], config())
    second = curation.preferences[0].rejected[1]
    assert second.seed == 7
    assert second.settings == {
        "sample": 1, "temperature": 1.0, "top_p": 0.95, "top_k": 0, "max_new_tokens": 64, "finish": "stop",
    }  # fmt: skip


def test_problems_with_only_one_kind_of_sample_are_counted_apart():
    problems = [problem(number) for number in range(1, 4)]
    script = {"問1": ["\n Answer:a"], "問2": ["\n Answer:b"], "問3": ["\n Answer:b", "よい\n Answer:a"]}
    report = curate(ScriptedEngine(script), problems, [], config()).report
    assert report.problems_with == {"ground truth > chosen": 2, "ground truth > rejected": 2, "chosen > rejected": 1}


def test_a_problem_is_never_its_own_shot():
    problems = [problem(number) for number in range(1, 6)]
    engine = ScriptedEngine({one.text: [" Answer:a"] for one in problems})
    curate(engine, problems, problems[:3], config(shot_count=3))
    expected = {1: (2, 3, 4), 2: (1, 3, 4), 3: (1, 2, 4), 4: (1, 2, 3), 5: (1, 2, 3)}
    by_number = dict(enumerate(problems, start=1))
    for prompt, (number, shots) in zip(engine.prompts, expected.items(), strict=True):
        assert prompt == curation_prompt(by_number[number], [by_number[shot] for shot in shots])


def test_a_shot_under_another_id_is_still_recognized_as_the_problem():
    problems = [problem(1), problem(2)]
    engine = ScriptedEngine({"問1": [""], "問2": [""]})
    curate(engine, problems, [problem(1, problem_id="shot1"), problem(9)], config(shot_count=1))
    assert engine.prompts == [curation_prompt(problems[0], [problem(9)]), curation_prompt(problems[1], [problem(1)])]


def test_a_shot_with_another_wording_is_still_recognized_by_its_id():
    engine = ScriptedEngine({"問1": [""], "問2": [""]})
    curate(engine, [problem(1), problem(2)], [problem(1, text="問 1"), problem(9)], config(shot_count=1))
    assert engine.prompts[0] == curation_prompt(problem(1), [problem(9)])


def test_too_few_shots_are_refused():
    with pytest.raises(UserError, match=r"110A1: 3 shots are asked for, but only 1"):
        curate(ScriptedEngine({}), [problem(1), problem(2)], [], config(shot_count=3))


def test_generation_stops_at_the_next_question_and_at_the_users_own_strings():
    engine = ScriptedEngine({"問1": [""]})
    curate(engine, [problem(1)], [], config(sampling=Sampling(samples=1, stop=("##",))))
    assert engine.samplings == [Sampling(samples=1, stop=("##", "\nQuestion:"))]


def test_answers_written_as_text_are_graded_and_so_is_the_ground_truth():
    engine = ScriptedEngine({"問1": ["よい\n Answer:一", "わるい\n Answer:三"]})
    (found,) = curate(engine, [problem(1)], [problem(9)], config(answer_as="text", shot_count=1)).preferences
    assert found.prompt == curation_prompt(problem(1), [problem(9)], answer_as="text")
    assert found.ground_truth == Sample("解説1\n Answer:一", "a")
    assert [sample.answer for sample in found.chosen] == ["a"]
    assert [sample.answer for sample in found.rejected] == ["c"]


def test_multiple_numeric_and_alternative_answers_are_graded():
    problems = [
        problem(1, answer=("a", "c")),
        problem(2, choices=(), answer=("42",)),
        problem(3, answer=("a or c",)),
        problem(4, text_only=False),
    ]
    script = {
        "問1": ["\n Answer:c,a", "\n Answer:a"],
        "問2": ["\n Answer:42", "\n Answer:41"],
        "問3": ["\n Answer:c", "\n Answer:b"],
        "問4": ["\n Answer:a", "\n Answer:b"],
    }
    preferences = curate(ScriptedEngine(script), problems, [], config()).preferences
    assert [[sample.answer for sample in one.chosen] for one in preferences] == [["a,c"], ["42"], ["c"], ["a"]]
    assert [[sample.answer for sample in one.rejected] for one in preferences] == [["a"], ["41"], ["b"], ["b"]]
    assert [one.ground_truth.answer for one in preferences] == ["a,c", "42", "a", "a"]


def test_unexplained_problems_and_those_over_the_limit_are_skipped_with_a_count():
    problems = [problem(1, explanation=None), problem(2), problem(3, explanation=""), problem(4)]
    curation = curate(ScriptedEngine({"問2": [""]}), problems, [], config(limit=1))
    assert [one.problem_id for one in curation.preferences] == ["110A2"]
    assert curation.report.skipped == {"no verified explanation": 2, "over the limit": 1}


def test_without_any_explanation_there_is_nothing_to_curate():
    with pytest.raises(UserError, match="none of the 1 problems has a verified explanation"):
        check_problems([problem(1, explanation=None)], [], config())


@pytest.mark.parametrize("as_shot", [False, True])
def test_a_held_out_exam_is_refused_before_anything_is_generated_or_written(as_shot, tmp_path):
    held_out = problem(2, year=2018)
    engine = ScriptedEngine({})
    problems, shots = ([problem(1)], [held_out]) if as_shot else ([problem(1), held_out], [])
    with pytest.raises(UserError, match=r"p\.jsonl:2: problem 110A2 is of 2018, but only exams up to 2017"):
        build_preferences(engine, problems, shots, config(limit=1, run=str(tmp_path / "run")))
    assert not engine.prompts
    assert not (tmp_path / "run").exists()


def test_a_problem_id_that_comes_twice_is_refused():
    twice = [problem(1), dataclasses.replace(problem(2), problem_id="110A1")]
    with pytest.raises(UserError, match=r"p\.jsonl:2: problem 110A1 was already in p\.jsonl:1"):
        check_problems(twice, [], config())


def test_batches_keep_the_order_of_the_problems_and_report_progress():
    problems = [problem(number) for number in range(1, 6)]
    engine = ScriptedEngine({one.text: [one.problem_id] for one in problems})
    seen = []
    curation = curate(engine, problems, [], config(batch_size=2), lambda done, total, doing="": seen.append((done, total)))
    assert [one.rejected[0].text for one in curation.preferences] == [one.problem_id for one in problems]
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert len(engine.samplings) == 3
