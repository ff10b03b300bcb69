"""The presets: YAML files of a command's settings, with the source or the reason of every number beside it."""

from __future__ import annotations

from pathlib import Path

from medllm.errors import UserError

PRESETS = Path(__file__).parent


def preset_titles(pattern: str) -> dict[str, str]:
    """The presets whose names fit ``pattern`` (``paper_cpt_*``), each with the first line of its file."""
    files = sorted(PRESETS.glob(f"{pattern}.yaml")) if pattern else []
    return {file.stem: file.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ") for file in files}


def preset_file(option: str, name: str, pattern: str) -> Path:
    """The file that ``--option name`` means: a YAML file of that path, or a preset whose name fits ``pattern``.

    Raises:
        UserError: it is neither; says which presets there are.
    """
    known = preset_titles(pattern)
    if Path(name).is_file():
        return Path(name)
    if name not in known:
        named = f"neither a file nor a preset; there are {', '.join(known)}" if known else "no such file"
        raise UserError(f"{option} {name}: {named}")
    return PRESETS / f"{name}.yaml"
