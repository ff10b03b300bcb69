"""``convert`` and ``publish``, killed while they write, and given again.

::

    python -m tests.killed_writers 20

kills each so often with SIGKILL, at moments spread over its writing, some while the folder takes its name, and prints a line a
command. After each kill the folder is whole or not there; the same command then ends with the bytes of a folder that was
written undisturbed, and nothing half-written stays beside it.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from medllm.mini.study import BASE
from medllm.model.directory import ModelDirectory, write_model
from tests.killed_training import command, finish, inputs
from tests.kills import Job, until

COMMANDS = {
    "convert": "convert --adapter {run}/adapter --quantization nf4",
    "publish": "publish --adapter {run}/adapter --weights nf4 --chat_template none",
}
_DEEPER = 6  # times the layers of the base: to write it takes longer


def large_model(folder: Path) -> Path:
    """The base with each of its layers several times, so that a kill finds it at work."""
    base = ModelDirectory(BASE)
    layers = base.architecture.num_layers
    tensors = {}
    for name in base.names():
        head, found, rest = name.partition("layers.")
        number, _, part = rest.partition(".")
        for copy in range(_DEEPER if found else 1):
            tensors[f"{head}layers.{int(number) + copy * layers}.{part}" if found else name] = base.read(name)
    config = {**base.config, "num_hidden_layers": layers * _DEEPER}
    config.pop("layer_types", None)
    write_model(folder / "base", config, tensors.items(), companions_from=BASE)
    return folder / "base"


def trained(folder: Path) -> Path:
    """A training run of one step on that model, whose adapter changes something."""
    model, run = large_model(folder), folder / "cpt"
    words = command("jax", "cpt", [*inputs("cpt", folder), "--training.max_steps", "2"], run)
    words[words.index(str(BASE))] = str(model)
    finish(words)
    return run


def words_of(name: str, folder: Path, out: Path) -> list[str]:
    """The command, writing to ``out``."""
    given = COMMANDS[name].format(run=folder / "cpt").split()
    return [sys.executable, "-m", "medllm", *given, "--model", str(folder / "base"), "--out", str(out)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def beside(folder: Path) -> list[int]:
    """Sizes of the files in the scratch paths beside a target, whatever their names."""
    sizes = []
    for file in folder.glob(".*/**/*"):
        try:
            sizes.append(file.stat().st_size)
        except OSError:  # it has just been moved
            continue
    return sizes


def moment(number: int, kills: int, home: Path, expected: dict[str, bytes]) -> Callable[[], bool]:
    """When the kill of this number comes: by turns when a further part of the bytes lies beside the target, and when all of
    its files do, shortly before it takes its name or just then."""
    part = (number + 1) / kills * sum(map(len, expected.values()))
    if number % 2:
        return lambda: len(beside(home)) >= len(expected) or (home / "out").exists()
    return lambda: sum(beside(home)) >= part or (home / "out").exists()


def kill(name: str, folder: Path, kills: int) -> str:
    """Kill a command so often. What was seen, in a line."""
    finish(words_of(name, folder, folder / "whole" / "out"))
    expected = contents(folder / "whole" / "out")
    home, draw, seen = folder / "killed", random.Random(1), Counter[str]()
    home.mkdir()
    (home / ".out.mine.part").mkdir()  # a user's
    words = words_of(name, folder, home / "out")
    for number in range(kills):
        job = Job.of(words)
        until(moment(number, kills, home, expected), job)
        time.sleep(draw.choice((0, draw.uniform(0, 0.002), draw.uniform(0, 0.02))))
        job.kill(draw)
        there = (home / "out").exists()
        assert not there or contents(home / "out") == expected
        seen["already whole" if there else "half-written"] += 1
        if there:
            shutil.rmtree(home / "out")
    finish(words)
    left = sorted(path.name for path in home.iterdir())
    assert left == [".out.mine.part", "out"], left
    assert contents(home / "out") == expected
    found = ", ".join(f"{state} {count}" for state, count in sorted(seen.items()))
    return f"{name}: killed {kills} times: {found}; then {len(expected)} files equal, nothing left beside them"


def main(kills: int) -> None:
    """Every command, so many kills each."""
    for name in COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            trained(Path(folder))
            print(kill(name, Path(folder), kills), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
