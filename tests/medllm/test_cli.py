"""The command line: what a user reads when something is wrong, and that starting it is cheap."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import medllm
from medllm.cli import COMMANDS, main, parse
from medllm.command import Command, Group
from medllm.config import MeshConfig, ModelConfig
from medllm.engines import LAUNCH_TORCH, open_engine
from medllm.errors import UserError
from medllm.presets import PRESETS

PROGRAM = [sys.executable, "-m", "medllm"]


def fails(capsys, *arguments: str) -> str:
    """The one line a wrong command line prints; the exit code is 2."""
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("medllm: ")
    return lines[0]


def page(capsys, *arguments: str) -> str:
    """What a command line that asks for help prints; the exit code is 0."""
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    assert done.value.code == 0
    return capsys.readouterr().out


def leaves() -> dict[str, Command]:
    """Every command that does something, as it is called."""
    found: dict[str, Command] = {}
    for name, command in COMMANDS.items():
        parts = {f"{name} {action}": one for action, one in command.actions().items()} if isinstance(command, Group) else {}
        found |= parts or {name: command}
    return found


def test_help_needs_neither_framework_and_is_quick():
    code = (
        "import sys, medllm.cli, contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    try: medllm.cli.main(['--help'])\n"
        "    except SystemExit as done: assert done.code == 0\n"
        "assert 'curate' in out.getvalue()\n"
        "heavy = {'jax', 'torch', 'transformers', 'datasets', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([*PROGRAM, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command, capsys):
    assert COMMANDS[command].help in page(capsys, command, "--help")


@pytest.mark.parametrize(
    ("word", "meant"),
    [("cptt", "cpt"), ("pretrain", "cpt"), ("dpo", "rpo"), ("eval", "evaluate"), ("merge", "convert"), ("benchmark", "bench")],
)
def test_a_command_that_is_not_there_names_the_one_that_was_meant(word, meant, capsys):
    assert f"there is no command '{word}'; did you mean {meant}?" in fails(capsys, word, "--run", "r")


def test_an_action_that_is_not_there_names_the_one_that_was_meant(capsys):
    assert "data has no command 'export'; did you mean export-trl?" in fails(capsys, "data", "export")
    assert "leaks" in fails(capsys, "data")


@pytest.mark.parametrize(
    ("command", "word", "meant"),
    [
        ("cpt", "--lr", "--optimizer.learning_rate"),
        ("cpt", "--batch", "--training.batch_size"),
        ("cpt", "--epochs", "--training.epochs"),
        ("cpt", "--num_train_epochs", "--training.epochs"),
        ("cpt", "--steps", "--training.max_steps"),
        ("cpt", "--seed", "--lora.seed or --training.seed"),
        ("cpt", "--rank", "--lora.rank"),
        ("cpt", "--lora_rank", "--lora.rank"),
        ("cpt", "--optimiser.learning_rate", "--optimizer.learning_rate"),
        ("cpt", "--gradient_accumulation_steps", "--training.accumulation"),
        ("cpt", "--output_dir", "--run"),
        ("cpt", "--warmup", "--optimizer.warmup_ratio"),
        ("rpo", "--beta", "--loss.beta"),
        ("evaluate", "--num_fewshot", "--shot_count"),
        ("evaluate", "--max_tokens", "--sampling.max_new_tokens"),
        ("evaluate", "--temp", "--sampling.temperature"),
        ("plan", "--gpus", "--target"),
        ("data export-trl", "--prefernces", "--preferences"),
        ("data export-trl", "--max_chosn", "--pairs.max_chosen"),
    ],
)
def test_an_option_that_is_not_there_names_the_one_that_was_meant(command, word, meant, capsys):
    line = fails(capsys, *command.split(), word, "1")
    assert f"{command} has no option {word}; did you mean " in line
    assert meant in line
    assert f"(see medllm {command} --help all)" in line


def test_a_misspelt_option_names_the_right_one(capsys):
    assert "--optimizer.learning_rate" in fails(
        capsys, "cpt", "--model.path", "m", "--run", "r", "--optimizer.learning_rat", "1"
    )


def test_a_misspelt_config_key_is_named(tmp_path, capsys):
    preset = tmp_path / "mine.yaml"
    preset.write_text("run: r\nmodel: {path: m}\noptimizer: {learning_rat: 1.0e-4}\n")
    assert "learning_rat" in fails(capsys, "cpt", "--config", str(preset))


def test_missing_required_settings_are_named(capsys):
    line = fails(capsys, "cpt")
    assert "model.path" in line
    assert "run" in line


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--lora.rank", "0", "at least 1"),
        ("--lora.targets", "lm_head", "q_proj"),
        ("--optimizer.warmup_ratio", "1.5", "fraction"),
        ("--training.epochs", "two", "training.epochs"),
        ("--model.quantization", "int8", "nf4"),
    ],
)
def test_a_bad_value_says_what_was_expected(capsys, option, value, expected):
    assert expected in fails(capsys, "cpt", "--model.path", "m", "--run", "r", option, value)


def test_a_missing_model_folder_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    line = fails(capsys, "cpt", "--model.path", "nowhere", "--run", "run", "--corpus.documents", "text.txt")
    assert "nowhere" in line
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


def test_debug_shows_the_traceback():
    command = [*PROGRAM, "convert", "--model", "nowhere", "--adapter", "a", "--out", "b", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_several_values_need_no_brackets(capsys):
    with pytest.raises(SystemExit):
        main(["cpt", "--model.path", "m", "--run", "r", "--corpus.documents", "a.txt", "b.txt", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["corpus"]["documents"] == ["a.txt", "b.txt"]


def test_a_list_takes_several_values_in_every_command(capsys):
    audit = parse("parity", COMMANDS["parity"], ["--model.path", "m", "--reference_adapter", "A", "B"])
    assert audit.reference_adapter == ("A", "B")
    depths = parse("bench compile", leaves()["bench compile"], ["--depths", "2", "4"]).depths
    assert depths == [2, 4]
    optimizer = parse("cpt", COMMANDS["cpt"], ["--model.path", "m", "--run", "r", "--optimizer.betas", "0.9", "0.95"]).optimizer
    assert optimizer.betas == (0.9, 0.95)
    assert "unrecognized arguments: B" in fails(capsys, "score", "--problems", "A", "B", "--predictions", "p")


@pytest.mark.parametrize("stage", ["cpt", "curate", "rpo", "evaluate"])
def test_the_papers_presets_resolve_by_name(stage, capsys):
    with pytest.raises(SystemExit):
        main([stage, "--config", f"paper_{stage}_72b", "--print_config"])
    resolved = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load((PRESETS / f"paper_{stage}_72b.yaml").read_text())
    assert resolved["model"]["quantization"] == "nf4"
    assert {key: resolved[key] for key in written if not isinstance(written[key], dict)} == {
        key: value for key, value in written.items() if not isinstance(value, dict)
    }


def test_the_presets_carry_the_papers_published_numbers():
    cpt, rpo = (yaml.safe_load((PRESETS / f"paper_{stage}_72b.yaml").read_text()) for stage in ("cpt", "rpo"))
    assert cpt["training"]["epochs"] == 2
    assert rpo["training"]["epochs"] == 1
    assert rpo["loss"]["alpha"] == 10.0


def test_presets_are_packaged():
    assert Path(medllm.__file__).parent / "presets" == PRESETS
    assert len(list(PRESETS.glob("paper_*.yaml"))) == 5


def test_an_install_hint_is_for_this_installation(monkeypatch, tmp_path):
    from medllm.host import installation

    assert installation.install_command("jax") == f"pip install -e '{Path(medllm.__file__).parents[1]}[jax]'"
    monkeypatch.setattr(installation, "_FOLDER", tmp_path)  # as site-packages is: no project in it
    assert installation.install_command("jax") == "pip install 'medllm[jax]'"


def test_torchrun_takes_the_command_that_a_message_recommends():
    distributed = pytest.importorskip("torch.distributed.run")
    stage = ["--model.path", "m", "--run", "r"]
    with pytest.raises(UserError, match=re.escape(LAUNCH_TORCH)):
        open_engine("torch", ModelConfig("m"), MeshConfig(mesh="fsdp=2"))
    words = LAUNCH_TORCH.replace(" N ", " 2 ").replace("COMMAND ...", "cpt").split()[1:]
    parsed = distributed.get_args_parser().parse_args([*words, *stage])
    assert (parsed.module, parsed.training_script) == (True, "medllm")
    assert parsed.training_script_args == ["cpt", *stage]
    with pytest.raises(SystemExit):
        distributed.get_args_parser().parse_args([word for word in words if word != "--"] + stage)


@pytest.mark.parametrize("words", [["power", "--score", "0.8", "--difference", "0.03"], ["cpt", "--help", "all"]])
def test_where_the_reader_of_the_output_has_enough_nothing_is_said(words):
    command = [sys.executable, "-m", "medllm", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        started.stdout.close()
        assert started.stderr.read() == ""
    assert started.returncode == 141
