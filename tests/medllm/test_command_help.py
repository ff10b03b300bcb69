"""What ``--help`` says, and what Tab completes."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from medllm.cli import COMMANDS
from medllm.command import Group
from medllm.command_help import settings_of
from medllm.command_words import options_of
from medllm.presets import preset_titles
from tests.medllm.test_cli import fails, leaves, page


@pytest.mark.parametrize("words", [[], *([name] for name, one in COMMANDS.items() if isinstance(one, Group))], ids=str)
def test_the_help_above_the_commands_fits_a_screen(words, capsys):
    printed = page(capsys, *words, "--help").splitlines()
    assert len(printed) <= 40
    assert max(map(len, printed)) <= 100


@pytest.mark.parametrize("name", sorted(leaves()))
def test_help_fits_a_screen_in_words(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    printed = page(capsys, *name.split(), "--help")
    lines = printed.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert not re.search(r"Literal|typing|type: |null|None|``|:data:|Union", printed), printed
    command = leaves()[name]
    assert {"--json", "--debug", "--help"} <= set(printed.split())
    assert ("--config" in printed) == ("--config" in command.parser()._option_string_actions) == ("--print_config" in printed)
    for preset in preset_titles(command.presets):
        assert preset in printed


def test_help_names_what_may_follow_an_option_and_what_follows_unsaid(capsys):
    printed = " ".join(page(capsys, "cpt", "--help").split())
    assert "--model.quantization none|nf4" in printed
    assert "--training.epochs N Passes over the data (default 2)" in printed
    assert "--corpus.documents A [B ...]" in printed


@pytest.mark.parametrize("name", sorted(leaves()))
@pytest.mark.parametrize("all_of_it", [["--help", "all"], ["--help=all"]], ids=str)
def test_every_option_is_behind_help_all(name, all_of_it, capsys):
    printed = page(capsys, *name.split(), *all_of_it).split()
    assert set(options_of(leaves()[name].parser())) <= set(printed)
    assert not re.search(r"Literal|typing|null|None|``|:data:", " ".join(printed))


@pytest.mark.parametrize("name", sorted(leaves()))
def test_every_setting_says_what_it_is_for(name):
    assert [one.option for one in settings_of(leaves()[name].parser()) if not one.text] == []


# --- tab completion --------------------------------------------------------------------------------------------------------


def completions(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of ``words``."""
    asked = f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_medllm"
    program = f"source {script}; {asked}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, cwd=script.parent)
    return done.stdout.split()


@pytest.fixture
def bash_script(tmp_path, capsys):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    script = tmp_path / "medllm.bash"
    script.write_text(page(capsys, "--completion", "bash"))
    return script


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["cu"], ["curate"]),
        (["data", "exp"], ["export-trl"]),
        (["cpt", "--optimizer.learn"], ["--optimizer.learning_rate"]),
        (["cpt", "--model.quantization", ""], ["none", "nf4", "nf4-single"]),
        (["cpt", "--config", "paper"], ["paper_cpt_72b"]),
        (["mini", "--preset", ""], ["medllm.bash", "mini", "mini_smoke"]),
        (["evaluate", "--problems", "med"], ["medllm.bash"]),
        (["cpt", "--help", ""], ["all"]),
    ],
    ids=str,
)
def test_bash_completes(words, offered, bash_script):
    assert sorted(completions(bash_script, "medllm", *words)) == sorted(offered)


def test_zsh_gets_the_same_commands_options_and_presets(tmp_path, capsys):
    script = page(capsys, "--completion", "zsh")
    assert script.startswith("#compdef medllm")
    for word in (*COMMANDS, "export-trl", "--optimizer.learning_rate", "(none nf4 nf4-single)", "compadd -- paper_cpt_72b"):
        assert word in script
    if shutil.which("zsh"):
        file = tmp_path / "_medllm"
        file.write_text(script)
        subprocess.run(["zsh", "-n", str(file)], check=True)


def test_another_shell_is_refused(capsys):
    assert "bash and zsh" in fails(capsys, "--completion", "fish")
