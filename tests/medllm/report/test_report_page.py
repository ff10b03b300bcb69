"""The report page, from run folders written as the stages write them to the HTML a reader opens."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
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
from medllm.exam.evaluation import prompt_of
from medllm.journal import digest
from medllm.preferences.records import Preference, Sample
from medllm.report import labels, plots, tables
from medllm.report.page import render, write_report
from medllm.report.results import build_table
from medllm.report.runs import read_cell, read_run, report_from_runs
from medllm.report.study import composition
from medllm.stage_config import EvaluateConfig
from tests.written_study import ATTACK, CHANCES, DRAW, MODEL, SETTINGS, problems, shots, write_study


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
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in parser.addresses)
    assert "link" not in parser.tags
    assert "default-src 'none'" in page
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search("https?://", page)


def test_the_page_runs_one_script_known_by_its_hash_which_makes_no_markup(page):
    *data, script = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.S)
    assert parse(page).tags.count("script") == len(data) + 1 == 3
    for words, text in data:
        assert words.startswith(' type="application/octet-stream"')
        assert re.fullmatch("[A-Za-z0-9+/]+=*", text)
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    (policy,) = re.findall('Content-Security-Policy" content="([^"]*)"', page)
    assert f"script-src 'sha256-{digest}';" in policy
    assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy
    assert not re.search(r"unsafe-eval|script-src[^;]*unsafe", policy)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|\bFunction\b|DOMParser", script[1])


def unpacked(study) -> dict:
    """What the page's script reads, with the texts put beside their questions."""
    packed = study.questions.packed()
    index, *blocks = (json.loads(gzip.decompress(base64.b64decode(one))) for one in (packed.index, *packed.blocks))
    assert [len(block) for block in blocks[:-1]] == [index["block"]] * (len(blocks) - 1)
    texts = [text for block in blocks for text in block]
    return index | {"questions": [facts | text for facts, text in zip(index["questions"], texts, strict=True)]}


def test_every_question_and_every_answer_travel_with_the_page_and_the_examples_once(folders):
    study = report_from_runs(folders, draw=DRAW)
    packed = unpacked(study)
    assert packed["models"] == list(CHANCES)
    assert [(packed["models"][model], setting) for model, setting, _ in packed["cells"]] == [
        (model, setting) for model in CHANCES for setting in SETTINGS
    ]
    exam = problems()
    assert [one["id"] for one in packed["questions"]] == [problem.problem_id for problem in exam]
    for place, folder in enumerate(folders[3:]):
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        said = [(one["answers"][place][0], one["answers"][place][2]) for one in packed["questions"]]
        assert said == [(line["prediction"], line["explanation"]) for line in lines]
    config = EvaluateConfig(MODEL, "run", (), template="igakuqa", explanation=True)
    for form, explanation in ((0, False), (1, True)):
        shown = packed["forms"][form] + packed["questions"][7]["asked"][form]
        assert shown == prompt_of(exam[7], shots(), dataclasses.replace(config, explanation=explanation))


def test_a_prompt_that_is_not_the_one_that_was_answered_is_not_shown(folders, tmp_path):
    folder = copy_run(folders[4], tmp_path)
    line = {"problem_id": "118A0", "sample": 0, "prompt": "0123456789abcdef", "text": "", "tokens": [], "finish": "length"}
    (folder / "answers.journal").write_text(json.dumps(line | {"stopped": ""}) + "\n")
    assert unpacked(report_from_runs([folder], draw=DRAW))["cells"] == [[0, SETTINGS[1], -1]]
    shown = prompt_of(problems()[0], shots(), EvaluateConfig(MODEL, "run", (), template="igakuqa", explanation=True))
    (folder / "answers.journal").write_text(json.dumps(line | {"stopped": "", "prompt": digest(shown)}) + "\n")
    assert unpacked(report_from_runs([folder], draw=DRAW))["cells"] == [[0, SETTINGS[1], 0]]


def test_each_model_is_called_by_as_much_of_its_path_as_tells_it_apart():
    names = ("m/Qwen2.5-72B", "m/Qwen2.5-72B + runs/cpt/adapter", "x/runs/a/merged", "y/runs/a/merged", "GPT-4", "a/b", "c/b")
    short = {"x/runs/a/merged": "x/runs/a", "y/runs/a/merged": "y/runs/a", "a/b": "a/b", "c/b": "c/b", "GPT-4": "GPT-4"}
    assert labels.short_names(names) == {
        "m/Qwen2.5-72B": "Qwen2.5-72B",
        "m/Qwen2.5-72B + runs/cpt/adapter": "Qwen2.5-72B + cpt",
        **short,
    }


def test_paths_of_models_are_shortened_on_the_page_and_said_in_full_below(folders, tmp_path):
    copies = [copy_run(folder, tmp_path) for folder in folders[3:7]]
    for copy, model in zip(copies, ("base", "base", "CPT", "CPT"), strict=True):
        rewrite(copy / "result.json", lambda text, model=model: text.replace(f'"{model}"', f'"runs/{model}/merged"'))
    study = report_from_runs(copies, previous={"runs/CPT/merged": "runs/base/merged"}, draw=DRAW)
    assert [(row.model, row.previous) for row in study.table().rows] == [("base", None), ("CPT", "base")]
    text = "".join(parse(render(study)).text)
    assert "runs/CPT/merged" in text[text.index("What was run") + 100 :]
    assert "runs/CPT/merged" not in text[text.index("Scores") : text.index("What each stage cost")]


def test_the_answer_comes_first_in_one_sentence(folders, page):
    text = "".join(parse(page).text)
    rows = {row.model: row for row in report_from_runs(folders, draw=DRAW).table().rows}
    best = max(rows.values(), key=lambda row: row.scores[SETTINGS[1]].score.value)
    (sentence,) = re.findall('<p class="answer">(.*)</p>', page)
    assert sentence.startswith(best.model)
    assert tables.interval(best.stability, True) in sentence
    assert sentence.count(".") > sentence.count(". ") == 0
    assert (
        text.index(sentence) < text.index("Compared with") < text.index("where explaining costs") < text.index("Score in each")
    )


def test_the_page_says_how_to_make_it_again(folders, tmp_path):
    copies = [copy_run(folder, tmp_path) for folder in folders[2:4]]
    commands = ["/usr/bin/medllm", "rpo", "--run", "my runs/rpo"], ["medllm", "evaluate"]
    for copy, command in zip(copies, commands, strict=True):
        rewrite(copy / "environment.json", lambda text, command=command: json.dumps(json.loads(text) | {"command": command}))
    page = render(report_from_runs(copies, draw=DRAW))
    assert html.escape("medllm rpo --run 'my runs/rpo'\nmedllm evaluate\n").replace("&#x27;", "&#39;") in page
    assert "curate/preferences.jsonl" in page[page.index('id="contamination"') :]


def test_every_figure_is_a_well_formed_drawing_with_words_and_a_dark_side(page):
    uris = [address for address in parse(page).addresses if not address.startswith("#")]
    drawings = [base64.b64decode(uri.split(",", 1)[1]).decode() for uri in uris]
    for drawing in drawings:
        assert ElementTree.fromstring(drawing).tag.endswith("svg")
    everything = "\n".join(drawings)
    figures = ("points earned / points possible", "optimizer step", "dpo_loss", "ground truth only", "A (14)")
    for words in (*CHANCES, *SETTINGS, *figures):
        assert html.escape(words, quote=False) in everything
    # Scores, slopes, stability, sections, preferences, two training runs, and the flows of five models.
    assert len(re.findall("<figure>", page)) == 7 + 5
    assert len(uris) == 14
    ink = {plots.INK, plots.FAINT}
    for dark, light in zip(drawings[::2], drawings[1::2], strict=True):
        assert [ink & set(re.findall(r"#\w{6}", side)) for side in (dark, light)] == [set(), ink]
        assert re.sub(r": #\w{6}", "", dark) == re.sub(r": #\w{6}", "", light), "they show the same"
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
    assert "".join(parser.text).count(ATTACK) >= 4  # title, heading, table, settings
    assert html.escape(ATTACK) in page.replace("&#39;", "&#x27;")
    assert parser.tags.count("script") == 3
    assert not parser.handlers
    assert all(address.startswith(("data:", "#")) for address in parser.addresses)


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
    assert "text" not in unpacked(study)["questions"][0]
    assert study.questions.flips == {}


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
    placed = labels.spread([0.80, 0.80, 0.81, 0.40], 0.05)
    assert placed == pytest.approx([0.80 + 0.01 / 3 - 0.05, 0.80 + 0.01 / 3, 0.80 + 0.01 / 3 + 0.05, 0.40])


def test_a_model_called_by_its_path_keeps_both_ends_in_a_drawing():
    path = "models/Qwen2.5-72B + runs/2026-11-20-continued-pretraining/adapter"
    assert labels.shortened(path).startswith("models/Qwen2")
    assert labels.shortened(path).endswith("training/adapter")
    assert len(labels.shortened(path)) < 40
    assert labels.shortened("CPT + RPO") == labels.wrapped("CPT + RPO") == "CPT + RPO"
    assert max(map(len, labels.wrapped(path).splitlines())) <= 28


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
