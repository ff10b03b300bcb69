"""A module is read in one sitting, a function on one screen. Nothing is longer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("medllm", "jax_medllm", "torch_ref", "medllm_parity", "parity_tests", "tests", "scripts")
MODULE, FUNCTION = 400, 60


def too_long() -> Iterator[tuple[str, int]]:
    """(name, lines) of every module and function beyond its limit."""
    for file in sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        name, text = str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MODULE:
            yield name, lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > FUNCTION:
                yield f"{name}::{node.name}", lines


def test_nothing_is_longer_than_it_may_be():
    assert dict(too_long()) == {}, "cut it"
