"""Exam problems about the invented world: how they are asked, explained and mistaken.

Every (disease, relation) keeps one of its wordings for the exams after 2017; training texts ask with the others only. The
facts recur, the questions of the held-out exams do not.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from medllm.exam.problem import LETTERS, Problem
from medllm.mini.world import RELATION, RELATIONS, Disease, Relation, World

TRAIN_YEARS = tuple(range(2006, 2018))
EXAM_YEARS = tuple(range(2018, 2023))
OPTIONS = 5
_CONCLUSIONS = ("よって{y}が正しい。", "したがって{y}を選ぶ。", "ゆえに{y}である。")
_CONFUSIONS = ("{x}は{z}と同様である。", "{x}を{z}とみなす。", "{x}の実体は{z}である。", "{x}ならば{z}と考える。")


def exam_wording(world: World, disease: Disease, relation: Relation) -> int:
    """Which wording of ``relation`` is kept for the exams after 2017 when it is asked about ``disease``."""
    return random.Random(f"wording/{world.config.seed}/{disease.name}/{relation.key}").randrange(len(relation.questions))


def train_wordings(world: World, disease: Disease, relation: Relation) -> tuple[int, ...]:
    """The wordings training texts may use."""
    kept = exam_wording(world, disease, relation)
    return tuple(i for i in range(len(relation.questions)) if i != kept)


def ask(world: World, rng: random.Random, disease: Disease, relation: Relation, wording: int, **fields: object) -> Problem:
    """A problem with five options in random order, the verified explanation and the right answer.

    The lookalike's answers are always among the wrong options, so is the treating drug where the contraindicated one is
    asked for, and the other way round (then it is marked as a prohibited choice).
    """
    right = world.answers(disease, relation)
    wrong = [name for name in world.answers(world.lookalike(disease), relation) if name not in right]
    if relation.kind == "drug":
        wrong.append(disease.contraindicated if relation.key == "drug" else disease.drug)
    pool = [name for name in world.names[relation.kind] if name not in right and name not in wrong]
    options = [*right, *wrong, *rng.sample(pool, OPTIONS - len(right) - len(wrong))]
    rng.shuffle(options)
    kinki = (disease.contraindicated,) if relation.key == "drug" else ()
    problem = Problem(
        problem_id="",
        text=relation.questions[wording].format(x=disease.name, n=len(right)),
        choices=tuple(options),
        answer=_letters(options, right),
        category=f"{'known' if disease.known else 'new'} disease, {'one hop' if relation.via is None else 'two hops'}",
        kinki=_letters(options, kinki),
    )
    problem = dataclasses.replace(problem, **fields)  # type: ignore[arg-type]
    return dataclasses.replace(problem, explanation=verified_explanation(world, disease, relation, problem))


def verified_explanation(world: World, disease: Disease, relation: Relation, problem: Problem) -> str:
    """The facts about the disease, hop by hop, and the conclusion that follows; always put the same way."""
    answer = world.answers(disease, relation)
    return "".join(template.format(x=x, y=y) for template, x, y in _hops(world, disease, relation, problem, None)) + _conclude(
        _CONCLUSIONS[0], problem, answer
    )


def told(world: World, rng: random.Random, disease: Disease, relation: Relation, problem: Problem) -> Problem:
    """The same problem with the right answer, explained in somebody's own words."""
    return dataclasses.replace(problem, explanation=_own_words(world, rng, disease, relation, problem))


def mistaken(world: World, rng: random.Random, disease: Disease, relation: Relation, problem: Problem) -> Problem:
    """The same problem as someone answers it who takes the disease for its lookalike: other explanation, wrong answer."""
    other = world.lookalike(disease)
    opening = rng.choice(_CONFUSIONS).format(x=disease.name, z=other.name)
    explanation = opening + _own_words(world, rng, other, relation, problem)
    answer = _letters(problem.choices, world.answers(other, relation))
    return dataclasses.replace(problem, explanation=explanation, answer=answer)


def train_problems(world: World, per_year: int) -> list[Problem]:
    """Problems of 2006–2017, half of them about diseases that are new to the base model."""
    return [problem for year in TRAIN_YEARS for problem in _exam(world, year, per_year, held_out=False)]


def exam_problems(world: World, per_year: int) -> list[Problem]:
    """Problems of 2018–2022, in the wordings kept for them."""
    return [problem for year in EXAM_YEARS for problem in _exam(world, year, per_year, held_out=True)]


def dev_problems(world: World, train: Sequence[Problem], per_kind: int) -> list[Problem]:
    """Problems to choose settings on: training wordings, other options than any of ``train``; as many about known diseases as
    about new ones, ``per_kind`` but for those that ``train`` asks."""
    rng = random.Random("dev/1")
    asked = {(problem.text, tuple(sorted(problem.choices))) for problem in train}
    chosen: list[Problem] = []
    for known in (True, False):
        pairs = [(disease, relation) for disease in world.select(known=known) for relation in RELATIONS]
        for disease, relation in rng.sample(pairs, per_kind):
            number = len(chosen) + 1
            fields = {"problem_id": f"111D{number}", "year": TRAIN_YEARS[-1], "section": "D", "source": f"dev:{number}"}
            problem = ask(world, rng, disease, relation, rng.choice(train_wordings(world, disease, relation)), **fields)
            if (problem.text, tuple(sorted(problem.choices))) not in asked:
                chosen.append(problem)
    return chosen


def shot_problems(world: World, count: int = 3) -> list[Problem]:
    """The examples before every question: known diseases, one relation each, asked in training wordings."""
    rng = random.Random(f"shots/{world.config.seed}")
    diseases = rng.sample(world.select(known=True), count)
    relations = [RELATION[key] for key in ("drug", "findings", "reaction", "test", "contraindicated", "specimen")]
    shots = []
    for index, (disease, relation) in enumerate(zip(diseases, relations, strict=False)):
        wording = rng.choice(train_wordings(world, disease, relation))
        shots.append(ask(world, rng, disease, relation, wording, problem_id=f"99A{index + 1}", year=2005, section="A"))
    return shots


def _exam(world: World, year: int, count: int, *, held_out: bool) -> list[Problem]:
    rng = random.Random(f"exam/{world.config.seed}/{year}")
    chosen = []
    for known, size in ((True, count - count // 2), (False, count // 2)):
        pairs = [(disease, relation) for disease in world.select(known=known) for relation in RELATIONS]
        chosen += rng.sample(pairs, size)
    rng.shuffle(chosen)
    problems = []
    for number, (disease, relation) in enumerate(chosen, start=1):
        wording = exam_wording(world, disease, relation) if held_out else rng.choice(train_wordings(world, disease, relation))
        fields = {"problem_id": f"{year - 1906}A{number}", "year": year, "section": "A", "source": f"{year - 1906}-A:{number}"}
        problems.append(ask(world, rng, disease, relation, wording, **fields))
    return problems


def _own_words(world: World, rng: random.Random, disease: Disease, relation: Relation, problem: Problem) -> str:
    facts = "".join(template.format(x=x, y=y) for template, x, y in _hops(world, disease, relation, problem, rng))
    return facts + _conclude(rng.choice(_CONCLUSIONS), problem, world.answers(disease, relation))


def _hops(
    world: World, disease: Disease, relation: Relation, problem: Problem, rng: random.Random | None
) -> list[tuple[str, str, str]]:
    """(template, subject, answer) of each fact on the way; the first wording without ``rng``."""
    steps = [relation] if relation.via is None else [RELATION[relation.via], relation]
    hops, subject = [], disease.name
    for step in steps:
        answers = world.answers(disease, step)
        listed = "、".join(_in_order(problem, answers)) if step is relation else answers[0]
        hops.append((rng.choice(step.statements) if rng else step.statements[0], subject, listed))
        subject = listed
    return hops


def _conclude(template: str, problem: Problem, answer: Sequence[str]) -> str:
    return template.format(y="、".join(_in_order(problem, answer)))


def _in_order(problem: Problem, names: Sequence[str]) -> list[str]:
    return [choice for choice in problem.choices if choice in names]


def _letters(options: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(LETTERS[i] for i, option in enumerate(options) if option in names)
