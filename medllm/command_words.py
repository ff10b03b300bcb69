"""Words on the command line that jsonargparse does not know by itself: names of presets, and lists without brackets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from medllm.config import CptConfig, CurateConfig, EvaluateConfig, RpoConfig
from medllm.errors import UserError

PRESETS = Path(__file__).parent / "presets"


def name_presets(argv: list[str]) -> list[str]:
    """``--config paper_cpt_72b`` → the preset's file."""
    named = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    for index, word in enumerate(named[:-1]):
        preset = PRESETS / f"{named[index + 1]}.yaml"
        if word == "--config" and not Path(named[index + 1]).exists():
            if not preset.exists():
                known = ", ".join(sorted(path.stem for path in PRESETS.glob("paper_*.yaml")))
                raise UserError(f"--config {named[index + 1]}: neither a file nor a preset; there are {known}")
            named[index + 1] = str(preset)
    return named


def _list_options() -> set[str]:
    """Dotted names of all settings that hold several values."""

    def walk(config_class: Any, prefix: str) -> Iterator[str]:
        for name, kind in get_type_hints(config_class).items():
            if hasattr(kind, "__dataclass_fields__"):
                yield from walk(kind, f"{prefix}{name}.")
            elif any(get_origin(part) is tuple and get_args(part)[0] is str for part in (kind, *get_args(kind))):
                yield f"--{prefix}{name}"

    stages = (CptConfig, CurateConfig, RpoConfig, EvaluateConfig)
    return {option for stage in stages for option in walk(stage, "")} | {"--documents", "--adapter", "--engines", "--depths"}


def gather_lists(argv: list[str], with_actions: Sequence[str]) -> list[str]:
    """``--problems A B`` → ``--problems ["A", "B"]``, for settings that hold several values (not those of ``score``)."""
    if not argv or argv[0] == "score" or argv[:2] == ["data", "export-trl"]:
        return argv
    lists = _list_options() - ({"--problems"} if argv[0] in with_actions else set())
    gathered: list[str] = []
    index = 0
    while index < len(argv):
        word = argv[index]
        gathered.append(word)
        index += 1
        if word not in lists:
            continue
        values = []
        while index < len(argv) and not argv[index].startswith("--"):
            values.append(argv[index])
            index += 1
        # One adapter is a plain string, as it is in a preset.
        if len(values) == 1 and (values[0].startswith("[") or word == "--model.adapter"):
            gathered.append(values[0])
        elif values:
            gathered.append(json.dumps(values, ensure_ascii=False))
    return gathered
