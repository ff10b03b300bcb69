"""The run folder: what it holds, and that nothing half-written stays behind."""

import dataclasses
import json

import pytest
import yaml

from medllm.config import LoraConfig, ModelConfig
from medllm.errors import UserError
from medllm.run import Run, atomic_path
from medllm.stage_config import FREE_ON_RESUME, CptConfig, EvaluateConfig, RpoConfig


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
    run.forget_after(2)
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


def test_where_the_reference_is_kept_may_change_on_resuming(tmp_path):
    """It is the same numbers, found there or computed anew."""
    begun = RpoConfig(ModelConfig("base"), str(tmp_path / "run"), "preferences.jsonl", reference_cache="here")
    Run(begun.run, begun).log(1, loss=1.0)
    for elsewhere in ("there", None):
        assert Run(begun.run, dataclasses.replace(begun, reference_cache=elsewhere), resume=True).metrics()


def test_every_setting_that_is_free_on_resuming_is_one_of_a_training_stage():
    settings = dataclasses.asdict(RpoConfig(ModelConfig("base"), "run", "preferences.jsonl"))
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
