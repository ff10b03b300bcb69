"""Trackers, by stand-ins for their packages: what each is told, offline, once a step; and by the packages where they are."""

import importlib.metadata
import importlib.util
import os
import sqlite3
import sys
from types import ModuleType, SimpleNamespace

import pytest

import medllm.stages.cpt
from medllm.config import ModelConfig
from medllm.errors import UserError
from medllm.metrics import Metrics
from medllm.run import Run
from medllm.stage_config import CptConfig
from medllm.trackers import FOLDERS, PACKAGES, open_tracker, require_tracker

SETTINGS = {"lora.rank": 4}


def stand_in(monkeypatch, name, **members):
    module = ModuleType(name)
    vars(module).update(members)
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def told(monkeypatch):
    """What was asked of a stand-in for each of the three packages."""
    calls = []

    def call(name, result=None):
        return lambda *arguments, **named: (calls.append((name, arguments, named)), result)[1]

    run = SimpleNamespace(log=call("wandb.log"), finish=call("wandb.finish"))
    stand_in(monkeypatch, "wandb", init=call("wandb.init", run), Settings=lambda **named: named)
    stand_in(monkeypatch, "trackio", init=call("init"), log=call("trackio.log"), finish=call("trackio.finish"))

    class Client:
        def __init__(self, tracking_uri):
            calls.append(("mlflow.uri", (tracking_uri,), {}))
            self.create_run = call("mlflow.create_run", SimpleNamespace(info=SimpleNamespace(run_id="r2")))
            self.search_runs = call("mlflow.search_runs", [SimpleNamespace(info=SimpleNamespace(run_id="r1"))])
            for name in ("log_param", "log_metric", "delete_run", "set_terminated"):
                setattr(self, name, call(f"mlflow.{name}"))
            self.get_experiment_by_name = call("", SimpleNamespace(experiment_id="7"))

    stand_in(monkeypatch, "mlflow", __path__=[])
    stand_in(monkeypatch, "mlflow.tracking", MlflowClient=Client)
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", "elsewhere")
    return calls


def test_a_run_that_goes_on_tells_wandb_each_step_once_and_offline(told, tmp_path):
    run = tmp_path / "cpt"
    run.mkdir()
    first = Metrics(run, "wandb", SETTINGS)
    for step in (1, 2):
        first.append(step, {"loss": 3.0})
    (run / "wandb" / "of_before").write_text("")
    second = Metrics(run, "wandb", SETTINGS)
    second.forget_after(1)
    second.append(2, {"loss": 2.0})
    second.close()
    assert not (run / "wandb" / "of_before").exists()
    (_, _, opened), (_, (line,), at) = told[3], told[4]
    assert (opened["mode"], opened["name"], opened["dir"]) == ("offline", "cpt", str(run / "wandb"))
    assert opened["config"] == SETTINGS
    assert opened["settings"]["x_disable_meta"]  # the machine's facts stay here
    assert (line, at) == ({"loss": 3.0}, {"step": 1})
    assert [name for name, *_ in told[3:]] == ["wandb.init", "wandb.log", "wandb.log", "wandb.finish"]


def test_wandb_is_online_where_its_own_variable_says_so(told, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    open_tracker("wandb", tmp_path / "cpt", SETTINGS)
    assert told[0][2]["mode"] == "online"


def test_mlflow_writes_a_database_in_the_run_folder_and_takes_its_earlier_run_away(told, tmp_path):
    tracker = open_tracker("mlflow", tmp_path / "cpt", SETTINGS, anew=True)
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    assert told[0][1] == (f"sqlite:///{tmp_path / 'cpt' / 'mlflow' / 'mlflow.db'}",)
    calls = {name: (arguments, named) for name, arguments, named in told}
    assert calls["mlflow.delete_run"][0] == ("r1",)
    assert calls["mlflow.log_param"][0] == ("r2", "lora.rank", 4)
    assert calls["mlflow.log_metric"] == (("r2", "loss", 1.0), {"step": 3})
    assert calls["mlflow.set_terminated"][0] == ("r2",)
    assert str(tmp_path / "cpt" / "mlflow") in calls["mlflow.search_runs"][1]["filter_string"]  # and nobody else's runs


def test_trackio_writes_into_the_run_folder(told, tmp_path):
    tracker = open_tracker("trackio", tmp_path / "cpt", SETTINGS)
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    assert os.environ["TRACKIO_DIR"] == str(tmp_path / "cpt" / "trackio")
    assert ("trackio.log", ({"loss": 1.0},), {"step": 3}) in told
    assert told[-1][0] == "trackio.finish"


def test_a_run_has_the_tracker_of_its_settings(told, tmp_path):
    config = CptConfig(ModelConfig("base"), str(tmp_path / "run"), tracker="trackio")
    with Run(config.run, config) as run:
        run.log(1, loss=1.0)
    name, _, opened = told[0]
    assert name == "init"
    assert opened["config"]["training.keep"] == 2
    assert not (tmp_path / "run" / "events").exists()


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "tensorboard"])
def test_a_package_that_is_missing_is_one_line_before_anything_is_opened(name, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr(medllm.stages.cpt, "open_trainer", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(UserError, match=rf"--tracker {name} needs the package '{name}': pip install .*\[{name}\]"):
        medllm.stages.cpt.run_cpt(CptConfig(ModelConfig("base"), str(tmp_path / "run"), tracker=name))
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_there_without_more(tmp_path):
    always = [one for one in importlib.metadata.requires("medllm") if "extra ==" not in one]
    assert any(one.lower().startswith(PACKAGES["tensorboard"].lower()) for one in always)
    require_tracker("tensorboard")
    tracker = open_tracker("tensorboard", tmp_path, SETTINGS)
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    assert [*(tmp_path / FOLDERS["tensorboard"]).iterdir()]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_package_itself_takes_each_step_once(name, tmp_path):
    if importlib.util.find_spec(name) is None:  # imported it would have its folder before it is told of one
        pytest.skip(f"{name} is not installed")
    for _ in range(2):
        tracker = open_tracker(name, tmp_path / "cpt", SETTINGS, anew=True)
        for step in (1, 2):
            tracker.log(step, {"loss": 1.0 / step})
        tracker.close()
    folder = tmp_path / "cpt" / name
    if name == "wandb":
        assert len(list(folder.rglob("*.wandb"))) == 1
        return
    query = {
        "mlflow": "select value from metrics join runs using (run_uuid) where lifecycle_stage = 'active' order by step",
        "trackio": "select json_extract(metrics, '$.loss') from metrics order by step",
    }
    with sqlite3.connect(next(folder.glob("*.db"))) as database:
        assert [value for (value,) in database.execute(query[name])] == [1.0, 0.5]
