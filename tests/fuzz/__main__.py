"""``python -m tests.fuzz --inputs 10000``: damaged files, as many as wanted, and what became of them."""

from __future__ import annotations

import argparse
import resource
import sys

from tests.fuzz.formats import FORMATS
from tests.fuzz.trial import outcome

MEMORY = 6 << 30  # addresses, of which libraries take two thirds; what asks for more fails


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code is 1 where a file ended otherwise than in a line."""
    parser = argparse.ArgumentParser(description="damage files of each format, and read them")
    parser.add_argument("--inputs", type=int, default=1000, help="files of each format")
    parser.add_argument("--only", nargs="*", default=list(FORMATS), help="formats, of all")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--whole", action="store_true", help="all that a command does with what it has read, a report's page")
    given = parser.parse_args(arguments)
    failed = 0
    print("| format | inputs | refused in a line | read all the same | anything else | slowest, s | memory, MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in given.only:
        found = outcome(name, range(given.first, given.first + given.inputs), whole=given.whole)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        counts = f"{given.inputs} | {found.refused} | {found.read} | {len(found.uncaught)}"
        print(f"| {name} | {counts} | {found.slowest:.2f} | {memory} |", flush=True)
        for error, count in found.kinds.most_common(12):
            first = next(number for number, one in found.uncaught if one == error)
            print(f"  {count} × {error} (first: input {first})", file=sys.stderr, flush=True)
        failed += len(found.uncaught)
    return 1 if failed else 0


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.exit(main())
