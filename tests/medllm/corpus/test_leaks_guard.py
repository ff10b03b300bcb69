"""What a study holds out is refused by the three stages that would learn it, by name and place, and allowed only by name."""

from __future__ import annotations

import dataclasses
import json
import random
import re

import pytest

import medllm.stages.cpt
import medllm.stages.curate
import medllm.stages.rpo
from medllm.config import ModelConfig
from medllm.corpus.leaks.changes import all_at_once, as_text
from medllm.corpus.leaks.derivations import derived
from medllm.corpus.leaks.made_up import made_up_problems, made_up_texts
from medllm.errors import UserError
from medllm.exam.loaders import write_problems
from medllm.exam.problem import Problem
from medllm.preferences.records import Preference, Sample, write_preferences
from medllm.stage_config import CorpusConfig, CptConfig, CurateConfig, HeldOutConfig, RpoConfig

MODEL = ModelConfig("no-model")


class Opened(Exception):
    """The stage went on to its model: nothing was refused."""


@pytest.fixture(scope="module")
def exam():
    return [Problem(f"112A{number}", one.text, one.choices, one.answer) for number, one in enumerate(made_up_problems(40), 1)]


@pytest.fixture(autouse=True)
def files(tmp_path, exam, monkeypatch):
    """An exam and what is trained on, in the working folder; a model that is never opened."""
    monkeypatch.chdir(tmp_path)
    write_problems("exam.jsonl", exam)
    write_problems("train.jsonl", [explained(one) for one in made_up_problems(12, seed=1)])
    write_documents(made_up_texts(5))
    write_preferences("preferences.jsonl", [preference(one) for one in made_up_problems(4, seed=1)])

    def opened(*_):
        raise Opened

    for stage in (medllm.stages.cpt, medllm.stages.rpo):
        monkeypatch.setattr(stage, "open_trainer", lambda *_: type("Model", (), {"tokenizer": property(opened)})())
    monkeypatch.setattr(medllm.stages.rpo, "check_handover", lambda _: None)
    monkeypatch.setattr(medllm.stages.curate, "open_engine", opened)


def explained(problem, problem_id=None):
    return Problem(
        problem_id or problem.problem_id, problem.text, problem.choices, problem.answer, explanation="その通りである。"
    )


def preference(problem, response="その通りである。"):
    return Preference(problem.problem_id, as_text(problem, random.Random(0)), Sample(response, "a"))


def write_documents(texts, name="corpus.jsonl"):
    with open(name, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def changed(problem):
    """A copy that holds little of it word for word."""
    return all_at_once(problem, 0.15, random.Random(problem.problem_id))


def held_out(*allow):
    return HeldOutConfig(problems=("exam.jsonl",), allow=allow)


def said(stage, *given, **settings):
    """Why a stage refuses; nothing where it goes on to its model."""
    try:
        stage(*given, **settings)
    except UserError as refusal:
        return str(refusal)
    except Opened:
        return ""
    raise AssertionError("the stage ended before its model")


CORPUS = CorpusConfig(documents=("corpus.jsonl",))


def cpt(config, corpus=CORPUS):
    medllm.stages.cpt.run_cpt(CptConfig(MODEL, "run", corpus, held_out=config))


def curate(config, **settings):
    medllm.stages.curate.run_curate(CurateConfig(MODEL, "run", ("train.jsonl",), shot_count=1, held_out=config, **settings))


def rpo(config):
    medllm.stages.rpo.run_rpo(RpoConfig(MODEL, "run", "preferences.jsonl", held_out=config))


@pytest.mark.parametrize("stage", [cpt, curate, rpo])
def test_what_holds_nothing_of_the_exam_passes(stage):
    assert said(stage, held_out()) == ""


def leaked(stage, copy):
    """Put a copy of the exam's seventh problem where the stage reads; the place that it must name."""
    if stage is cpt:
        write_documents([*made_up_texts(3), f"{made_up_texts(1, seed=8)[0]}\n{as_text(copy, random.Random(0))}"])
        return "corpus.jsonl:4"
    if stage is curate:
        write_problems("train.jsonl", [*map(explained, made_up_problems(3, seed=1)), explained(copy, "110A1")])
        return "train.jsonl:4"
    own = made_up_problems(4, seed=1)
    write_preferences("preferences.jsonl", [*map(preference, own[:2]), preference(copy), preference(own[3])])
    return "preferences.jsonl:3"


@pytest.mark.parametrize("stage", [cpt, curate, rpo])
@pytest.mark.parametrize("change", [lambda problem: problem, changed], ids=["word for word", "changed"])
def test_a_copy_is_refused_by_place_problem_and_kind_and_allowed_by_name_alone(stage, change, exam):
    place = leaked(stage, change(exam[6]))
    refusal = said(stage, held_out())
    assert refusal.startswith(f"{place}: holds problem 112A7 of exam.jsonl:7 (")
    assert ("alike" if change is changed else "word for word") in refusal.split(")")[0]
    assert "\n" not in refusal
    for allowed in ("112A7", place, place.split(":")[0]):
        assert said(stage, held_out(allowed)) == ""
    assert "112A7" in said(stage, held_out("112A8"))


def test_what_is_allowed_at_one_place_is_refused_at_another(exam):
    write_documents([as_text(exam[0], random.Random(0)), as_text(exam[0], random.Random(0))])
    assert re.search(r"corpus\.jsonl:2: holds problem 112A1", said(cpt, held_out("corpus.jsonl:1")))


def test_a_name_that_allows_nothing_is_refused():
    assert re.search("'112Z1'", said(cpt, held_out("112Z1")))


def test_a_held_out_problem_among_explained_problems_of_a_corpus_is_refused(exam):
    write_problems("train.jsonl", [explained(exam[2], "100A1")])
    assert re.search(
        r"train\.jsonl:1: holds problem 112A3",
        said(cpt, held_out(), CorpusConfig(("corpus.jsonl",), problems=("train.jsonl",))),
    )


def test_a_held_out_shot_is_refused(exam):
    write_problems("shots.jsonl", [explained(exam[4], "100A1")])
    assert re.search(r"shots\.jsonl:1: holds problem 112A5", said(curate, held_out(), shots="shots.jsonl"))


def test_a_model_that_recites_the_exam_is_refused_by_its_response(exam):
    own = made_up_problems(4, seed=1)
    write_preferences("preferences.jsonl", [preference(own[0], as_text(exam[9], random.Random(0)))])
    assert re.search(r"preferences\.jsonl:1: holds problem 112A10", said(rpo, held_out()))


def test_responses_that_each_hold_a_piece_of_a_problem_do_not_hold_it_together(exam):
    own, held = made_up_problems(4, seed=1)[0], exam[9]
    question, *options = as_text(held, random.Random(0)).split("\n")
    part = -(-len(question) // 5)
    samples = [Sample(text, "b") for text in (*(question[at : at + part] for at in range(0, len(question), part)), *options)]
    write_preferences("preferences.jsonl", [dataclasses.replace(preference(own), rejected=samples)])
    with pytest.raises(Opened):
        rpo(held_out())
    whole = Sample("".join(sample.text for sample in samples), "b")
    write_preferences("preferences.jsonl", [dataclasses.replace(preference(own), rejected=[whole])])
    assert re.search(r"preferences\.jsonl:1: holds problem 112A10", said(rpo, held_out()))


# --- sets made from an exam ------------------------------------------------------------------------------------------------


def of_years(*years):
    return [Problem(f"{year - 1906}A1", "どれか。", ("a", "b"), ("a",), year=year) for year in years]


def test_a_set_made_from_the_exam_is_refused_by_its_name_with_the_reason(exam):
    write_documents(made_up_texts(2), "medrect-train.jsonl")
    corpus = CorpusConfig(documents=("medrect-train.jsonl",))
    assert re.search(
        r"medrect-train\.jsonl: is MedRECT, training set .* 2018-2023; .* 2018 is held out", said(cpt, held_out(), corpus)
    )
    assert said(cpt, held_out("medrect-train.jsonl"), corpus) == ""


def test_a_set_is_known_by_its_fields_where_its_name_was_changed(tmp_path):
    row = {"id": "112A1", "question": "?", "choices": {"a": "x"}, "answer": ["a"], "case_classification": {"type": "none"}}
    (tmp_path / "renamed.json").write_text(json.dumps([row], indent=1))
    (found,) = derived([str(tmp_path)], of_years(2020, 2026))
    assert (found.known_by, found.years) == ("by its fields", (2020,))
    assert found.name.startswith("MedRECT source questions")


@pytest.mark.parametrize(("years", "sets"), [((2018,), 1), ((2017, 2026), 0), ((2019, 2021), 1)])
def test_only_the_years_that_a_set_was_made_from_count(tmp_path, years, sets):
    (tmp_path / "jmle-2018-2025-train.jsonl").write_text("{}")
    assert len(derived([str(tmp_path)], of_years(*years))) == sets


def test_another_exam_is_no_matter(tmp_path):
    (tmp_path / "igakuqa.jsonl").write_text("{}")
    assert derived([str(tmp_path)], [Problem("anatomy-6", "どれか。", ("a", "b"), ("a",))]) == []
