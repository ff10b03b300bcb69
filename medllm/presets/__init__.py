"""The presets: YAML files of a command's settings, with the source or the reason of every number beside it.

The rows of the paper's tables are presets too, all in ``tables.yaml``: each is ``paper_evaluate_72b`` with what the row has
otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from medllm.errors import UserError

PRESETS = Path(__file__).parent
TABLE_ROWS = "table*_*"
"""The pattern of those that are rows of the paper's tables."""

# Table 3 is zero-shot, by likelihood after JMedBench's standard prompt, the one its own script takes.
_BY_LIKELIHOOD = {"method": "options", "option_prompt": "mcqa_with_options_jp", "shot_count": 0}


def preset_titles(pattern: str) -> dict[str, str]:
    """The presets that are files and whose names fit ``pattern`` (``paper_cpt_*``), each with the first line of its file."""
    files = sorted(file for one in pattern.split() for file in PRESETS.glob(f"{one}.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ") for file in files}


def table_rows(pattern: str) -> dict[str, dict[str, Any]]:
    """The rows of the paper's tables by name, each with its settings; none where ``pattern`` is not of them too."""
    if TABLE_ROWS not in pattern.split():
        return {}
    base = _read("paper_evaluate_72b")
    shared = {name: value for name, value in base["model"].items() if name not in ("path", "adapter")}
    rows = {}
    for row, own in _read("tables").items():
        for table in own.pop("tables"):
            name = f"table{table}_{row}"
            by_likelihood = _BY_LIKELIHOOD if table == 3 else {}
            rows[name] = base | own | {"model": shared | own["model"], "run": f"runs/{name}"} | by_likelihood
    return dict(sorted(rows.items()))


def preset_file(option: str, name: str, pattern: str) -> Path:
    """The file that ``--option name`` means: a YAML file of that path, or a preset whose name fits ``pattern``.

    Raises:
        UserError: it is neither; says which presets there are.
    """
    known = preset_titles(pattern)
    if Path(name).is_file():
        return Path(name)
    if name not in known:
        every = [*known, *table_rows(pattern)]
        named = f"neither a file nor a preset; there are {', '.join(every)}" if every else "no such file"
        raise UserError(f"{option} {name}: {named}")
    return PRESETS / f"{name}.yaml"


def preset_settings(option: str, name: str, pattern: str) -> str:
    """:func:`preset_file`, or the YAML of a row of the paper's tables.

    Raises:
        UserError: as there.
    """
    row = None if Path(name).is_file() else table_rows(pattern).get(name)
    return yaml.safe_dump(row, allow_unicode=True) if row else str(preset_file(option, name, pattern))


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
