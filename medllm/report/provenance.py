"""What a study was made with, from what, and how it is made again: its environment, training data and commands, in words."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medllm.report.study import RunSummary

_TRAINED_ON = ("corpus.documents", "corpus.problems", "problems", "preferences")
"""The settings of a training or curation that name what a model learns from."""
_LEARNS = ("cpt", "curate", "rpo")


def commands(runs: Sequence[RunSummary]) -> list[str]:
    """The commands of the runs in their order, each once: a study of many stages may be one command."""
    given = (run.environment.get("command") for run in runs)
    return list(dict.fromkeys(_command(words) for words in given if isinstance(words, (list, tuple)) and words))


def trained_on(runs: Sequence[RunSummary]) -> list[tuple[str, str]]:
    """Of each run that trains or curates, the files that it learns from."""
    named = [(run.name, ", ".join(_named(run.config))) for run in runs if run.stage in _LEARNS]
    return [(name, files) for name, files in named if files]


def origin(environment: Mapping[str, Any]) -> list[str]:
    """When, on what, with which frameworks and from which commit, short enough for the head of the page."""
    packages = environment.get("packages")
    packages = packages if isinstance(packages, Mapping) else {}
    facts = [
        str(environment.get("started") or "")[:10],
        str(environment.get("devices") or environment.get("processor") or ""),
        f"{environment['cpus']} CPU cores" if environment.get("cpus") else "",
        *(f"{name} {packages[name]}" for name in ("medllm", "jax", "torch") if name in packages),
        f"commit {str(environment['git_commit'])[:10]}" if environment.get("git_commit") else "",
    ]
    return [fact for fact in facts if fact]


def environment_lines(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader looks for first, then whatever else was recorded."""
    lines = []
    names = {"started": "date", "git_commit": "commit", "cpus": "CPU cores", "platform": "system", "python": "Python"}
    first = ["started", "processor", "cpus", "devices", "platform", "python", "packages", "git_commit", "command"]
    for key in [*first, *(key for key in environment if key not in first)]:
        value = environment.get(key)
        if value in (None, "", [], {}):
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif isinstance(value, (list, tuple)):
            value = " ".join(map(str, value))
        lines.append((names.get(key, key.replace("_", " ")), str(value)))
    return lines


def _command(words: Sequence[Any]) -> str:
    """As it is typed: the program by its name alone."""
    program, *rest = map(str, words)
    return shlex.join([Path(program).name, *rest])


def _named(config: Mapping[str, Any]) -> Iterator[str]:
    for name in _TRAINED_ON:
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        yield from [value] if isinstance(value, str) else map(str, value) if isinstance(value, (list, tuple)) else ()
