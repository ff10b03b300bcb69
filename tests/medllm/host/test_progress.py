"""What takes minutes says how far it is, to whoever watches."""

import io
import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest

import medllm.stages.cpt
from medllm.cli import main
from medllm.config import ModelConfig
from medllm.host import progress as progress_module
from medllm.host.child import run_in_child
from medllm.host.progress import Pace, duration, part_of, progress_bar, tracked
from medllm.mini.study import BASE
from medllm.model.tokenizer import load_tokenizer
from medllm.stage_config import CorpusConfig, CptConfig


@pytest.fixture
def watched(monkeypatch):
    """Standard error is a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


def test_a_bar_says_what_comes_next_and_disappears(watched, capsys):
    with progress_bar("plan") as progress:
        progress(0, 2, "compiling gradients (1 of 2)")
    printed = capsys.readouterr()
    assert "plan: compiling gradients (1 of 2)" in printed.err
    assert printed.err.endswith("\x1b[2K")  # the line is cleared
    assert printed.out == ""


def test_a_bar_over_items_goes_on_where_the_work_was_left(watched, capsys):
    assert list(tracked("ab", "training", before=2)) == ["a", "b"]
    printed = capsys.readouterr().err
    assert "training" in printed
    assert printed.endswith("\x1b[2K")


def test_what_is_printed_meanwhile_stays_on_standard_output(watched, capsys):
    with progress_bar("plan"):
        print("a line")
    printed = capsys.readouterr()
    assert printed.out == "a line\n"
    assert "a line" not in printed.err


def test_a_bar_says_how_it_goes_and_what_memory_it_took(watched, capsys):
    with progress_bar("training", "steps") as progress:
        progress(1, 20, "loss 1.2340, 3,120 tokens/s")
    printed = capsys.readouterr().err
    assert re.search(r"training: loss 1\.2340, 3,120 tokens/s, memory [\d.]+ [GM]iB", printed)
    assert "1/20" in printed


def test_where_nobody_watches_there_is_a_line_a_minute_with_the_time_that_is_left(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(progress_module, "memory_words", lambda: "memory 2.1 GiB")
    now = [50.0]
    with progress_bar("training", "steps", clock=lambda: now[0]) as progress:
        for done in range(130):  # a step a second
            progress(1000 + done, 3000, "loss 1.2340")
            now[0] += 1
    assert capsys.readouterr().err.splitlines() == [
        "medllm: training: 1,060 of 3,000 steps, loss 1.2340, memory 2.1 GiB, 32 min left",
        "medllm: training: 1,120 of 3,000 steps, loss 1.2340, memory 2.1 GiB, 31 min left",
    ]


def test_what_says_nothing_of_how_it_goes_has_its_rate(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(progress_module, "memory_words", lambda: "memory 2.1 GiB")
    now = [0.0]
    with progress_bar("evaluate", "problems", clock=lambda: now[0]) as progress:
        progress(0, 200)
        now[0] = 80
        progress(20, 200)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "medllm: evaluate: 20 of 200 problems, 0.25 problems/s, memory 2.1 GiB, 12 min left"


def test_a_work_of_less_than_a_minute_is_silent_in_a_file(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with progress_bar("plan") as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""


def test_a_rate_is_over_a_minute_and_over_two_marks_at_the_least():
    pace = Pace(60)
    pace.mark(0, 0)
    assert pace.rate == 0
    pace.mark(100, 50)
    assert pace.rate == 0.5
    for second in range(101, 200):
        pace.mark(second, 50 + 10 * (second - 100))
    assert pace.rate == 10  # of the last minute alone
    pace.mark(200, 1040)  # a second in which nothing was done
    assert pace.rate == pytest.approx((1040 - 450) / 60)  # and not nothing
    pace.mark(200, 1050)
    assert pace.rate == pytest.approx((1050 - 450) / 60)  # nor the rate of no time


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (7800, "2 h 10 min"), (47.9 * 3600, "47 h 54 min"),
     (76 * 3600, "3 d 4 h")],
)  # fmt: skip
def test_a_duration_has_two_parts_at_the_most(seconds, words):
    assert duration(seconds) == words


def test_a_part_of_a_work_counts_in_the_whole():
    seen = []
    within = part_of(lambda *done: seen.append(done), before=8, count=4, whole=12)
    for done in (2, 4, 8):
        within(done, 8, "some")
    assert seen == [(9, 12, "some"), (10, 12, "some"), (12, 12, "some")]
    assert part_of(None, 0, 1, 1) is None


def test_a_search_for_leaks_shows_how_far_it_is(watched, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "text"}) + "\n")
    problem = {"problem_id": "1", "problem_text": "?", "choices": ["x", "y"], "answer": ["a"]}
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    assert (
        main(["data", "leaks", "--documents", str(tmp_path / "text.jsonl"), "--problems", str(tmp_path / "problems.jsonl")])
        == 0
    )
    assert "documents" in capsys.readouterr().err


def test_a_corpus_that_becomes_tokens_shows_how_far_it_is(tmp_path, monkeypatch):
    seen = []

    @contextmanager
    def recorded(label):
        yield lambda *done: seen.append((label, *done))

    class Opened:
        tokenizer, context = load_tokenizer(str(BASE)), 512

        def train_cpt(self, rows, config, run):
            raise InterruptedError

    monkeypatch.setattr(medllm.stages.cpt, "progress_bar", recorded)
    monkeypatch.setattr(medllm.stages.cpt, "open_trainer", lambda *_: Opened())
    (tmp_path / "text.txt").write_text("text")
    config = CptConfig(ModelConfig(str(BASE)), str(tmp_path / "run"), CorpusConfig((str(tmp_path / "text.txt"),), length=16))
    with pytest.raises(InterruptedError):
        medllm.stages.cpt.run_cpt(config)
    assert seen == [("tokens", 1, 1)]


def test_a_process_of_its_own_is_heard(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        "import sys\n"
        "from medllm.host.child import serve, tell\n"
        "def work(parts):\n"
        "    for done in range(parts):\n"
        "        tell(done, parts, f'part {done}')\n"
        "    return {'parts': parts}\n"
        "sys.exit(serve({'work': work}, sys.argv[1:]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(medllm.__file__).parents[1]}")
    seen = []
    assert run_in_child("slow", "work", {"parts": 2}, progress=lambda *told: seen.append(told)) == {"parts": 2}
    assert seen == [(0, 2, "part 0"), (1, 2, "part 1")]
    assert run_in_child("slow", "work", {"parts": 1}, log=io.StringIO()) == {"parts": 1}
