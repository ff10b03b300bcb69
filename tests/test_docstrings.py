"""Every example in a docstring is true."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("medllm", "jax_medllm", "torch_ref", "medllm_parity")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def examples() -> list[tuple[str, str, str]]:
    """(module, name, docstring) of every docstring that holds an example."""
    found = []
    for file in sorted(file for package in PRODUCT for file in (ROOT / package).rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = (ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None) or ""
            if ">>>" in text:
                found.append((module, getattr(node, "name", module), text))
    return found


def test_there_are_examples():
    assert len(examples()) >= 2


@pytest.mark.parametrize(("module", "name", "text"), examples(), ids=lambda part: part if part.isidentifier() else "")
def test_an_example_is_true(module, name, text):
    given = vars(importlib.import_module(module)).copy()
    said: list[str] = []
    doctest.DocTestRunner().run(doctest.DocTestParser().get_doctest(text, given, name, module, 0), out=said.append)
    assert not said, "".join(said)
