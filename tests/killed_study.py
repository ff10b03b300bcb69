"""The embedded study, killed and begun again.

::

    python -m tests.killed_study 20
    python -m tests.killed_study 20 jax 2

kills ``medllm mini`` so often, or ``medllm ablate`` with so many trainings of each model, each time when it has got further,
and prints a line: which of its stages were finished at each kill, and whether all files are those of a study that was left
alone.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from tests.killed_training import finish
from tests.kills import Job, until

_MADE = ("*/p*.jsonl", "*/adapter/*.safetensors", "*/merged/*.safetensors")


def done(study: Path) -> int:
    """Bytes of what the study has logged, kept and finished so far."""
    files = [file for pattern in ("*/*.jsonl", "*/*.journal", "*/result.json") for file in study.glob(pattern)]
    return sum(file.stat().st_size for file in files)


def kill(folder: Path, kills: int, engine: str = "jax", seeds: str = "") -> str:
    """Kill a study so often. What was seen, in a line."""
    words = f"ablate --seeds {seeds}" if seeds else "mini"

    def command(out: str) -> list[str]:
        options = f"-m medllm {words} --preset mini_smoke --engine {engine} --out {folder / out}"
        return [sys.executable, *options.split()]

    finish(command("whole"))
    study, draw, seen = folder / "study", random.Random(1), []
    total = done(folder / "whole")
    for number in range(kills):
        job = Job.of(command("study"))
        until(lambda least=total * number // kills: study.exists() and done(study) >= least, job)
        time.sleep(draw.uniform(0, 1))
        job.kill(draw)
        seen.append(len([*study.glob("*/result.json")]))
    if not (study / "result.json").exists():
        finish(command("study"))
    files = [file.relative_to(folder / "whole") for pattern in _MADE for file in (folder / "whole").glob(pattern)]
    other = [str(file) for file in files if (study / file).read_bytes() != (folder / "whole" / file).read_bytes()]
    left = [file.name for file in study.rglob("*") if ".part" in file.name or file.name == ".jobs"]
    assert not other, other
    assert not left, left
    return f"{words}, {engine}: killed with {seen} stages finished; {len(files)} files equal"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print(kill(Path(made), int(sys.argv[1]), *sys.argv[2:]), flush=True)
