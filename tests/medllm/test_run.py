"""The run folder: what it holds, and that nothing half-written stays behind."""

import dataclasses
import errno
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import yaml

import medllm.run as run_module
from medllm.ablation.design import Design, RowDesign
from medllm.config import LoraConfig, ModelConfig
from medllm.errors import UserError
from medllm.host.lock import LOCK
from medllm.run import Run, atomic_path
from medllm.stage_config import FREE_ON_RESUME, CptConfig, EvaluateConfig, RoundsConfig, RpoConfig

PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


def config(tmp_path):
    return CptConfig(model=ModelConfig(path="base"), run=str(tmp_path / "run"))


def test_a_run_records_config_environment_metrics_and_result(tmp_path):
    run = Run(tmp_path / "run", config(tmp_path))
    run.log(1, loss=2.5)
    run.log(2, loss=2.25)
    run.finish({"stage": "cpt", "loss": 2.25})
    assert yaml.safe_load((run.path / "config.yaml").read_text())["model"]["path"] == "base"
    assert json.loads((run.path / "environment.json").read_text())["packages"]["numpy"]
    assert run.metrics() == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    assert json.loads((run.path / "result.json").read_text()) == {"stage": "cpt", "loss": 2.25}
    assert list((run.path / "events").iterdir())


def test_an_existing_run_is_not_overwritten(tmp_path):
    Run(tmp_path / "run", config(tmp_path)).log(1, loss=1.0)
    with pytest.raises(UserError, match="already holds a run"):
        Run(tmp_path / "run", config(tmp_path))
    assert Run(tmp_path / "run", config(tmp_path), resume=True).metrics() == [{"step": 1, "loss": 1.0}]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="this is a file"):
        Run(tmp_path / "run", config(tmp_path))


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path):
    target = tmp_path / "value"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_atomic_directory_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    with atomic_path(target) as scratch:
        scratch.mkdir()
        (scratch / "new").touch()
    assert [file.name for file in target.iterdir()] == ["new"]


def test_a_refused_input_takes_the_new_folder_away(tmp_path):
    with pytest.raises(UserError), Run(tmp_path / "run", config(tmp_path)):
        raise UserError("no")
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_stays(tmp_path):
    with pytest.raises(UserError), Run(tmp_path / "run", config(tmp_path)) as run:
        run.log(1, loss=2.0)
        raise UserError("diverged")
    assert run.metrics() == [{"step": 1, "loss": 2.0}]


def test_only_the_primary_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Run(tmp_path / "run", config(tmp_path)) as run:
        run.log(1, loss=2.0)
        run.finish({})
    assert list(tmp_path.iterdir()) == []


def test_resuming_forgets_what_was_logged_beyond_the_checkpoint(tmp_path):
    run = Run(tmp_path / "run", config(tmp_path))
    for step in (1, 2, 3):
        run.log(step, loss=float(step))
    run.go_on(2, 9)
    assert [line["step"] for line in run.metrics()] == [1, 2]


def test_a_run_goes_on_only_with_the_engine_and_settings_it_was_begun_with(tmp_path):
    begun = config(tmp_path)
    Run(tmp_path / "run", begun, engine="jax").log(1, loss=1.0)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match="engine = jax, now it is torch"):
        Run(tmp_path / "run", begun, engine="torch", resume=True)
    other = dataclasses.replace(begun, lora=LoraConfig(rank=4))
    with pytest.raises(UserError, match=r"lora\.rank = 16, now it is 4"):
        Run(tmp_path / "run", other, engine="jax", resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    longer = dataclasses.replace(begun, training=dataclasses.replace(begun.training, max_steps=9))
    assert Run(tmp_path / "run", longer, engine="jax", resume=True).metrics() == [{"step": 1, "loss": 1.0}]


def test_the_same_path_spelled_otherwise_is_the_same_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
    begun = EvaluateConfig(ModelConfig("base"), "run", ("base", "exam.jsonl"))
    Run("run", begun)
    same = dataclasses.replace(begun, model=ModelConfig(str(tmp_path / "base")), problems=("./base/", "exam.jsonl"))
    Run("run", same, resume="auto")
    other = dataclasses.replace(begun, problems=("other", "exam.jsonl"))
    with pytest.raises(UserError, match=r"was begun with problems = \['./base/', 'exam.jsonl'\], now it is \['other'"):
        Run("run", other, resume="auto")


def test_a_run_goes_on_by_itself_until_it_is_finished(tmp_path):
    with Run(tmp_path / "run", config(tmp_path)) as run:
        run.log(1, loss=1.0)
    with Run(tmp_path / "run", config(tmp_path), resume="auto") as run:
        assert run.metrics() == [{"step": 1, "loss": 1.0}]
        run.finish({"loss": 1.0})
    with pytest.raises(UserError, match="already holds a finished run; give another --run"):
        Run(tmp_path / "run", config(tmp_path), resume="auto")
    assert json.loads((run.path / "result.json").read_text()) == {"loss": 1.0}


def test_a_run_says_where_it_goes_on(tmp_path, capsys):
    with Run(tmp_path / "run", config(tmp_path), resume="auto") as run:
        run.go_on(0, 3000)
        run.log(1, loss=1.0)
    assert capsys.readouterr().err == ""
    with Run(tmp_path / "run", config(tmp_path), resume="auto") as run:
        run.go_on(1240, 3000)
        run.go_on(0, 3000)
    assert capsys.readouterr().err.splitlines() == [
        f"medllm: {tmp_path / 'run'}: going on at step 1,240 of 3,000",
        f"medllm: {tmp_path / 'run'}: no checkpoint yet, beginning at step 1 of 3,000",
    ]


def test_what_killed_processes_left_is_taken_away(tmp_path):
    Run(tmp_path / "run", config(tmp_path)).log(1, loss=1.0)
    for left in (".merged.12.part/.config.json.12.part", ".metrics.jsonl.12.part", "checkpoints/.notes"):
        (tmp_path / "run" / left).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / left).write_text("half")
    with Run(tmp_path / "run", config(tmp_path), resume="auto"):
        assert not list((tmp_path / "run").rglob("*.part"))
        assert (tmp_path / "run" / "checkpoints" / ".notes").exists()


def test_a_run_that_must_go_on_is_not_begun(tmp_path):
    with pytest.raises(UserError, match="there is no run to go on with"):
        Run(tmp_path / "run", config(tmp_path), resume=True)
    assert not (tmp_path / "run").exists()


def test_a_longer_run_over_a_finished_one_is_unfinished_until_it_ends(tmp_path):
    Run(tmp_path / "run", config(tmp_path)).finish({"steps": 2})
    with Run(tmp_path / "run", config(tmp_path), resume=True) as run:
        assert (run.path / "result.json").exists()
        run.go_on(2, 4)
        assert not (run.path / "result.json").exists()


def test_two_processes_do_not_write_one_run(tmp_path):
    """Held by another process, named with its machine; let go however that ends."""
    hold = f"from medllm.host.lock import FolderLock; from pathlib import Path; held = FolderLock(Path({str(tmp_path)!r}))"
    with subprocess.Popen([sys.executable, "-c", f"{hold}; print(1, flush=True); input()"], text=True, **PIPES) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(UserError, match=rf"process {other.pid} on {re.escape(socket.gethostname())} is at work here"):
            Run(tmp_path, config(tmp_path), resume="auto")
        assert [file.name for file in tmp_path.iterdir()] == [LOCK]
        other.kill()
        other.wait()
    with Run(tmp_path, config(tmp_path), resume="auto"):
        assert f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("medllm.host.lock.fcntl.lockf", refuse)
    Run(tmp_path / "run", config(tmp_path)).finish({})
    assert "cannot be locked (No locks available); start one process at a time" in capsys.readouterr().err


def test_where_the_reference_is_kept_may_change_on_resuming(tmp_path):
    """It is the same numbers, found there or computed anew."""
    begun = RpoConfig(ModelConfig("base"), str(tmp_path / "run"), "preferences.jsonl", reference_cache="here")
    Run(begun.run, begun).log(1, loss=1.0)
    for elsewhere in ("there", None):
        assert Run(begun.run, dataclasses.replace(begun, reference_cache=elsewhere), resume=True).metrics()


def test_every_setting_that_is_free_on_resuming_is_one_of_a_stage():
    base = ModelConfig("base")
    study = Design(base, {"base": RowDesign()}, {"exam": {}})
    rounds = RoundsConfig(base, "run", ("train",))
    stages = (RpoConfig(base, "run", "preferences.jsonl"), EvaluateConfig(base, "run", ("exam",)), rounds, study)
    settings = {name: value for stage in stages for name, value in dataclasses.asdict(stage).items()}
    for name in FREE_ON_RESUME:
        found = settings
        for part in name.split("."):
            assert part in found, name
            found = found[part]


def test_only_a_stage_that_can_resume_is_advised_to(tmp_path):
    exam = EvaluateConfig(ModelConfig("m"), "run", ("p",))
    Run(tmp_path / "run", exam)
    with pytest.raises(UserError) as refused:
        Run(tmp_path / "run", exam)
    assert "resume" not in str(refused.value)


def test_a_run_that_another_process_finished_in_the_meantime_stays(tmp_path, monkeypatch):
    """Both saw no folder; the other one was quicker."""
    config = EvaluateConfig(ModelConfig("model"), str(tmp_path / "run"), ("problems.jsonl",))

    class Late(run_module.FolderLock):
        def __init__(self, folder):
            monkeypatch.undo()
            with Run(folder, config) as other:
                other.finish({"stage": "evaluate"})
            super().__init__(folder)

    monkeypatch.setattr(run_module, "FolderLock", Late)
    with pytest.raises(UserError, match="already holds a finished run"):
        Run(tmp_path / "run", config, resume="auto")
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == {"stage": "evaluate"}


def test_what_a_living_process_writes_in_a_run_below_stays(tmp_path):
    config = EvaluateConfig(ModelConfig("m"), "run", ("p",))
    outer = Run(tmp_path / "run", config)
    outer.finish({})
    (tmp_path / "run" / "result.json").unlink()
    below = tmp_path / "run" / "below"
    below.mkdir()
    (below / "config.yaml").touch()
    theirs, left = below / ".merged.elsewhere.1.part", tmp_path / "run" / ".predictions.jsonl.elsewhere.1.part"
    for file in (theirs, left):
        file.touch()
    Run(tmp_path / "run", config, resume="auto")
    assert theirs.exists()
    assert not left.exists()
