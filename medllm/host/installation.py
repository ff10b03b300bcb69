"""How medllm is installed here, and so what a user types to get a part of it that is missing."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[2]


def install_command(extra: str) -> str:
    """The line that installs what ``extra`` names (``jax``, ``torch``, ``plan``): into a checkout, or beside a wheel."""
    is_checkout = (_FOLDER / "pyproject.toml").is_file()
    return f"pip install -e '{_FOLDER}[{extra}]'" if is_checkout else f"pip install 'medllm[{extra}]'"
