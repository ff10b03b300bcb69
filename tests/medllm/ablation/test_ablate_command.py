"""``medllm ablate`` as it is typed: what it is given, and what is refused before anything is done."""

import re
from pathlib import Path

import pytest
import yaml

from medllm.ablate_command import ABLATE
from medllm.ablation.design import design_of
from medllm.ablation.jobs import plan
from medllm.cli import main, parse
from tests.pages import ROOT, blocks
from tests.refusal import refused


def settings(*words):
    from medllm import ablate_command

    seen = {}

    def stopped(design, *given, **more):
        seen["design"] = design
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medllm.ablation.study.run_design", stopped)
        patch.setattr("medllm.mini.study.study_of", stopped)
        with pytest.raises(KeyboardInterrupt):
            ablate_command.ABLATE.run(parse("ablate", ABLATE, list(words)))
    return seen["design"]


def test_the_page_of_ablation_shows_a_design_that_can_be(tmp_path):
    (block,) = blocks(ROOT / "docs" / "ablation.md", "yaml")
    text = block.text
    file = tmp_path / "rows.yaml"
    file.write_text(text, encoding="utf-8")
    design = settings("--config", str(file), "--seeds", "2", "--set", "cpt.corpus.length=64", "margin=5e-2")
    assert (design.seeds, design.margin, design.cpt["corpus"]["length"]) == (2, 0.05, 64)
    assert design.cpt["corpus"]["documents"] == ["documents.jsonl"]
    planned = plan(design, Path("out"))
    assert len(planned.trainings) == 6
    assert design == design_of(yaml.safe_load(text) | {"seeds": 2, "margin": 0.05, "cpt": design.cpt}, "here")


def test_a_preset_of_the_embedded_study_has_its_own_settings():
    study = settings("--preset", "mini_smoke", "--seeds", "3", "--set", "cpt.lora.rank=2", "--set", "sit=dev")
    assert (study.seeds, study.cpt.lora.rank, study.cpt.lora.alpha, study.sit) == (3, 2, 8.0, "dev")


def test_a_design_is_printed_as_it_would_be_carried_out(capsys):
    assert main(["ablate", "--preset", "paper_ablate_72b", "--seeds", "3", "--set", "margin=0.05", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["seeds"], printed["margin"], list(printed["rows"])[1]) == (3, 0.05, "CPT")
    assert design_of(printed, "here").presets["rpo"] == "paper_rpo_72b"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to compare"),
        (["--preset", "mini", "--config", "paper_ablate_72b"], "say what to compare"),
        (["--preset", "maxi"], "--preset maxi: neither a file nor a preset; there are mini, mini_smoke, paper_ablate_72b"),
        (["--preset", "mini", "--set", "lora"], "--set lora: expected a setting and its value"),
        (["--preset", "mini", "--set", "cpt.lora.rnk=2"], "mini.yaml with --set cpt.lora.rnk=2: .*rnk"),
        (["--preset", "mini", "--set", "sit=dve"], "mini.yaml with --set sit=dve: .*expected one of 'exam', 'dev'"),
        (["--preset", "mini", "--set", "cpt=3"], "cpt is '3'; expected its settings by name"),
        (["--preset", "mini", "--set", "seeds=3", "seeds.x=2"], "seeds has a value already"),
        (["--preset", "mini", "--set", "seeds=[1"], "the value is no YAML"),
        (["--preset", "mini", "--seeds", "0"], "seeds is 0; expected at least 1"),
        (["--preset", "mini", "--seed", "3"], "--seeds"),
        (["--preset", "paper_ablate_72b", "--set", "rows.CPT.start=bass"], "'bass', which is no other row"),
        (["--preset", "paper_ablate_72b", "--set", "rows.CPT.strat=base"], "rows.CPT: .*strat"),
        (["--preset", "paper_ablate_72b", "--set", "rows=3"], "rows: expected the rows of the table by name, found 3"),
        (["--preset", "mini", "--join"], "nothing was begun here"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(words, said, tmp_path, capsys):
    assert re.search(said, refused(tmp_path, capsys, "ablate", *words, "--out", str(tmp_path / "study")))
