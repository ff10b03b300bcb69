"""The embedded study from end to end, in a size where every stage runs and nothing is learned."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from medllm.cli import main
from medllm.errors import UserError
from medllm.mini.report import run_and_report
from medllm.mini.study import PREVIOUS, load_preset, run_study

MODELS = ["base", *PREVIOUS]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    pytest.importorskip("jax")
    out = tmp_path_factory.mktemp("mini") / "study"
    lines: list[str] = []
    return out, run_and_report("jax", out, "mini_smoke", lines.append), lines


def test_five_models_sit_the_exam_in_two_settings(study):
    _, figures, _ = study
    assert list(figures["scores"]) == MODELS
    for scores in figures["scores"].values():
        assert list(scores) == ["3-shot", "3-shot with explanation"]
        assert all(0 <= value <= 1 for value in scores.values())


def test_every_stage_leaves_a_finished_run(study):
    out, figures, _ = study
    stages = {}
    for folder in out.iterdir():
        if (folder / "config.yaml").exists():
            result = json.loads((folder / "result.json").read_text())
            stages.setdefault(result["stage"], []).append(folder.name)
            assert result["engine"] == "jax"
    assert {stage: len(folders) for stage, folders in stages.items()} == {"cpt": 1, "curate": 2, "rpo": 3, "evaluate": 10}
    assert set(figures["training"]) == set(PREVIOUS)
    for name in ("cpt", *stages["rpo"]):
        assert (out / name / "adapter" / "adapter_model.safetensors").exists()
        assert (out / name / "merged" / "tokenizer.json").exists()


class Killed(BaseException):
    """No error that anybody catches."""


def test_a_study_that_ended_early_goes_on_with_the_stages_that_are_left(study, tmp_path):
    whole, figures, _ = study
    out, told = tmp_path / "study", []

    def until_dpo(line):
        told.append(line)
        if line.startswith("CPT+DPO: preference training"):
            raise Killed

    with pytest.raises(Killed):
        run_and_report("jax", out, "mini_smoke", until_dpo)
    finished = {file: file.stat().st_mtime_ns for file in out.glob("*/result.json")}
    assert len(finished) == 7
    with pytest.raises(UserError, match=r"was begun with .* = .*, now it is"):
        run_study("jax", out, dataclasses.replace(load_preset("mini_smoke"), row_length=96), told.append)
    again = run_and_report("jax", out, "mini_smoke", told.append)
    assert told.count("CPT: continued pretraining, into cpt") == 1
    assert finished == {file: file.stat().st_mtime_ns for file in finished}
    assert again["scores"] == figures["scores"]
    for file in (*whole.glob("*/p*.jsonl"), *whole.glob("*/adapter/*.safetensors")):
        assert (out / file.relative_to(whole)).read_bytes() == file.read_bytes(), file
    with pytest.raises(UserError, match="holds a finished study"):
        run_study("jax", out, "mini_smoke", print)


def test_a_finished_study_is_given_another_training_of_each_model(study, tmp_path):
    whole, figures, _ = study
    out = tmp_path / "study"
    shutil.copytree(whole, out)
    finished = {file: file.stat().st_mtime_ns for file in out.glob("*/result.json")}
    written = tmp_path / "rows.json"
    assert main(["ablate", "--preset", "mini_smoke", "--seeds", "2", "--out", str(out), "--json", str(written)]) == 0
    assert finished == {file: file.stat().st_mtime_ns for file in finished}
    rows = json.loads(written.read_text())["rows"]
    assert [(row["model"], row["seeds"]) for row in rows] == [("base", 1), *((model, 2) for model in PREVIOUS)]
    for row in rows:
        for setting, measured in row["settings"].items():
            assert measured["trainings"][0] == pytest.approx(figures["scores"][row["model"]][setting])
    first, second = ((out / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("rpo", "rpo-seed1"))
    assert first != second


def test_dpo_is_rpo_without_the_likelihood_term(study):
    import yaml

    out, _, _ = study
    dpo, rpo = (yaml.safe_load((out / name / "config.yaml").read_text()) for name in ("dpo", "rpo"))
    assert (dpo["loss"]["alpha"], rpo["loss"]["alpha"]) == (0.0, 10.0)
    dpo["loss"], dpo["run"] = rpo["loss"], rpo["run"]
    assert dpo == rpo


def test_report_shows_every_model(study):
    _, figures, _ = study
    page = Path(figures["report"]).read_text(encoding="utf-8")
    assert all(model in page for model in MODELS)
    assert "invented" in page


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="in use"):
        run_study("jax", tmp_path, "mini_smoke", print)
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_an_unknown_preset_or_setting_is_refused(tmp_path):
    with pytest.raises(UserError, match="mini_smoke"):
        load_preset("minni")
    bad = tmp_path / "bad.yaml"
    bad.write_text("train_per_year: many\n")
    with pytest.raises(UserError, match="train_per_year"):
        load_preset(str(bad))


def test_a_study_says_itself_what_its_stages_do(tmp_path, capsys):
    class Enough(BaseException):
        pass

    def until_curation(line):
        if line.endswith("into curate-base"):
            raise Enough

    with pytest.raises(Enough):
        run_study("jax", tmp_path / "study", "mini_smoke", until_curation)
    assert "problems, answers of up to" not in capsys.readouterr().err
