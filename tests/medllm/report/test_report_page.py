"""The report page, from run folders written as the stages write them to the HTML a reader opens."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from medllm.errors import UserError
from medllm.preferences.records import Preference, Sample
from medllm.report import plots
from medllm.report.page import render, write_report
from medllm.report.results import build_table
from medllm.report.runs import read_cell, read_run, report_from_runs
from medllm.report.study import choose_examples, composition
from tests.written_study import ATTACK, CHANCES, DRAW, SETTINGS, problems, write_study


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(folders) -> str:
    return render(report_from_runs(folders, draw=DRAW))


def copy_run(folder: Path, into: Path) -> Path:
    """A copy of a run folder that a test may break."""
    return Path(shutil.copytree(folder, into / folder.name))


def rewrite(file: Path, change: Callable[[str], str]) -> None:
    """Replace a file's text."""
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")


class References(HTMLParser):
    """Everything a browser would fetch or run: addresses, inline handlers and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "action", "data", "poster", "background", "xlink:href"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data):
        self.text.append(data)


def parse(page: str) -> References:
    parser = References()
    parser.feed(page)
    return parser


def test_the_page_has_every_model_setting_and_score(folders, page):
    study = report_from_runs(folders, draw=DRAW)
    table = build_table(study.cells, draw=DRAW)
    text = "".join(parse(page).text)
    assert [row.model for row in table.rows] == list(CHANCES)
    for row in table.rows:
        assert row.model in text
        for setting, found in row.scores.items():
            assert setting in text
            assert f"{found.score.value:.3f}" in text
            assert f"{found.earned}/{found.possible} points" in text


def test_the_page_asks_nothing_of_the_network(page):
    parser = parse(page)
    assert parser.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in parser.addresses)
    assert "script" not in parser.tags
    assert "link" not in parser.tags
    assert "default-src 'none'" in page
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search("https?://", page)


def test_every_figure_is_a_well_formed_drawing_with_words_and_a_dark_side(page):
    uris = parse(page).addresses
    drawings = [base64.b64decode(uri.split(",", 1)[1]).decode() for uri in uris]
    for drawing in drawings:
        assert ElementTree.fromstring(drawing).tag.endswith("svg")
    everything = "\n".join(drawings)
    for words in (
        *CHANCES,
        *SETTINGS,
        "points earned / points possible",
        "optimizer step",
        "dpo_loss",
        "ground truth only",
        "A (14)",
    ):
        assert html.escape(words, quote=False) in everything
    assert len(re.findall("<figure>", page)) == 7  # scores, slopes, stability, sections, preferences, two training runs
    assert len(uris) == 14
    assert all(re.search(r'alt="[^"]{20,}"', figure) for figure in re.findall(r"<img [^>]*>", page))


def test_what_a_model_wrote_is_shown_as_text_and_never_as_markup(folders, tmp_path):
    folder = copy_run(folders[4], tmp_path)
    rewrite(
        folder / "predictions.jsonl", lambda text: re.sub(r"because \w+", json.dumps(ATTACK)[1:-1].replace("\\", r"\\"), text)
    )
    rewrite(folder / "result.json", lambda text: text.replace('"base"', json.dumps(f"model {ATTACK}")))
    rewrite(folder / "config.yaml", lambda text: f"note: {json.dumps(ATTACK)}\n{text}")
    page = render(report_from_runs([folder], title=ATTACK, draw=DRAW))
    parser = parse(page)
    assert "".join(parser.text).count(ATTACK) >= 5  # title, heading, table, answers, settings
    assert html.escape(ATTACK) in page.replace("&#39;", "&#x27;")
    assert "script" not in parser.tags
    assert not parser.handlers
    assert all(address.startswith("data:") for address in parser.addresses)


def test_the_page_says_what_was_run_and_what_it_is_not(page):
    text = "".join(parse(page).text)
    for words in (
        "engine: jax",
        "commit",
        "numpy",
        "research software, not medical advice; a score on an exam is not clinical safety",
        "1 min 15 s",
        "1,234",
        "3.25 pairs/s",
        "96",
        "learning_rate: 0.0001",
        "患者",
        "because 118",
        "arXiv 2504.18080",
        "0.868",
    ):
        assert words in text


def test_the_same_study_gives_the_same_bytes(folders, page):
    assert render(report_from_runs(folders, draw=DRAW)) == page


def test_a_page_is_written_whole_or_not_at_all(folders, tmp_path):
    study = report_from_runs(folders, draw=DRAW)
    written = write_report(tmp_path / "deep" / "report.html", study)
    assert written.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [file.name for file in written.parent.iterdir()] == ["report.html"]
    broken = [study.cells[0], study.cells[0]]
    with pytest.raises(UserError, match="given twice"):
        write_report(tmp_path / "other" / "report.html", type(study)(title="", engine="", environment={}, cells=tuple(broken)))
    assert not (tmp_path / "other").exists()


def test_evaluations_alone_make_a_page(folders):
    study = report_from_runs(folders[3:4], draw=DRAW)
    page = render(study)
    assert "base" in page
    assert "Does explaining cost points?" not in page
    assert study.preferences == {}


def test_questions_are_left_out_where_the_problem_file_is_gone(folders, tmp_path):
    folder = copy_run(folders[3], tmp_path)
    rewrite(folder / "config.yaml", lambda text: text.replace("exam.jsonl", "gone.jsonl"))
    study = report_from_runs([folder], draw=DRAW)
    assert study.kinds == {}
    assert "The problem file is not at hand" in render(study)


def test_examples_are_problems_the_models_part_on_and_both_extremes(folders):
    study = report_from_runs(folders, draw=DRAW)
    shares = [sum(response.correct for response in example.responses) for example in study.examples]
    assert len(shares) == 6
    assert shares[0] == 5
    assert all(len(example.responses) == 10 for example in study.examples)
    known = {problem.problem_id: problem for problem in problems()}
    alike = tuple(cell for cell in study.cells if cell.model == "base")[:1]
    ends = choose_examples(alike, known, {})
    assert [example.responses[0].correct for example in ends] == [True, False]


def test_preference_data_are_counted_by_what_pairs_they_give():
    good, bad = Sample("t", "a"), Sample("t", "b")
    counted = composition(
        [
            Preference("1", "q", good, (good, good), (bad,)),
            Preference("2", "q", good, (good,)),
            Preference("3", "q", good, (), (bad,)),
            Preference("4", "q", good),
        ]
    )
    assert (counted.both, counted.only_chosen, counted.only_rejected, counted.neither) == (1, 1, 1, 1)
    assert (counted.chosen, counted.rejected, counted.problems) == (3, 2, 4)
    assert counted.right_counts == {0: 2, 1: 1, 2: 1}


def test_labels_of_a_slope_chart_keep_their_distance():
    placed = plots._spread([0.80, 0.80, 0.81, 0.40], 0.05)
    assert placed == pytest.approx([0.80 + 0.01 / 3 - 0.05, 0.80 + 0.01 / 3, 0.80 + 0.01 / 3 + 0.05, 0.40])


def test_a_model_called_by_its_path_keeps_both_ends_in_a_drawing():
    path = "models/Qwen2.5-72B + runs/2026-11-20-continued-pretraining/adapter"
    assert plots._shortened(path).startswith("models/Qwen2.5")
    assert plots._shortened(path).endswith("training/adapter")
    assert len(plots._shortened(path)) < 40
    assert plots._shortened("CPT + RPO") == plots._wrapped("CPT + RPO") == "CPT + RPO"
    assert max(map(len, plots._wrapped(path).splitlines())) <= 30


def test_dollar_signs_and_underscores_in_a_name_are_drawn_as_they_are(folders):
    study = report_from_runs(folders[3:5], draw=DRAW)
    cells = [type(cell)(r"$\frac{ a_1", cell.setting, cell.results) for cell in study.cells]
    drawing = plots.scores(build_table(cells, draw=DRAW))
    assert r"$\frac{ a_1" in drawing.light


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "result.json", "predictions.jsonl"])
def test_a_file_missing_from_a_run_is_named(folders, tmp_path, name):
    folder = copy_run(folders[3], tmp_path)
    (folder / name).unlink()
    with pytest.raises(UserError, match=re.escape(str(folder / name))):
        report_from_runs([folder])


def test_a_missing_preference_file_or_folder_is_named(folders, tmp_path):
    curated = copy_run(folders[1], tmp_path)
    (curated / "preferences.jsonl").unlink()
    with pytest.raises(UserError, match=re.escape(str(curated / "preferences.jsonl"))):
        report_from_runs([curated, folders[3]])
    with pytest.raises(UserError, match="nowhere: no such run folder"):
        report_from_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="at least one 'medllm evaluate'"):
        report_from_runs(folders[:1])
    with pytest.raises(UserError, match=r"at least one 'medllm evaluate'.*given: none"):
        report_from_runs([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "bake"}, "'stage' is 'bake'; a report takes cpt, curate, rpo, evaluate"),
        ({"model": None}, "'model' is missing or no text"),
        ({"score": {}}, "holds no per-problem rows"),
        (
            {"score": {"results": [{"problem_id": "1", "correct": "yes", "points": 1}]}},
            r"results\[0\]: 'correct' is missing or not true",
        ),
        ({"score": {"results": ["1"]}}, r"results\[0\]: 'problem_id' is missing"),
    ],
)
def test_an_odd_result_is_refused_with_its_place(folders, tmp_path, change, message):
    file = copy_run(folders[3], tmp_path) / "result.json"
    rewrite(file, lambda text: json.dumps(json.loads(text) | change))
    with pytest.raises(UserError, match=message):
        report_from_runs([file.parent])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", "{", r"result\.json: not JSON"),
        ("result.json", "[]", "a JSON object was expected"),
        ("config.yaml", "a: [", "not YAML"),
        ("config.yaml", "- a", "expected settings by name"),
        ("metrics.jsonl", '{"loss": 1}', r"metrics\.jsonl:1: expected numbers"),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}', r"metrics\.jsonl:1: expected numbers"),
        ("metrics.jsonl", "nonsense", r"metrics\.jsonl:1: not JSON"),
    ],
)
def test_a_file_that_is_not_what_its_stage_writes_is_named(folders, tmp_path, name, content, message):
    folder = copy_run(folders[0], tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_run(folder)


def test_a_cell_read_back_is_the_cell_that_was_scored(folders):
    cell = read_cell(read_run(folders[3]), folders[3])
    assert (cell.model, cell.setting) == ("base", "3-shot")
    stored = json.loads((folders[3] / "result.json").read_text(encoding="utf-8"))["score"]
    assert sum(result.points for result in cell.results if result.correct) == stored["points"]
    assert [result.problem_id for result in cell.results] == [problem.problem_id for problem in problems()]


def test_two_folders_of_one_name_are_two_sets_of_preference_data(folders, tmp_path):
    again = copy_run(folders[1], tmp_path)
    kept = report_from_runs([folders[1], again, *folders[3:5]], draw=DRAW).preferences
    assert list(kept) == [f"{folders[1].parent.name}/curate", f"{tmp_path.name}/curate"]
    assert report_from_runs([folders[1], *folders[3:5]], draw=DRAW).preferences.keys() == {"curate"}
