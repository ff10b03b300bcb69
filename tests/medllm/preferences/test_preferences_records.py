"""The preference file: what is written comes back, what is broken is named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medllm.errors import UserError
from medllm.preferences.records import Preference, Sample, read_preferences, write_preferences

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
samples = st.builds(
    Sample,
    text=text,
    answer=text,
    seed=st.none() | st.integers(0, 9),
    settings=st.dictionaries(text, st.none() | st.booleans() | st.integers() | text, max_size=2),
)
preferences = st.lists(
    st.builds(
        Preference,
        problem_id=text,
        prompt=text,
        ground_truth=samples,
        chosen=st.lists(samples, max_size=2).map(tuple),
        rejected=st.lists(samples, max_size=2).map(tuple),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda preference: preference.problem_id,
)

ROW = {
    "problem_id": "110A1",
    "prompt": "Question: 問\n Explanation:",
    "ground_truth": {"text": "解説\n Answer:a", "answer": "a"},
    "chosen": [],
    "rejected": [{"text": "誤り\n Answer:b", "answer": "b", "seed": 3, "settings": {"temperature": 1.0}}],
}


def lines(tmp_path, *rows):
    file = tmp_path / "preferences.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return file


@settings(deadline=None)
@given(preferences)
def test_what_is_written_is_read_back(tmp_path_factory, written):
    file = tmp_path_factory.mktemp("preferences") / "preferences.jsonl"
    write_preferences(file, written)
    assert read_preferences(file) == written


def test_japanese_stays_readable_in_the_file(tmp_path):
    file = tmp_path / "preferences.jsonl"
    write_preferences(file, [Preference("110A1", "問題", Sample("解説", "a"))])
    assert "解説" in file.read_text(encoding="utf-8")


def test_seed_and_settings_are_optional_and_a_lone_ground_truth_is_kept(tmp_path):
    alone = {**ROW, "problem_id": "110A2", "rejected": []}
    first, second = read_preferences(lines(tmp_path, ROW, "", alone))
    assert first.ground_truth == Sample("解説\n Answer:a", "a", None, {})
    assert first.rejected == (Sample("誤り\n Answer:b", "b", 3, {"temperature": 1.0}),)
    assert second.chosen == second.rejected == ()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "preferences.jsonl"
    write_preferences(file, [Preference("110A1", "p", Sample("t", "a"))])
    before = file.read_text()
    with pytest.raises(TypeError):
        write_preferences(file, [Preference("110A2", "p", Sample("t", "a", settings={"bad": object()}))])
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]


def without(name):
    return {key: value for key, value in ROW.items() if key != name}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"problem_id": '], r"preferences\.jsonl:1: not JSON"),
        ([ROW, "[1]"], r":2: expected a JSON object"),
        ([without("ground_truth")], r":1: 'ground_truth' is missing \(there are: problem_id, prompt, chosen, rejected\)"),
        ([without("chosen")], r":1: 'chosen' is missing"),
        ([ROW, ROW], r":2: problem 110A1 was already in .*:1;"),
        ([{**ROW, "prompt": 3}], r":1: 'prompt' must be text, not int"),
        ([{**ROW, "chosen": {"text": ""}}], r":1: 'chosen' must be a list"),
        ([{**ROW, "chosen": ["text"]}], r":1: chosen\[0\]: expected an object"),
        ([{**ROW, "rejected": [{"text": "t"}]}], r":1: rejected\[0\]: 'answer' is missing"),
        ([{**ROW, "ground_truth": {"text": "t", "answer": "a", "seed": "1"}}], r":1: ground_truth: 'seed' must be"),
        ([{**ROW, "ground_truth": {"text": "t", "answer": "a", "settings": []}}], r":1: ground_truth: 'settings' must be"),
        ([""], r"the preference file is empty"),
    ],
)
def test_a_broken_file_is_refused_with_the_place(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_preferences(lines(tmp_path, *rows))


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such preference file"):
        read_preferences(tmp_path / "nowhere.jsonl")
    shift_jis = tmp_path / "sjis.jsonl"
    shift_jis.write_bytes("解説".encode("shift_jis"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_preferences(shift_jis)
