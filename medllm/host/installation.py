"""How medllm is installed here, and so what a user types to get a part of it that is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from medllm.errors import UserError

_FOLDER = Path(__file__).resolve().parents[2]


def install_command(extra: str) -> str:
    """The line that installs what ``extra`` names (``jax``, ``torch``, ``plan``): into a checkout, or beside a wheel."""
    is_checkout = (_FOLDER / "pyproject.toml").is_file()
    return f"pip install -e '{_FOLDER}[{extra}]'" if is_checkout else f"pip install 'medllm[{extra}]'"


def require(what: str, package: str, extra: str) -> None:
    """Refuse, with the install command, where ``package`` is not installed.

    Raises:
        UserError: it is not.
    """
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what it is a part of is missing
        found = False
    if not found:
        raise UserError(f"{what} needs the package '{package}': {install_command(extra)}")
