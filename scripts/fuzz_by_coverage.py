"""Files of each format of ``tests/fuzz``, damaged where the coverage of their readers leads (atheris, libFuzzer).

::

    python -m venv FOLDER && FOLDER/bin/pip install atheris 'medllm[jax,torch,eval] @ .'
    FOLDER/bin/python scripts/fuzz_by_coverage.py --inputs 10000 --found FOLDER/found

prints a row a format, and keeps each input that ended otherwise than read or refused in a line, one of a kind. A third of the
damage is libFuzzer's own, which knows which bytes the reader compares; the rest is that of ``tests/fuzz/mutations.py``, which
keeps a file of its format. What reaches a new place is damaged further. A format is a process: libFuzzer ends it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 8 << 30
COLUMNS = {
    "inputs": "inputs",
    "refused in a line": "refused",
    "read all the same": "read",
    "anything else": "others",
    "slowest, s": "slowest",
    "memory, MiB": "memory",
}
"""Heading of a column → its name among what is counted."""


def main() -> int:
    """Run it; the exit code is 1 where an input ended otherwise than in a line."""
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description="damage files of each format by coverage, and read them")
    parser.add_argument("--inputs", type=int, default=10_000, help="files of each format")
    parser.add_argument("--only", nargs="*", help="formats, of all")
    parser.add_argument("--found", type=Path, default=Path("found"), help="folder of the inputs that ended otherwise")
    parser.add_argument("--seconds", type=int, default=3600, help="at most, for a format")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return fuzz(given.child, given.inputs, given.found)
    from tests.fuzz.formats import FORMATS

    failed = 0
    print(f"| format | {' | '.join(COLUMNS)} | places reached |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in given.only or FORMATS:
        words = [sys.executable, __file__, "--child", name, "--inputs", str(given.inputs), "--found", str(given.found)]
        with tempfile.NamedTemporaryFile("w+") as said:
            try:
                subprocess.run(words, stdout=subprocess.PIPE, stderr=said, timeout=given.seconds, cwd=ROOT, check=False)
            except subprocess.TimeoutExpired:
                print(f"{name}: stopped after {given.seconds} s", file=sys.stderr, flush=True)
            said.seek(0)
            places = [line.split("cov: ")[1].split()[0] for line in said.read().splitlines() if "cov: " in line]
        counts = given.found / f"{name}.json"
        if not counts.exists():
            print(f"| {name} | 0 | | | the process ended | | | |", flush=True)
            failed += 1
            continue
        found = json.loads(counts.read_text())
        row = [f"{found[one]:.2f}" if one == "slowest" else str(found[one]) for one in COLUMNS.values()]
        print(f"| {name} | {' | '.join(row)} | {places[-1] if places else ''} |", flush=True)
        for kind, count in found["kinds"].items():
            print(f"  {count} × {kind}", file=sys.stderr, flush=True)
        failed += found["others"]
    return 1 if failed else 0


def fuzz(name: str, inputs: int, folder: Path) -> int:
    """Read so many damaged files of a format, in this process, and write down what became of them."""
    import atheris

    with atheris.instrument_imports(include=["medllm"]):
        from tests.fuzz.formats import FORMATS
        from tests.fuzz.trial import read_one
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    folder.mkdir(parents=True, exist_ok=True)
    where = tempfile.TemporaryDirectory()
    home, kind = Path(where.name), FORMATS[name]
    kind.example(home)
    file = home / kind.file
    good = file.read_bytes()
    seeds = home / "seeds-of-the-fuzzer"
    seeds.mkdir()
    (seeds / "good").write_bytes(good)
    counts = {"inputs": 0, "read": 0, "refused": 0, "others": 0, "slowest": 0.0, "memory": 0, "kinds": {}}

    def one(data: bytes) -> None:
        file.unlink()
        file.write_bytes(data)
        began = time.process_time()
        outcome = read_one(kind.read, home)
        counts["slowest"] = max(counts["slowest"], time.process_time() - began)
        counts["inputs"] += 1
        if outcome in ("read", "refused"):
            counts[outcome] += 1
        else:
            counts["others"] += 1
            if outcome not in counts["kinds"]:
                (folder / f"{name}-{len(counts['kinds'])}").write_bytes(data)
            counts["kinds"][outcome] = counts["kinds"].get(outcome, 0) + 1
        counts["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        if counts["inputs"] % 100 == 0 or counts["inputs"] >= inputs:
            (folder / f"{name}.json").write_text(json.dumps(counts))

    atheris.Setup(
        [
            name,
            f"-runs={inputs}",
            f"-max_len={2 * len(good) + 4096}",
            "-timeout=60",
            "-mutate_depth=2",
            "-rss_limit_mb=0",
            "-seed=1",
            str(seeds),
        ],
        one,
        custom_mutator=mutator(kind.damages),
    )
    atheris.Fuzz()
    return 0


def mutator(damages: tuple[Callable[[bytes, random.Random], bytes], ...]) -> Callable[[bytes, int, int], bytes]:
    """libFuzzer's damage, or one that keeps a file of its format."""
    import atheris

    def damaged(data: bytes, at_most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if damages and rng.random() < 0.7:
            try:
                return rng.choice(damages)(data, rng)[:at_most]
            except Exception:  # no longer a file of its format
                return atheris.Mutate(data, at_most)
        return atheris.Mutate(data, at_most)

    return damaged


if __name__ == "__main__":
    sys.exit(main())
