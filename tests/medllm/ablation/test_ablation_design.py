"""A design and its jobs: what is planned once, what is seeded, and what is refused."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from medllm.ablation.design import Design, RowDesign, combined, configured, design_of
from medllm.ablation.jobs import Sitting, Training, plan
from medllm.config import ModelConfig, PreferenceLoss
from medllm.errors import UserError
from medllm.mini.study import ROWS, load_preset, study_design
from medllm.presets import PRESETS
from medllm.stage_config import CptConfig, RpoConfig

OUT = Path("out")
EXAMS = {"exam": {"problems": ["exam.jsonl"], "shot_count": 0}}


def design(rows=None, **settings):
    shared = {"curate": {"problems": ["train.jsonl"], "shot_count": 0}, "exams": EXAMS}
    return Design(model=ModelConfig("base"), rows=ROWS if rows is None else rows, **(shared | settings))


def jobs(planned, kind):
    return [job for job in planned.jobs if isinstance(job, kind)]


def config_of(planned, folder):
    return next(job.config for job in jobs(planned, Training) if job.folder == OUT / folder)


def test_the_papers_rows_need_four_trainings_and_two_curations_a_seed_and_one_base():
    planned = plan(design(seeds=3), OUT)
    trainings = jobs(planned, Training)
    assert [job.folder.name for job in trainings[:4]] == ["cpt", "dpo", "rpo", "rpo-alone"]
    assert len(trainings) == 4 * 3
    curations = [Path(data.run).name for job in jobs(planned, Sitting) for data in job.curations]
    suffixes = ("", "-seed1", "-seed2")
    assert sorted(curations) == sorted(f"curate-{row}{seed}" for row in ("base", "cpt") for seed in suffixes)
    sittings = {job.model.path: job for job in jobs(planned, Sitting)}
    assert len(sittings) == 1 + 4 * 3
    assert [Path(exam.run).name for exam in sittings["base"].exams] == ["evaluate-base", "evaluate-base-explained"]
    assert {len(one.runs) for one in planned.sat if one.row == "base"} == {1}
    assert {len(one.runs) for one in planned.sat if one.row != "base"} == {3}


def test_a_job_stands_behind_what_it_needs():
    planned = plan(design(seeds=2), OUT)
    done = set()
    for job in planned.jobs:
        assert done.issuperset(job.needs), job
        done.update(job.runs)
    rpo = next(job for job in planned.jobs if job.folder == OUT / "rpo-seed1")
    assert set(rpo.needs) == {OUT / "cpt-seed1", OUT / "curate-cpt-seed1"}


def test_each_training_adds_its_number_to_every_seed():
    planned = plan(
        design(
            seeds=3, cpt={"training": {"seed": 10}}, curate={"problems": ["t"], "sampling": {"temperature": 1.0, "seed": 5}}
        ),
        OUT,
    )
    assert [config_of(planned, f"cpt{s}").training.seed for s in ("", "-seed1", "-seed2")] == [10, 11, 12]
    assert [config_of(planned, f"rpo{s}").lora.seed for s in ("", "-seed1", "-seed2")] == [0, 1, 2]
    seeds = {Path(data.run).name: data.sampling.seed for job in jobs(planned, Sitting) for data in job.curations}
    assert [seeds[f"curate-cpt{s}"] for s in ("", "-seed1", "-seed2")] == [5, 6, 7]


def test_preference_data_of_other_settings_are_made_apart_and_the_same_once():
    few = {"sampling": {"temperature": 1.0, "samples": 2}}
    rows = ROWS | {
        "few": RowDesign(start="CPT", rpo={}, curate=few),
        "few DPO": RowDesign(start="CPT", rpo={"loss": {"alpha": 0}}, curate=few),
    }
    planned = plan(design(rows), OUT)
    runs = [Path(data.run).name for job in jobs(planned, Sitting) for data in job.curations]
    assert sorted(runs) == ["curate-base", "curate-cpt", "curate-few"]
    assert config_of(planned, "few-dpo").preferences == "out/curate-few/preferences.jsonl"
    assert config_of(planned, "dpo").preferences == "out/curate-cpt/preferences.jsonl"


def test_answers_can_be_those_of_another_row():
    planned = plan(design(ROWS | {"from base": RowDesign(start="CPT", rpo={}, answers_of="base")}), OUT)
    assert config_of(planned, "from-base").preferences == "out/curate-base/preferences.jsonl"
    assert config_of(planned, "from-base").model.path == "out/cpt/merged"


def test_two_rows_of_the_same_training_share_it():
    planned = plan(design(ROWS | {"again": RowDesign(start="CPT", rpo={})}), OUT)
    assert [job.folder.name for job in jobs(planned, Training)] == ["cpt", "dpo", "rpo", "rpo-alone"]
    assert planned.trainings["again"] == planned.trainings["CPT+RPO"]


def test_a_hand_over_decides_what_a_row_starts_on():
    rows = ROWS | {name: RowDesign(start="CPT", rpo={"handover": name}) for name in ("stack", "continue")}
    planned = plan(design(rows), OUT)
    assert config_of(planned, "rpo").model == ModelConfig("out/cpt/merged")
    assert config_of(planned, "stack").model == ModelConfig("base", adapter=("out/cpt/adapter",))
    trained = {job.folder.name: job.trained for job in jobs(planned, Training)}
    assert trained["stack"].adapters == ("out/cpt/adapter", "out/stack/adapter")
    assert trained["continue"].adapters == ("out/continue/adapter",)


def test_adapters_are_merged_only_where_something_stands_on_the_weights():
    merged = {job.folder.name: job.merges for job in jobs(plan(design(), OUT), Training)}
    assert merged == {"cpt": True, "dpo": True, "rpo": True, "rpo-alone": True}
    merged = {job.folder.name: job.merges for job in jobs(plan(design(opened="adapter"), OUT), Training)}
    assert merged == {"cpt": True, "dpo": False, "rpo": False, "rpo-alone": False}


def test_several_exams_are_sat_apart():
    exams = EXAMS | {"2018": {"problems": ["2018.jsonl"], "shot_count": 0}}
    planned = plan(design(exams=exams), OUT)
    names = {run.name for one in planned.sat for run in one.runs if one.row == "CPT"}
    assert names == {"evaluate-cpt", "evaluate-cpt-explained", "evaluate-cpt-2018", "evaluate-cpt-2018-explained"}
    first = {run.name for run in planned.first_runs("2018")}
    assert "evaluate-cpt-2018" in first
    assert "evaluate-cpt" not in first
    assert {"cpt", "curate-cpt", "rpo"} <= first


def test_the_embedded_study_is_a_design_of_its_preset():
    config = load_preset("mini")
    planned = plan(study_design(config, Path("world")), OUT)
    rpo, dpo, cpt = (config_of(planned, name) for name in ("rpo", "dpo", "cpt"))
    assert isinstance(cpt, CptConfig)
    assert isinstance(rpo, RpoConfig)
    assert (rpo.loss, dpo.loss) == (config.loss, PreferenceLoss(alpha=0.0, beta=config.loss.beta))
    assert (cpt.lora, cpt.optimizer, cpt.training) == (config.cpt.lora, config.cpt.optimizer, config.cpt.training)
    assert (rpo.pairs, rpo.optimizer) == (config.pairs, config.preference.optimizer)


def test_the_papers_preset_takes_its_stages_from_the_papers_other_presets():
    settings = yaml.safe_load((PRESETS / "paper_ablate_72b.yaml").read_text())
    planned = plan(design_of(settings, "paper_ablate_72b"), OUT)
    rpo = yaml.safe_load((PRESETS / "paper_rpo_72b.yaml").read_text())
    mine = config_of(planned, "cpt-rpo")
    assert (mine.lora.rank, mine.optimizer.learning_rate) == (rpo["lora"]["rank"], rpo["optimizer"]["learning_rate"])
    assert mine.model == ModelConfig("out/cpt/merged", quantization="nf4")
    assert mine.preferences == "out/curate-cpt/preferences.jsonl"
    evaluated = next(job for job in jobs(planned, Sitting) if job.row == "CPT+RPO")
    assert evaluated.exams[0].sampling.max_new_tokens == 768
    assert evaluated.model.adapters == ("out/cpt-rpo/adapter",)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"a": RowDesign(cpt={})}, "'a' is trained and says not from which row"),
        ({"a": RowDesign(start="b", cpt={})}, "names 'b', which is no other row; there are a"),
        ({"a": RowDesign(start="b", cpt={}), "b": RowDesign(start="a", cpt={})}, "comes of itself: a from b from a"),
        (ROWS | {"x": RowDesign(start="base")}, "say which stage trains it"),
        (ROWS | {"x": RowDesign(start="base", cpt={}, rpo={})}, "say which stage trains it"),
        (ROWS | {"x": RowDesign(start="base", cpt={}, curate={})}, "not trained on them"),
        (ROWS | {"cpt": RowDesign(start="base", cpt={})}, "'CPT' and 'cpt' would both be kept in 'cpt'"),
        (ROWS | {"x": RowDesign(start="base", cpt={}, against=("y",))}, "names 'y', which is no other row"),
        (ROWS | {"x": RowDesign(start="base", cpt={}, against=("x",))}, "names 'x', which is no other row"),
        (
            ROWS | {"x": RowDesign(start="base", rpo={}, answers_of="y"), "y": RowDesign(start="x", rpo={})},
            "comes of itself: x from y",
        ),
        (ROWS | {"x": RowDesign(start="base", cpt={}, folder="../x")}, r"cannot be kept in '\.\./x'"),
        (ROWS | {"x": RowDesign(start="base", cpt={}, folder=".jobs")}, r"cannot be kept in '\.jobs'"),
        (ROWS | {"result.json": RowDesign(start="base", cpt={})}, r"cannot be kept in 'result\.json'"),
        (ROWS | {"cpt rpo": RowDesign(start="base", cpt={}, folder="other")}, "'CPT\\+RPO' and 'cpt rpo' would both be kept"),
        ({}, "rows is"),
    ],
)
def test_a_design_that_cannot_be_is_refused(rows, words):
    with pytest.raises(UserError, match=words):
        design(rows)


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ({"CPT": RowDesign(start="base", cpt={"lora": {"rnk": 3}})}, {}, r"rows\.CPT\.cpt: .*rnk"),
        ({"CPT": RowDesign(start="base", cpt={"lora": {"rank": "many"}})}, {}, r"rows\.CPT\.cpt: .*rank"),
        ({"CPT": RowDesign(start="base", cpt={"lora": 5})}, {}, r"rows\.CPT\.cpt: lora is '5'; expected its settings by name"),
        ({"CPT": RowDesign(start="base", cpt={"corpus": {"documents": [""]}})}, {}, "empty text"),
        ({}, {"rpo": {"preferences": "mine.jsonl"}}, "preferences follows from the rows"),
        ({}, {"evaluate": {"method": "options"}}, "method is 'options'"),
        ({}, {"presets": {"rpo": "paper_cpt_72b"}}, r"presets\.rpo paper_cpt_72b: .*paper_rpo_72b"),
    ],
)
def test_a_setting_that_does_not_fit_is_named_with_its_row(rows, settings, words):
    with pytest.raises(UserError, match=words):
        plan(design(ROWS | rows, **settings), OUT)


def test_settings_are_combined_group_by_group():
    shared = {"lora": {"rank": 4, "alpha": 8.0}, "seed": 1}
    assert combined(shared, {"lora": {"rank": 2}}) == {"lora": {"rank": 2, "alpha": 8.0}, "seed": 1}
    assert shared["lora"]["rank"] == 4
    assert asdict(configured(ModelConfig, {"path": "x"}, "here"))["path"] == "x"
