"""Documents from files and folders, and what is refused on the way."""

from __future__ import annotations

import json
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from medllm.corpus.documents import Document, load_documents
from medllm.errors import UserError
from medllm.exam.loaders import write_problems
from medllm.exam.problem import Problem
from medllm.stage_config import CorpusConfig

PROBLEM = Problem("110A1", "問", ("一", "二"), ("b",), explanation="解説", year=2016)


def found(*paths, **settings) -> list[Document]:
    return list(load_documents(CorpusConfig(documents=tuple(map(str, paths)), **settings)).documents)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def rows(*texts, column="text"):
    return "".join(json.dumps({column: text}, ensure_ascii=False) + "\n" for text in texts)


def test_jsonl_lines_are_documents_with_their_line_as_source(tmp_path):
    file = write(tmp_path / "a.jsonl", "\ufeff" + rows("一つ目", "二つ目\u2028続き") + "\n" + rows("三つ目"))
    assert found(file) == [
        Document("一つ目", f"{file}:1"),
        Document("二つ目\u2028続き", f"{file}:2"),
        Document("三つ目", f"{file}:4"),
    ]


LOOKS_LIKE_SOMETHING_ELSE = ["2018-02-10", "2018-02-10T12:00:00Z", "007", "1e3", "true", "null", "NaN", "12:30"]


def test_a_text_stays_the_text_it_is_whatever_it_looks_like(tmp_path):
    given = [{"text": text} for text in LOOKS_LIKE_SOMETHING_ELSE]
    write(tmp_path / "array.json", json.dumps(given, indent=1))
    write(tmp_path / "lines.json", rows(*LOOKS_LIKE_SOMETHING_ELSE))
    write(tmp_path / "lines.jsonl", rows(*LOOKS_LIKE_SOMETHING_ELSE))
    write(tmp_path / "cells.csv", "text\n" + "\n".join(LOOKS_LIKE_SOMETHING_ELSE) + "\n")
    plain = pa.table({"text": LOOKS_LIKE_SOMETHING_ELSE})
    pq.write_table(plain, tmp_path / "plain.parquet")
    pq.write_table(pa.table({"text": plain["text"].dictionary_encode()}), tmp_path / "dictionary.parquet")
    pq.write_table(pa.table({"text": plain["text"].cast(pa.large_string())}), tmp_path / "large.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert [document.text for document in found(file)] == LOOKS_LIKE_SOMETHING_ELSE, file.name


def test_an_arrow_file_whose_texts_lead_out_of_it_is_refused(tmp_path):
    Dataset.from_list([{"text": "本文"}, {"text": "別"}]).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    good, damaged = (struct.pack("<3i", 0, end, 9) for end in (6, 2**30))
    data = file.read_bytes()
    assert data.count(good) == 1
    file.unlink()
    file.write_bytes(data.replace(good, damaged))
    with pytest.raises(UserError, match="cannot read"):
        found(tmp_path / "set")


def test_a_json_file_may_hold_one_document(tmp_path):
    file = write(tmp_path / "a.json", json.dumps({"text": "一つ", "title": "題"}, indent=1))
    assert found(file) == [Document("一つ", f"{file}:1")]


NO_LINE_ENDS = "一\u2028二\u2029三\u0085四\x0b五\x0c六\x1c七\x1e八"


def test_a_line_ends_at_cr_and_lf_alone(tmp_path):
    plain, quoted = f"{NO_LINE_ENDS}\n", f'題,"{NO_LINE_ENDS}"\n'
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "a.jsonl").write_text(rows(NO_LINE_ENDS, "次"), encoding="utf-8", newline=end)
        (tmp_path / "a.csv").write_text(f"title,text\n{quoted}題,{NO_LINE_ENDS}\n", encoding="utf-8", newline=end)
        (tmp_path / "a.txt").write_text(plain, encoding="utf-8", newline=end)
        (tmp_path / "a.json").write_text(rows(NO_LINE_ENDS, "次"), encoding="utf-8", newline=end)
        assert found(tmp_path / "a.jsonl") == [
            Document(NO_LINE_ENDS, f"{tmp_path / 'a.jsonl'}:1"),
            Document("次", f"{tmp_path / 'a.jsonl'}:2"),
        ]
        assert found(tmp_path / "a.csv") == [Document(NO_LINE_ENDS, f"{tmp_path / 'a.csv'}:{line}") for line in (2, 3)]
        assert [document.text for document in found(tmp_path / "a.txt", tmp_path / "a.json")] == [plain, NO_LINE_ENDS, "次"]


def test_a_text_file_is_one_document(tmp_path):
    file = write(tmp_path / "a.txt", "一行目\n\n二行目\n")
    assert found(file) == [Document("一行目\n\n二行目\n", f"{file}:1")]


def test_parquet_csv_json_arrow_and_saved_datasets_hold_the_same_documents(tmp_path):
    dataset = Dataset.from_dict({"id": [1, 2], "body": ["一つ目", "二つ目"]})
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    dataset.to_csv(str(tmp_path / "a.csv"))
    dataset.to_json(str(tmp_path / "a.json"), force_ascii=False)
    dataset.save_to_disk(str(tmp_path / "saved"))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for place in (tmp_path / "a.parquet", tmp_path / "a.csv", tmp_path / "a.json", tmp_path / "saved", arrow):
        first = 2 if place.suffix == ".csv" else 1  # a line of the file, its header counted; elsewhere a row
        assert found(place, text_column="body") == [
            Document("一つ目", f"{place}:{first}"),
            Document("二つ目", f"{place}:{first + 1}"),
        ]


def test_reading_a_table_leaves_the_screen_and_the_users_cache_alone(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = write(tmp_path / "a.json", '{"text": "x"}\n')
    capfd.readouterr()
    assert found(file) == [Document("x", f"{file}:1")]
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [file]


def test_a_csv_cell_may_be_as_long_as_a_document(tmp_path):
    (tmp_path / "long.csv").write_text("text\n" + "長" * 200_000 + "\n", encoding="utf-8")
    assert [len(document.text) for document in load_documents(CorpusConfig(documents=(str(tmp_path),))).documents] == [200_000]


def test_every_split_of_a_saved_dataset_is_read(tmp_path):
    place = tmp_path / "splits"
    splits = {name: Dataset.from_dict({"text": [name]}) for name in ("train", "extra")}
    DatasetDict(splits).save_to_disk(str(place))
    assert {(document.text, document.source) for document in found(place)} == {
        ("train", f"{place}/train:1"),
        ("extra", f"{place}/extra:1"),
    }


def test_a_folder_is_read_whole_in_the_order_of_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a.jsonl", rows("a", "", "  "))
    write(tmp_path / "sub" / "c.TXT", "c")
    write(tmp_path / "README.md", "not a document")
    write(tmp_path / ".hidden" / "d.txt", "d")
    corpus = load_documents(CorpusConfig(documents=(str(tmp_path),)))
    assert [document.text for document in corpus.documents] == ["a", "b", "c"]
    assert corpus.skipped == {"empty text": 2, "file of another kind": 1}


def test_explained_problems_become_documents_in_the_curation_template(tmp_path):
    file = tmp_path / "problems.jsonl"
    write_problems(
        file, [PROBLEM, Problem("110A2", "問二", ("一", "二"), ("a",)), Problem("n1", "計算", (), ("5",), explanation="式")]
    )
    corpus = load_documents(CorpusConfig(problems=(str(file),)))
    assert [document.text for document in corpus.documents] == [
        "Question: 問\na: 一\nb: 二\n Explanation:解説\n Answer:b",
        "Question: 計算\n Explanation:式\n Answer:5",
    ]
    assert corpus.documents[0].source == f"{file}:1"
    assert corpus.skipped == {"problem without a verified explanation": 1}


def test_a_held_out_exam_never_enters_the_corpus(tmp_path):
    file = tmp_path / "problems.jsonl"
    write_problems(file, [PROBLEM, Problem("112A1", "問", ("一",), ("a",), year=2018)])
    with pytest.raises(UserError, match=r"problems\.jsonl:2: problem 112A1 is of 2018, but only exams up to 2017"):
        load_documents(CorpusConfig(problems=(str(file),)))
    assert load_documents(CorpusConfig(problems=(str(file),), problems_until=2018)).documents


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", rows("x") + "{broken\n", r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '["x"]\n', r"a\.jsonl:1: expected a JSON object"),
        ("a.jsonl", rows("x", column="body"), r"a\.jsonl:1: no column 'text'; the columns are: body; .*--corpus\.text_column"),
        ("a.jsonl", rows(3), r"a\.jsonl:1: column 'text' holds int, not text"),
        ("a.csv", "id,body\n1,x\n", r"a\.csv: no column 'text'; the columns are: id, body"),
        ("a.parquet", "not parquet", r"a\.parquet: not a readable Parquet file"),
        ("a.json", "{", r"a\.json: not JSON \(Expecting property name.*\); expected JSON"),
        ("a.json", rows("x") + "{broken\n", r"a\.json:2: not JSON"),
        ("a.json", '["x"]', r"a\.json:1: expected a JSON object, found str"),
        ("a.json", '[{"text": "\\ud800"}]', r"a\.json: holds half a character"),
        ("a.json", '[{"text": 2018}]', r"a\.json:1: column 'text' holds int, not text"),
        ("a.arrow", "not arrow", r"a\.arrow: `datasets` cannot read this file"),
        ("a.docx", "x", r"a\.docx: documents cannot be read from '\.docx' files"),
        ("a.txt", " \n", r"the corpus is empty .*skipped 1 × empty text"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_place(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        found(write(tmp_path / name, content))


def test_a_parquet_file_without_the_column_is_refused(tmp_path):
    Dataset.from_dict({"body": ["x"]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text'; the columns are: body"):
        found(tmp_path / "a.parquet")


def test_missing_foreign_and_absent_input_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        found(tmp_path / "nowhere")
    shift_jis = tmp_path / "a.txt"
    shift_jis.write_bytes("症例".encode("shift_jis"))
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8"):
        found(shift_jis)
    with pytest.raises(UserError, match=r"the corpus is empty \(nothing was given\)"):
        found()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    write(damaged / "state.json", "{}")
    with pytest.raises(UserError, match="`datasets` cannot read this folder"):
        found(damaged)
