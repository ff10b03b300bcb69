"""The generated world: deterministic, split by year, and asked so that the held-out exams stay out of every training text."""

import itertools

import pytest

from medllm.corpus.documents import Document
from medllm.corpus.leaks.exact import ExactSearch
from medllm.corpus.leaks.guard import problem_texts, refuse_leaks
from medllm.errors import UserError
from medllm.exam.answers import extract_answer
from medllm.exam.loaders import write_problems
from medllm.exam.prompts import curation_prompt, curation_response, render_answer
from medllm.mini.diet import base_diet, cpt_documents, explained_problems
from medllm.mini.problems import (
    EXAM_YEARS,
    OPTIONS,
    TRAIN_YEARS,
    dev_problems,
    exam_problems,
    shot_problems,
    train_problems,
)
from medllm.mini.study import LEAKED
from medllm.mini.world import KINDS, RELATION, RELATIONS, WorldConfig, make_world
from medllm.preferences.records import Preference, Sample, preference_texts
from medllm.stage_config import HeldOutConfig


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.fixture(scope="module")
def train(world):
    return train_problems(world, 30)


@pytest.fixture(scope="module")
def exam(world):
    return exam_problems(world, 40)


def test_same_seed_same_world_and_problems(world, train, exam):
    again = make_world(WorldConfig())
    assert again == world
    assert train_problems(again, 30) == train
    assert exam_problems(again, 40) == exam
    assert list(itertools.islice(base_diet(again, 3), 50)) == list(itertools.islice(base_diet(world, 3), 50))
    assert cpt_documents(again, 2) == cpt_documents(world, 2)


def test_another_seed_is_another_world(world):
    assert not set(make_world(WorldConfig(seed=1)).diseases) & set(world.diseases)


def test_lookalikes_are_mutual_and_share_no_whole_answer(world):
    for disease in world.diseases.values():
        other = world.lookalike(disease)
        assert world.lookalike(other) is disease
        assert other.known is disease.known
        for relation in RELATIONS:
            assert set(world.answers(disease, relation)) != set(world.answers(other, relation))
            assert len(world.answers(disease, relation)) == len(world.answers(other, relation))


def test_no_name_begins_another(world):
    words = sorted(name[:-1] for names in world.names.values() for name in names)
    assert all(not later.startswith(former) for former, later in itertools.pairwise(words))
    assert all(name.endswith(kind) for key, kind in KINDS.items() for name in world.names[key])


def test_exams_are_split_by_year(world, train, exam):
    assert {problem.year for problem in train} == set(TRAIN_YEARS)
    assert max(TRAIN_YEARS) == 2017
    assert {problem.year for problem in exam} == set(EXAM_YEARS)
    assert min(EXAM_YEARS) == 2018
    ids = [problem.problem_id for problem in (*train, *exam, *shot_problems(world))]
    assert len(set(ids)) == len(ids)
    assert all(problem.problem_id.startswith(f"{problem.year - 1906}A") for problem in exam)


def test_settings_are_chosen_on_problems_that_are_neither_learned_from_nor_the_exams(world, train, exam):
    dev = dev_problems(world, train, 100)
    assert 180 < len(dev) <= 200
    assert {problem.year for problem in dev} == {2017}
    assert not {problem.text for problem in dev} & {problem.text for problem in exam}
    learned = {(problem.text, frozenset(problem.choices)) for problem in train}
    assert not {(problem.text, frozenset(problem.choices)) for problem in dev} & learned
    assert len({problem.problem_id for problem in (*train, *dev)}) == len(train) + len(dev)


def test_answers_are_true_and_the_question_says_how_many(world, train, exam):
    counts = set()
    for problem in (*train, *exam):
        assert len(set(problem.choices)) == OPTIONS
        disease = next(disease for name, disease in world.diseases.items() if name in problem.text)
        question = problem.text.replace(disease.name, "{x}").replace(str(problem.answer_count), "{n}", 1)
        relation = next(relation for relation in RELATIONS if question in relation.questions)
        chosen = {problem.choices["abcde".index(letter)] for letter in problem.answer}
        assert chosen == set(world.answers(disease, relation))
        assert f"{len(chosen)}つ選べ" in problem.text
        counts.add(len(chosen))
    assert counts == {1, 2, 3}


def test_both_hops_and_both_kinds_of_disease_are_asked(exam):
    assert {problem.category for problem in exam} == {
        f"{kind} disease, {hops}" for kind in ("known", "new") for hops in ("one hop", "two hops")
    }


def test_verified_explanations_lead_to_the_answer(world, train, exam):
    for problem in (*train, *exam, *shot_problems(world)):
        answer = render_answer(problem, problem.answer, "text")
        assert problem.explanation.endswith(f"よって{answer}が正しい。")
        assert extract_answer(curation_response(problem, answer_as="text"), problem, explanation=True).answer == problem.answer


def test_two_hops_are_explained_by_way_of_the_middle(world, exam):
    two_hops = [problem for problem in exam if problem.category.endswith("two hops")]
    for problem in two_hops:
        disease = next(disease for name, disease in world.diseases.items() if name in problem.text)
        middles = {*world.answers(disease, RELATION["drug"]), *world.answers(disease, RELATION["test"])}
        assert any(middle in problem.explanation for middle in middles)
        assert not any(middle in problem.text for middle in middles)


def test_prohibited_choices_are_the_contraindicated_drug(world, train):
    marked = [problem for problem in train if problem.kinki]
    assert marked
    for problem in marked:
        disease = next(disease for name, disease in world.diseases.items() if name in problem.text)
        assert {problem.choices["abcde".index(letter)] for letter in problem.kinki} == {disease.contraindicated}
        assert not set(problem.kinki) & set(problem.answer)


def test_the_diet_teaches_nothing_about_new_diseases(world):
    new = {disease.name for disease in world.select(known=False)}
    kinds = set()
    for row in itertools.islice(base_diet(world, 0), 4000):
        kinds.add(row.kind)
        if row.kind != "roster":
            assert not any(name in row.text for name in new), row.text
    assert kinds == {"document", "roster", "direct", "explained", "shots-direct", "shots-explained"}


def test_direct_answers_of_the_diet_are_right_and_explained_ones_often_are_not(world):
    by_question = {
        (question.format(x=disease.name, n=len(world.answers(disease, relation)))): set(world.answers(disease, relation))
        for disease in world.diseases.values()
        for relation in RELATIONS
        for question in relation.questions
    }
    right = {"direct": [], "explained": []}
    for row in itertools.islice(base_diet(world, 0), 4000):
        if row.kind in right:
            question = row.text.split("\n", 1)[0].removeprefix("Question: ")
            answer = row.text.rsplit("Answer:", 1)[1]
            right[row.kind].append(set(answer.split("、")) == by_question[question])
    assert all(right["direct"])
    low, high = world.config.misconceptions
    assert sum(right["explained"]) / len(right["explained"]) == pytest.approx(1 - (low + high) / 2, abs=0.05)


def test_what_is_taught_are_the_responses(world):
    for row in itertools.islice(base_diet(world, 5), 500):
        taught = "".join(row.text[start:end] for start, end in row.taught)
        if row.kind in ("document", "roster"):
            assert taught == row.text
        else:
            assert "Question" not in taught
            assert row.text.endswith(row.text[slice(*row.taught[-1])])
            assert len(row.taught) == (4 if row.kind.startswith("shots") else 1)


def found_in(texts, exam):
    """Problems of the exam that stand in one of the texts.

    Below this share a text asks the same of another disease: same wording, name that ends alike, options of a small pool.
    """
    search = ExactSearch(exam, threshold=0.95)
    for number, text in enumerate(texts):
        search.add(Document(text, f"text:{number}"))
    return {leak.problem_id for leak in search.best().values()}


def test_no_held_out_question_stands_in_any_training_text(world, train, exam):
    diet = [row.text for row in itertools.islice(base_diet(world, 0), 6000)]
    corpus = [*cpt_documents(world, 12), *explained_problems(train), *explained_problems(shot_problems(world))]
    asked = "\n".join([*diet, *corpus])
    assert not [problem.problem_id for problem in exam if problem.text in asked]
    assert found_in([*diet, *corpus], exam) == set()


def test_the_leak_check_would_see_a_held_out_problem(exam):
    assert {problem.problem_id for problem in exam[:3]} <= found_in(explained_problems(exam[:3]), exam)


def test_the_studys_stages_hold_its_exam_out_and_nothing_of_theirs_is_refused(world, train, exam, tmp_path):
    """What a study gives to CPT, curation and RPO passes the guard that a single problem of its exam does not."""
    write_problems(tmp_path / "exam.jsonl", exam)
    held_out = HeldOutConfig(problems=(str(tmp_path / "exam.jsonl"),), **LEAKED)
    shots = shot_problems(world)
    documents = [Document(text, f"corpus:{n}") for n, text in enumerate(cpt_documents(world, 20, 4))]
    prompts = [Preference(one.problem_id, curation_prompt(one, shots), Sample(one.explanation, "")) for one in train]
    texts = [*documents, *problem_texts([*train, *shots]), *preference_texts(prompts, "preferences")]
    refuse_leaks(texts, (), held_out)
    with pytest.raises(UserError, match=exam[3].problem_id):
        refuse_leaks([*texts, *problem_texts([exam[3]])], (), held_out)


def test_corpus_teaches_every_new_disease_and_no_known_one(world):
    texts = cpt_documents(world, 3)
    for disease in world.diseases.values():
        about = [text for text in texts if disease.name in text]
        assert bool(about) is not disease.known
