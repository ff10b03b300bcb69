"""What SECURITY.md promises of files that somebody else made, and of files that are somebody's own."""

import json
import re
import sys

import pytest

from medllm.cli import main
from medllm.config import LoraConfig, ModelConfig
from medllm.errors import UserError
from medllm.mini.study import BASE
from medllm.model.adapter import write_adapter
from medllm.model.directory import ModelDirectory, write_model
from medllm.model.files import INDEX, WEIGHTS
from medllm.model.tokenizer import load_tokenizer
from medllm.report.runs import read_run
from medllm.run import Run
from medllm.stage_config import CptConfig
from tests.pages import ROOT
from tests.refusal import refused

CPT = CptConfig(ModelConfig("base"), "run")


@pytest.mark.parametrize(
    "settings",
    [
        "model: {class_path: trap.Trap, init_args: {path: base}}\nrun: run\n",
        "model: {path: base}\nrun: run\nlora: {class_path: trap.Trap}\n",
        "class_path: trap.Trap\nmodel: {path: base}\nrun: run\n",
        "model: {path: !!python/name:trap.Trap ''}\nrun: run\n",
    ],
)
def test_a_file_of_settings_imports_nothing(tmp_path, capsys, monkeypatch, settings):
    (tmp_path / "trap.py").write_text("class Trap:\n    def __init__(self, path='base'): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "s.yaml").write_text(settings)
    refused(tmp_path, capsys, "cpt", "--config", str(tmp_path / "s.yaml"))
    assert "trap" not in sys.modules
    assert main(["cpt", "--run", "run", "--model", '{"class_path": "trap.Trap"}']) == 2
    assert "trap" not in sys.modules


def test_a_model_folder_brings_no_code(tmp_path):
    for file in BASE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"auto_map": {"AutoTokenizer": ["trap.Trap", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match="code in model folders is never run"):
        load_tokenizer(tmp_path)


def test_pickled_weights_are_not_opened(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ModelDirectory(BASE).config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="only safetensors"):
        ModelDirectory(tmp_path).names()


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "x" * 300, "a\0b", "..", "sub/one.safetensors", 7, None, ["a"], {}]
)
def test_an_index_names_no_file_outside_its_folder(tmp_path, shard):
    model = ModelDirectory(BASE)
    write_model(tmp_path / "model", model.config, ((name, model.read(name)) for name in model.names()))
    (tmp_path / "model" / WEIGHTS).rename(tmp_path / "other.safetensors")
    index = {"weight_map": dict.fromkeys(model.names(), shard)}
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="expected the name of a file in the same folder"):
        ModelDirectory(tmp_path / "model").names()


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 5, [["a", "b"]]])
def test_an_index_that_maps_nothing(tmp_path, weight_map):
    (tmp_path / "config.json").write_text(json.dumps(ModelDirectory(BASE).config))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="expected the file of each tensor"):
        ModelDirectory(tmp_path).names()


@pytest.mark.parametrize("name", ["adapter", "merged", "checkpoints", "events"])
def test_a_folder_of_the_users_own_is_not_taken_for_a_run(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}, and no run"):
        Run(tmp_path, CPT)
    assert [file.name for file in tmp_path.rglob("*")] == [name, "mine.txt"]


def test_nothing_is_written_through_a_link(tmp_path):
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.mkdir()
    run.mkdir()
    (run / "config.yaml").symlink_to(mine / "config.yaml")
    (run / "environment.json").symlink_to(mine / "environment.json")
    with Run(run, CPT) as begun:
        begun.log(1, loss=1.0)
    assert not (run / "config.yaml").is_symlink()
    (run / "adapter").symlink_to(mine, target_is_directory=True)
    with pytest.raises(UserError, match="is a link to a folder"):
        write_adapter(run / "adapter", LoraConfig(), {"a": ModelDirectory(BASE).read("model.norm.weight")}, "base")
    assert list(mine.iterdir()) == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").symlink_to(mine / "metrics.jsonl")
    with pytest.raises(UserError, match=r"holds metrics\.jsonl"):
        Run(tmp_path / "other", CPT)


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "result.json", "metrics.jsonl"])
def test_a_report_follows_no_link_out_of_a_run_folder(tmp_path, name):
    with Run(tmp_path / "run", CPT) as run:
        run.log(1, loss=1.0)
        run.finish({"stage": "cpt"})
    (tmp_path / "run" / name).rename(tmp_path / name)
    (tmp_path / "run" / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="is a link out of the run folder"):
        read_run(tmp_path / "run")


TEMPLATES = [file for room in ("medllm", "medllm_parity") for file in ROOT.glob(f"{room}/**/*.j2")]
PAGES = [file for file in TEMPLATES if "<head>" in file.read_text()]
# The report's questions, and the one script that shows them: its policy names the script's hash, and refuses text as markup.
SCRIPTS = (
    '<script type="application/octet-stream" id="data">{{ packed.index }}</script>',
    '<script type="application/octet-stream" class="texts">{{ block }}</script>',
    '<script>{% include "questions.js" %}</script>',
)


@pytest.mark.parametrize("template", PAGES, ids=lambda file: file.stem)
def test_every_page_lets_nothing_in(template):
    text = template.read_text(encoding="utf-8")
    if template.stem == "report.html":
        assert [text.count(script) for script in SCRIPTS] == [1, 1, 1]
        assert "script-src '{{ script_hash }}'; require-trusted-types-for 'script'; trusted-types 'none'" in text
    assert re.search(
        r"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'", text
    )


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_no_template_brings_markup_scripts_or_addresses(template):
    text = template.read_text(encoding="utf-8")
    for script in SCRIPTS:
        text = text.replace(script, "")
    assert not re.search(r"\|\s*safe\b|autoescape|Markup|<script|<link|<iframe|https?://|@import|url\(", text)


def test_there_are_as_many_kinds_of_pages_as_are_looked_at():
    assert {file.stem for file in PAGES} == {"report.html", "plan.html", "audit.html", "certificate.html"}


def test_every_promise_names_a_test_that_is_there():
    promised = re.findall(r"\| `(test_\w+)` \|", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(promised) >= 10
    there = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in promised if f"def {name}(" not in there] == []
