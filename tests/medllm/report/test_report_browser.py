"""The report in a browser: Chromium opens the page from disk, filters, searches, steps and follows its links."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medllm.exam.loaders import write_problems
from medllm.report.page import render, write_report
from medllm.report.runs import report_from_runs
from tests.chromium import DESKTOP, PHONE, Opened, chromium
from tests.large_study import MODELS, QUESTIONS, large_study
from tests.written_study import ATTACK, CHANCES, DRAW, SETTINGS, problems, write_study

SIZES = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
OPEN_WITHIN = 2.0  # seconds
LISTS = "names => [...document.querySelectorAll('#found a')].map((row) => row.dataset.id).join() === names.join()"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def file(folders) -> Path:
    return write_report(folders[0].parent / "report.html", report_from_runs(folders, draw=DRAW))


@pytest.fixture
def opened(browser, file) -> Iterator[Opened]:
    with Opened(browser, file) as page:
        yield page
        assert page.said == []
        assert page.asked == []


@pytest.fixture(scope="module")
def right(folders) -> dict[tuple[str, str], dict[str, bool]]:
    """Whether each model was right, read from the run folders and nothing of the report."""
    found = {}
    for folder in folders[3:]:
        result = json.loads((folder / "result.json").read_text())
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        found[result["model"], result["setting"]] = {line["problem_id"]: line["prediction"] == "a" for line in lines}
    return found


def lost(right, model: str) -> list[str]:
    plain, explained = (right[model, setting] for setting in SETTINGS)
    return [name for name in plain if plain[name] and not explained[name]]


def test_every_question_is_there_and_the_first_is_open(browser, file):
    with Opened(browser, file) as opened:
        exam = problems()
        assert opened.ids == [problem.problem_id for problem in exam]
        assert opened.page.text_content("#count") == "40 of 40 questions"
        assert opened.shown == exam[0].problem_id
        assert (opened.said, opened.asked) == ([], [])


@pytest.mark.parametrize("section", ["A", "B"])
def test_filters_show_the_questions_they_name(opened, right, section):
    opened.choose(section=section)
    assert opened.ids == [problem.problem_id for problem in problems() if problem.section == section]
    opened.choose(model="CPT", flip="lost")
    wanted = [name for name in lost(right, "CPT") if name[3] == section]
    assert wanted
    assert opened.ids == wanted
    opened.page.click("#filters [type=reset]")
    opened.until("!location.hash.includes('flip')")
    assert len(opened.ids) == 40


def test_a_model_and_its_answer_are_filters_together(opened, right):
    opened.choose(model="base", answer=f"{SETTINGS[1]}|0")
    wrong = [name for name, correct in right["base", SETTINGS[1]].items() if not correct]
    assert opened.ids == wrong
    opened.choose(flip="missed")
    assert opened.ids == [name for name in wrong if not right["base", SETTINGS[0]][name]]


def test_every_flow_and_every_count_of_a_cause_opens_as_many_questions_as_it_says(opened, right):
    for model in ("base", "CPT + RPO"):
        figure = opened.page.locator("#why figure", has=opened.page.get_by_role("heading", name=model, exact=True))
        for link in figure.locator("svg a").all():
            count = int(link.locator("text").text_content().split()[-1])
            link.press("Enter")
            opened.until("text => document.getElementById('count').textContent.startsWith(`${text} of`)", str(count))
            assert len(opened.ids) == count
        opened.page.evaluate("location.hash = ''")
    row = opened.page.locator("#why tbody tr", has_text="base").first
    wanted = lost(right, "base")
    unread = [name for name in wanted if int(name[4:]) % 3 == 1]  # as tests/written_study.py plants them
    for link, names in zip(row.locator("td a").all(), (unread, [name for name in wanted if name not in unread]), strict=True):
        assert int(link.text_content()) == len(names) > 0
        link.click()
        opened.until("cause => location.hash.includes(`cause=${cause}`)", "unread" if names is unread else "reasoning")
        opened.until(LISTS, names)  # the list is drawn anew after the address has changed
        assert opened.ids == names
    assert int(row.locator("td").last.text_content()) == len(wanted)


def test_the_search_reads_questions_answers_and_ids_in_any_width_of_letters(opened):
    opened.search("患者 ７")
    assert opened.ids == [problem.problem_id for problem in problems() if "7" in problem.problem_id] != []
    opened.search("because 118C11")
    assert opened.ids == ["118C11"]
    opened.search("no such words")
    assert opened.ids == []
    assert "No question" in opened.page.text_content("#question")
    assert opened.page.text_content("#count") == "0 of 40 questions"


def test_a_link_opens_its_question_with_its_model_first(browser, file, right):
    with Opened(browser, file, hash="#q=118C11&model=CPT%20%2B%20DPO") as opened:
        assert opened.shown == "118C11"
        assert opened.page.input_value("#filters [name=model]") == "CPT + DPO"
        models = opened.page.locator("#question h4").all_text_contents()
        assert models == ["CPT + DPO", *(model for model in CHANCES if model != "CPT + DPO")]
        opened.page.keyboard.press("j")
        again = opened.page.evaluate("location.hash")
    with Opened(browser, file, hash=again) as opened:
        assert opened.shown == problems()[12].problem_id


def test_a_question_shows_the_right_option_every_answer_and_how_it_was_read(opened, right):
    opened.page.click("#found a[data-id='118B1']")
    gold = opened.page.locator("#question .options .gold")
    assert gold.all_text_contents() == [f"a 一right answer{sum(mine['118B1'] for mine in right.values())} answers name it"]
    cards = opened.page.locator("#question .response")
    assert cards.count() == len(right)
    for card, (model, setting) in zip(cards.all(), right, strict=True):
        correct = right[model, setting]["118B1"]
        text = card.inner_text()
        assert ("✓ right" in text, "✗ wrong" in text) == (correct, not correct)
        assert "because 118B1" in text
        unread = not correct and setting == SETTINGS[1]
        assert ("no answer" if unread else "a 一" if correct else "b 二") in text
        assert ("not read: nothing in it says" if unread else "read by label") in text
    prompt = opened.page.locator("#question details.prompt").last
    prompt.locator("summary").click()
    words = prompt.locator("pre").text_content()
    assert words.index("Example 0?") < words.index("for it is 2") < words.index("患者 1: which drug?")


def test_keys_step_search_and_leave(opened):
    names = [problem.problem_id for problem in problems()]
    press = opened.page.keyboard.press
    for key, at in (("j", 1), ("j", 2), ("k", 1)):
        press(key)
        assert opened.shown == names[at]
    assert opened.page.text_content("#now") == f"{names[1]}, 2 of 40"
    press("/")
    assert opened.page.evaluate("document.activeElement.name") == "text"
    opened.page.keyboard.type("j")
    opened.until("location.hash.includes('text=j')")
    press("Escape")
    assert opened.page.evaluate("document.activeElement.id") == "question"
    opened.page.click("#filters [type=reset]")
    opened.until("!location.hash.includes('text=j')")
    opened.page.focus("#found a")
    press("ArrowDown")
    assert opened.page.evaluate("document.activeElement.dataset.id") == opened.shown
    opened.page.uncheck("#filters [name=keys]")
    opened.page.focus("#question")
    before = opened.shown
    press("j")
    assert opened.shown == before


def test_who_hears_the_page_finds_its_parts(opened):
    by_role = opened.page.get_by_role
    for role, name in (("main", None), ("search", "Questions"), ("navigation", "Sections"), ("navigation", "Questions found")):
        assert by_role(role, **({"name": name} if name else {})).count() == 1, name
    assert by_role("article", name="118A0").count() == 1
    for label in ("Search questions", "Section", "Model", "By explaining", "Cause", "Answer"):
        assert by_role("searchbox" if "Search" in label else "combobox", name=re.compile(label)).count() == 1, label
    assert opened.page.locator("[aria-live=polite]").count() == 2
    assert by_role("link", name=re.compile(r"wrong reasoning \d+: ")).count() >= 5
    assert opened.page.evaluate("[...document.images].every((one) => one.alt)")


@SIZES
def test_nothing_is_wider_than_the_window_and_every_drawing_can_be_read(browser, file, size):
    with Opened(browser, file, size=size) as opened:
        assert not opened.overflows
        assert opened.page.evaluate(
            "[...document.querySelectorAll('.scores td')].every((cell) => cell.getBoundingClientRect().right <= innerWidth)"
        )
        small = opened.page.evaluate(
            "[...document.querySelectorAll('svg text')].filter((one) => one.getBoundingClientRect().height < 11).length"
        )
        assert small == 0
        # Inside an image text shrinks with it: 11 points (14.7 pixels) at its own width.
        shares = opened.page.evaluate("[...document.images].map((one) => one.clientWidth / one.naturalWidth)")
        assert min(shares) * 14.7 >= 9.5


def test_without_script_tables_and_figures_stand_and_the_page_says_what_is_missing(browser, file):
    with Opened(browser, file, script=False) as opened:
        assert opened.page.locator("noscript .notice").is_visible()
        assert not opened.page.locator("#browser").is_visible()
        assert not opened.page.locator("#loading").is_visible()
        for part in ("#scores table", "#why svg", "#figures img"):
            assert opened.page.locator(part).first.is_visible(), part


def test_on_paper_there_is_the_open_question_and_no_filter(opened):
    opened.page.emulate_media(media="print")
    assert opened.page.locator("#question .response").first.is_visible()
    for part in ("#filters", "#found", ".contents"):
        assert not opened.page.locator(part).is_visible(), part


def test_what_models_and_files_say_is_never_markup(browser, folders, tmp_path):
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders[3:5]]
    exam = [type(one)(**{**vars(one), "text": f"{ATTACK} {one.text}", "choices": (ATTACK, "二", "三")}) for one in problems()]
    write_problems(tmp_path / "exam.jsonl", exam)
    for copy in copies:
        for name in ("config.yaml", "predictions.jsonl", "result.json"):
            text = (copy / name).read_text().replace(str(folders[0].parent / "exam.jsonl"), str(tmp_path / "exam.jsonl"))
            text = re.sub(r"because \w+", lambda _: json.dumps(ATTACK)[1:-1], text).replace(
                '"base"', json.dumps(f"base {ATTACK}")
            )
            (copy / name).write_text(text)
    page = write_report(tmp_path / "report.html", report_from_runs(copies, title=ATTACK, draw=DRAW))
    with Opened(browser, page) as opened:
        assert (opened.said, opened.asked) == ([], [])
        assert opened.page.inner_text("#question").count(ATTACK) >= 4  # question, option, model, texts
        assert opened.page.locator("#question img, #question script").count() == 0


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A page, and the question of each id."""
    page, study = tmp_path_factory.mktemp("large") / "report.html", large_study()
    page.write_text(render(study), encoding="utf-8")
    return page, {one.problem_id: one.problem.text for one in study.questions.every}


@SIZES
def test_two_thousand_questions_of_ten_models_open_in_two_seconds(browser, large, size):
    page, asked = large
    with Opened(browser, page, size=size) as opened:
        # Of a processor: the clock on the wall has what else the machine is at. The other second is for a slower one.
        assert opened.processor_seconds < OPEN_WITHIN / 2
        assert opened.page.text_content("#count") == f"{QUESTIONS} of {QUESTIONS} questions"
        assert opened.page.locator("#question .model").count() == MODELS
        assert len(opened.ids) == 200
        opened.page.click("#more")
        assert len(opened.ids) == 400
        last = opened.ids[-1]  # of another block of texts than the first
        opened.page.click(f"#found a[data-id='{last}']")
        opened.until("last => document.querySelector('#question h3').textContent === last", last)
        assert asked[last] in opened.page.inner_text("#question")
        assert not opened.overflows
        assert (opened.said, opened.asked) == ([], [])
