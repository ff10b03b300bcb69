"""Checkpoints that are damaged in every way thought of, one run each, and what the command that goes on makes of it.

::

    python -m tests.damaged_checkpoints jax cpt 4

A run of six steps was ended after the fourth, with the checkpoints of steps 3 and 4. In each trial one file of the newest is
damaged, or the whole of it; where it is alone, and one in four also where the one before lies beside it. Good is the adapter of
a run left alone, byte for byte, or a refusal: exit code 2 and one line.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from medllm.cli import main as medllm
from tests.killed_training import command, inputs

HALF, WHOLE = 4, 6
_WEIGHTS = "adapter/adapter_model.safetensors"


def flipped(at: float) -> Callable[[Path], None]:
    """One bit of the byte at this part of a file."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[min(int(at * len(content)), len(content) - 1)] ^= 1 << random.Random(str(file)).randrange(8)
        file.write_bytes(content)

    return damage


def cut(size: Callable[[int], int]) -> Callable[[Path], None]:
    """A file's first so many bytes."""
    return lambda file: file.write_bytes(file.read_bytes()[: size(file.stat().st_size)]) and None


OF_A_FILE: dict[str, Callable[[Path], object]] = {
    **{f"bit flipped at {at:.0%}": flipped(at) for at in (0, 0.37, 0.73, 1)},
    "cut to a half": cut(lambda size: size // 2),
    "cut by a byte": cut(lambda size: size - 1),
    "empty": cut(lambda size: 0),
    "gone": lambda file: file.unlink(),
}


def ways(newest: Path, before: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Names of the damages, and what does each to a copy of the newest checkpoint."""
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    for file in files:
        content = (newest / file).read_bytes()
        for name, damage in OF_A_FILE.items():
            if content or name == "gone":
                yield f"{file}: {name}", lambda folder, file=file, damage=damage: damage(folder / file)
        older = before / file
        if older.exists() and older.read_bytes() != content:
            yield f"{file}: that of the step before", lambda folder, file=file, older=older: shutil.copy(older, folder / file)
    largest = sorted(files, key=lambda file: -(newest / file).stat().st_size)[:2]
    yield "two files swapped", lambda folder: swap(*(folder / file for file in largest))
    yield "all of it that of the step before", lambda folder: (shutil.rmtree(folder), shutil.copytree(before, folder))
    yield "empty folder", lambda folder: (shutil.rmtree(folder), folder.mkdir())


def swap(one: Path, other: Path) -> None:
    """Each under the other's name."""
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def call(words: list[str], run: Path, steps: int) -> tuple[int, str]:
    """A command of :func:`tests.killed_training.command`, in this process: its exit code, and what it said."""
    words = [word for word in words[3:] if word]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = medllm([*words, "--run", str(run), "--resume", "auto", "--training.max_steps", str(steps)])
    return code, said.getvalue()


def verdict(code: int, said: str, run: Path, expected: bytes) -> str:
    """What became of a damage."""
    if code == 0:
        return "same" if (run / _WEIGHTS).read_bytes() == expected else "SILENTLY ANOTHER"
    last = said.rstrip("\n").split("\n")[-1]
    clear = code == 2 and last.startswith("medllm: ") and "Traceback" not in said
    return "refused in a line" if clear else f"ANOTHER FAILURE ({last[:200]})"


def trial(engine: str, stage: str, folder: Path, every: int = 1) -> Iterator[tuple[str, str, str]]:
    """Each damage, whether the checkpoint before was there, and what became of it.

    First all of them to a checkpoint that is alone, the harder case and the quicker one: a refusal trains nothing. Then
    one in ``every`` with the one before beside it.
    """
    options = inputs(stage, folder)
    words = command(engine, stage, options, folder / "run")
    code, said = call(words, folder / "whole", WHOLE)
    assert code == 0, said
    expected = (folder / "whole" / _WEIGHTS).read_bytes()
    code, said = call(words, folder / "half", HALF)
    assert code == 0, said
    shutil.rmtree(folder / "half" / "adapter")
    (folder / "half" / "result.json").unlink()
    # TRL writes a model card beside them.
    before, newest = sorted(file for file in (folder / "half" / "checkpoints").iterdir() if file.is_dir())
    found = list(ways(newest, before))
    for beside, some in (("alone", found), ("with the one before", found[::every])):
        for name, damage in some:
            run = folder / "damaged"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(folder / "half", run)
            if beside == "alone":
                shutil.rmtree(run / "checkpoints" / before.name)
            damage(run / "checkpoints" / newest.name)
            code, said = call(words, run, WHOLE)
            yield name, beside, verdict(code, said, run, expected)


def main(engine: str, stage: str, every: str = "1") -> None:
    """The command of the module's docstring."""
    with tempfile.TemporaryDirectory() as folder:
        counts: dict[str, Counter[str]] = {}
        for name, beside, found in trial(engine, stage, Path(folder), int(every)):
            counts.setdefault(beside, Counter())[found.split(" (")[0]] += 1
            print(f"{name}, {beside}: {found}", flush=True)
        for beside, of in counts.items():
            print(f"{engine}, {stage}, {beside}: {of.total()} ways: {dict(of)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
