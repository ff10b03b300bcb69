"""The study finds code that it does not import by one table, and by nothing else."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import get_args

import pytest

import medllm
from medllm.cli import main
from medllm.engines import HOMES, EngineName, TrainerName

ROOT = Path(medllm.__file__).parents[1]
PACKAGES = ("medllm", "jax_medllm", "torch_ref", "medllm_parity")
TABLE = Path("medllm/engines.py")
OWN_PARTS = (Path("medllm/__init__.py"), Path("jax_medllm/__init__.py"))  # each opens its own when they are first asked for
MODULE = re.compile(r"(jax_medllm|torch_ref|medllm_parity)(\.\w+)+")


def sources():
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            yield file.relative_to(ROOT), ast.parse(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("home", HOMES)
def test_what_the_table_names_is_there(home):
    for module in HOMES[home].modules.values():
        assert importlib.util.find_spec(module) is not None, module
    if HOMES[home].engine:
        source = (ROOT / HOMES[home].modules["engine"].replace(".", "/")).with_suffix(".py")
        classes = [node.name for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
        assert HOMES[home].engine in classes


def test_a_command_offers_the_engines_that_can_do_it(capsys):
    def offered(command):
        assert main([command, "--engine", "slide rule"]) == 2
        return re.findall(r"'(\w+)'", capsys.readouterr().err.partition("expected one of")[2])

    assert offered("cpt") == offered("rpo") == offered("mini") == list(get_args(TrainerName))
    assert offered("curate") == offered("evaluate") == list(get_args(EngineName))
    assert {*get_args(EngineName)} == {name for name, home in HOMES.items() if home.engine}


def test_nothing_is_imported_by_its_name_elsewhere():
    importing = {"import_module", "__import__", "run_module", "spec_from_file_location"}
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                assert called not in importing or file in (TABLE, *OWN_PARTS), f"{file}:{node.lineno}"
            named = isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE.fullmatch(node.value)
            assert not named or file == TABLE or file.parts[0] == node.value.split(".")[0], f"{file}:{node.lineno}"
