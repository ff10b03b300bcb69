"""Jobs done by several processes, each once, whatever is killed in between."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from medllm.ablation.design import Design, RowDesign
from medllm.ablation.study import run_design
from medllm.config import ModelConfig
from medllm.errors import UserError
from medllm.mini.study import BASE, ROWS

WORKER = """
import json, os, sys, time
from pathlib import Path
from medllm.ablation import work
from medllm.ablation.study import run_design
from tests.medllm.ablation.test_ablation_work import design

out = Path(sys.argv[1])

def ended(folder, config, **more):
    with (out.parent / "log").open("a") as log:
        log.write(json.dumps([os.getpid(), Path(folder).name]) + "\\n")
    while not (out.parent / "go").exists():
        time.sleep(0.02)
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "result.json").write_text("{}")
    class Result:
        class summary: steps, seconds, loss = 1, 1.0, 0.5
        setting = "3-shot"
        class score:
            words = staticmethod(lambda: "right")
    return Result

work.check_first = lambda *given: None
work.run_cpt = work.run_rpo = lambda config, engine: ended(config.run, config)
work.sit_exam = work.build_preferences = lambda model, problems, shots, config, left_out: ended(config.run, config)
work.open_engine = lambda *given: None
work.read_exam = lambda *given: ((), {})
work.read_curation = lambda *given: ((), (), {})
work.merge_adapter = lambda path, adapters, folder: folder.mkdir()
run_design(design(), "jax", out, print, join="join" in sys.argv)
"""


def design(**settings):
    exams = {"exam": {"problems": ["exam.jsonl"], "shot_count": 0}}
    return Design(ModelConfig("base"), ROWS, exams, seeds=3, curate={"problems": ["train.jsonl"]}, **settings)


@pytest.fixture
def start():
    """``start(out, *more)``: a process of the study, which does not outlive the test."""
    begun = []

    def process(out, *more):
        words = [sys.executable, "-c", WORKER, str(out), *more]
        begun.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield process
    for one in begun:
        one.kill()
        one.communicate()


def log(out):
    file = out.parent / "log"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait(holds):
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("nothing happened")


def test_processes_that_join_share_the_jobs_and_a_killed_one_is_made_up_for(start, tmp_path):
    out = tmp_path / "study"
    processes = [start(out)]
    wait(lambda: len(log(out)) == 1)
    processes += [start(out, "join") for _ in range(2)]
    wait(lambda: len(log(out)) == 3)
    begun = dict(log(out))
    assert len(begun) == len(set(begun.values())) == 3
    first, killed, other = processes
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (tmp_path / "go").touch()
    for process in (other, first):
        said = process.communicate(timeout=60)
        assert process.returncode == 0, said[1]
    done = Counter(name for _, name in log(out))
    assert len(done) == 12 + 6 + 26
    assert [name for name, count in done.items() if count > 1] == [begun[killed.pid]]
    assert not (out / ".jobs").exists()


def test_a_study_to_join_must_be_there_with_the_same_settings(start, tmp_path):
    with pytest.raises(UserError, match="nothing was begun here"):
        run_design(design(), "jax", tmp_path / "study", print, join=True)
    assert not (tmp_path / "study").exists()
    (tmp_path / "go").touch()
    process = start(tmp_path / "study")
    assert process.wait(60) == 0
    with pytest.raises(UserError, match=r"was begun with margin = 0\.02, now it is 0\.03"):
        run_design(design(margin=0.03), "jax", tmp_path / "study", print, join=True)


def test_a_finished_study_is_given_more_trainings_and_no_fewer(start, tmp_path):
    out = tmp_path / "study"
    (tmp_path / "go").touch()
    assert start(out).wait(60) == 0
    before = log(out)
    (out / "result.json").write_text(json.dumps({"seeds": 3}))
    with pytest.raises(UserError, match="holds a finished study"):
        run_design(design(), "jax", out, print)
    (out / "result.json").write_text(json.dumps({"seeds": 2}))
    assert start(out).wait(60) == 0
    assert log(out) == before
    assert not Path(out / ".jobs").exists()


def test_a_file_that_is_not_there_is_named_before_anything_begins(tmp_path):
    with pytest.raises(UserError, match=r"train\.jsonl: no such file or folder; row 'base' is to read it|exam\.jsonl: no such"):
        run_design(design(), "jax", tmp_path / "study", print)
    assert not (tmp_path / "study").exists()


def test_a_loss_that_the_engine_has_not_is_refused_before_anything_begins(tmp_path, monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.chdir(tmp_path)
    for name in ("exam.jsonl", "train.jsonl"):
        Path(name).touch()
    rows = ROWS | {"odd": RowDesign(start="CPT", rpo={"loss": {"name": "dppo"}})}
    exams = {"exam": {"problems": ["exam.jsonl"], "shot_count": 0}}
    asked = Design(ModelConfig(str(BASE)), rows, exams, curate={"problems": ["train.jsonl"], "shot_count": 0})
    with pytest.raises(UserError, match=r"loss\.name is 'dppo'"):
        run_design(asked, "jax", tmp_path / "study", print)
    assert not (tmp_path / "study").exists()
