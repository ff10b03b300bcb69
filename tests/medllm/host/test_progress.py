"""What takes minutes says how far it is, to whoever watches."""

import io
import json
from contextlib import contextmanager
from pathlib import Path

import pytest

import medllm.stages.cpt
from medllm.cli import main
from medllm.config import ModelConfig
from medllm.host.child import run_in_child
from medllm.host.progress import part_of, progress_bar, tracked
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


def test_nobody_watches_a_file(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with progress_bar("plan") as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""


def test_a_part_of_a_work_counts_in_the_whole():
    seen = []
    within = part_of(lambda *done: seen.append(done), before=8, count=4, total=12)
    for done in (2, 4, 8):
        within(done, 8)
    assert seen == [(9, 12), (10, 12), (12, 12)]
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
