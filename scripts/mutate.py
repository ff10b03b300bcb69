#!/usr/bin/env python
"""Plant the faults of ``faults/`` in the product, one at a time, and see whether the parity suite catches each.

    python scripts/mutate.py --jobs 2 --json found.json --docs docs/faults.md      # all of them, and their table in the docs
    python scripts/mutate.py --only rope-base --only nf4-tie
    python scripts/mutate.py --list

A fault is one exact piece of text replaced by another in one file of a copy of the working tree; the tree itself is never
touched. It is *caught* when a test fails by an assertion (or for want of an error it expects), or at an annotation of a shape.
It is *broken*, and counts as not caught, when something else happens: an import that fails, an exception in place of numbers.
Without a fault the same tests must be green, and every run proves that it imported the product from the copy. The test that
caught a fault before, by the docs' table, is run first; torch, transformers, TRL and JAX are imported once.

Exit code: 0 every fault caught, 1 some not, 2 bad usage or tests that are red without a fault.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import pytest
from jaxtyping import TypeCheckError

ROOT = Path(__file__).resolve().parents[1]
SUITE = "parity_tests"
PAGE = "docs/faults.md"
SECTION = "## The faults"
PRODUCT = ("jax_medllm", "medllm", "medllm_parity", "torch_ref")
LONGEST_RUN = 1800.0
"""Seconds after which a run of the suite is given up."""


class NotRun(Exception):
    """The check cannot be made; the message is one line for the user."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: A short name, unique.
        models: What goes wrong, in one line.
        file: The file it is planted in, relative to the root.
        old: Text that occurs exactly once in that file.
        new: What stands there instead.
        first: The test file tried first; only a fault that survives it meets the whole suite.
        caught_by: The test that the docs' table names, which is tried before the others.
    """

    name: str
    models: str
    file: str
    old: str
    new: str
    first: str
    caught_by: str | None = None

    @property
    def tests(self) -> tuple[str, ...]:
        """What is run with the fault, until something fails."""
        return *((f"{self.first}::{self.caught_by}",) if self.caught_by else ()), *dict.fromkeys((self.first, SUITE))

    def planted_in(self, text: str) -> str:
        """The file's text with the fault.

        Raises:
            NotRun: ``old`` does not occur exactly once.
        """
        count = text.count(self.old)
        if count != 1:
            raise NotRun(f"scripts/faults: {self.name}: `old` occurs {count} times in {self.file}; it must occur once")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Verdict:
    """What became of a fault: the test that decided it, or None where all passed, and the seconds that took."""

    name: str
    verdict: Literal["caught", "survived", "broken"]
    test: str | None
    message: str
    seconds: float


def read_faults(root: Path = ROOT) -> list[Fault]:
    """The declared faults. A file of them says once which ``file`` and ``first`` hold where a fault names none."""
    faults = []
    for path in sorted((root / "scripts" / "faults").glob("*.toml")):
        area = tomllib.loads(path.read_text(encoding="utf-8"))
        faults += [Fault(**{"file": area["file"], "first": area["first"], **entry}) for entry in area["fault"]]
    page = (root / PAGE).read_text("utf-8") if (root / PAGE).exists() else ""
    known = dict(re.findall(r"^\| (\S+) \|.*\| caught: `(\w+)` \|$", page, re.M))
    return [replace(fault, caught_by=known.get(fault.name)) for fault in faults]


class Check:
    """Runs the suite on copies of one snapshot of a working tree.

    Args:
        root: A git working tree.
        scratch: An empty folder for the snapshot, the copies and JAX's compiled programs, which all runs share.
    """

    def __init__(self, root: Path, scratch: Path):
        self._scratch = scratch.resolve()
        self._snapshot = self._scratch / "snapshot"
        self._green: set[str] = set()
        listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
            if name and (root / name).is_file():
                (self._snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / name, self._snapshot / name)

    def import_frameworks(self) -> None:
        """Import what the suite and the product import at their top, but for themselves: the forks then have it already."""
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self._scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for package in (SUITE, *PRODUCT):
            for file in sorted((self._snapshot / package).rglob("*.py")):
                for module, names in _imports(ast.parse(file.read_text(encoding="utf-8"))):
                    if module.partition(".")[0] not in (SUITE, *PRODUCT):
                        with suppress(ImportError):  # of an optional dependency
                            found = importlib.import_module(module)
                            [getattr(found, name, None) for name in names]  # transformers and TRL import at first use

    def require_green(self, path: str) -> None:
        """Run tests without a fault, unless they were already seen to pass.

        Raises:
            NotRun: one fails.
        """
        if self._green & {path, path.partition("::")[0], SUITE}:
            return
        report = self._pytest("unmutated", None, path)
        if report["failures"]:
            first = report["failures"][0]
            raise NotRun(f"without any fault {first['test']} fails ({first['message']}); make the parity suite green")
        if not report["passed"]:
            raise NotRun(f"without any fault no test of {path} runs; correct `first` in scripts/faults")
        self._green.add(path)

    def judge_all(self, faults: Sequence[Fault]) -> list[Verdict]:
        """Each in turn; of faults with the same first tests these run but once without a fault.

        Raises:
            NotRun: as :meth:`judge`.
        """
        return [self.judge(fault) for fault in faults]

    def judge(self, fault: Fault) -> Verdict:
        """Plant a fault and run its tests until one fails.

        Raises:
            NotRun: the fault cannot be planted, or the tests are red without it.
        """
        started = time.monotonic()
        for path in filter(self._there, fault.tests):
            self.require_green(path)
            report = self._pytest(fault.name, fault, path)
            if report["failures"]:
                first = report["failures"][0]
                verdict: Any = "caught" if first["asserted"] else "broken"
                return Verdict(fault.name, verdict, first["test"], first["message"], time.monotonic() - started)
        return Verdict(fault.name, "survived", None, "", time.monotonic() - started)

    def _there(self, path: str) -> bool:
        file, _, test = path.partition("::")
        return not test or f"\ndef {test}(" in (self._snapshot / file).read_text(encoding="utf-8")

    def _pytest(self, name: str, fault: Fault | None, path: str) -> dict[str, Any]:
        """Run tests in a fresh copy and answer with the probe's report.

        Raises:
            NotRun: pytest ended without a report, or imported the product from elsewhere.
        """
        copy = self._scratch / f"{name}-{os.getpid()}"
        report, log = copy / ".report.json", copy / ".log"
        shutil.copytree(self._snapshot, copy)
        try:
            if fault is not None:
                target = copy / fault.file
                target.write_text(fault.planted_in(target.read_text(encoding="utf-8")), encoding="utf-8")
            run = multiprocessing.get_context("fork").Process(target=_run_pytest, args=(copy, path, report, log))
            run.start()
            run.join(LONGEST_RUN)
            if run.is_alive():
                run.kill()
                run.join()
                return {"failures": [{"test": path, "asserted": False, "message": f"no end after {LONGEST_RUN:g} s"}]}
            if not report.exists():
                last = [*log.read_text(encoding="utf-8").strip().splitlines(), "it printed nothing"][-1]
                raise NotRun(f"{name}: pytest ended with {run.exitcode} and no report: {last}")
            found = json.loads(report.read_text(encoding="utf-8"))
            foreign = [file for file in found["imported"] if not Path(file).is_relative_to(copy)]
            if foreign:
                raise NotRun(
                    f"{name}: the tests imported {foreign[0]} and not the copy in {copy}; the check would prove nothing"
                )
            return found
        finally:
            shutil.rmtree(copy)


def _imports(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """(module, names taken from it) of the imports at the top of a file."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, [alias.name for alias in node.names]


class Probe:
    """A pytest plugin: the failures and their kind, how many tests passed, and which files the product was imported from."""

    def __init__(self) -> None:
        self.failures: list[dict[str, Any]] = []
        self.passed = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if report.failed:
            assert call.excinfo is not None
            said = (AssertionError, TypeCheckError, pytest.fail.Exception)  # the last: pytest.raises, where nothing was
            self._fail(item.nodeid, call.when == "call" and call.excinfo.errisinstance(said), call.excinfo.exconly())
        self.passed += report.passed and call.when == "call"
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Any:
        report = yield
        if report.failed:
            self._fail(collector.nodeid, False, str(report.longrepr).strip().splitlines()[-1])
        return report

    def report(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        loaded = [module for name, module in sys.modules.items() if name.partition(".")[0] in PRODUCT]
        files = sorted(str(Path(file).resolve()) for module in loaded if (file := getattr(module, "__file__", None)))
        return {"failures": self.failures, "passed": self.passed, "imported": files}

    def _fail(self, test: str, asserted: bool, message: str) -> None:
        self.failures.append({"test": test, "asserted": asserted, "message": " ".join(message.split())[:200]})


def _run_pytest(copy: Path, path: str, report: Path, log: Path) -> None:
    """In a fork: run tests in ``copy``, all output into ``log``."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)  # for what the tests start
    probe = Probe()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(copy / ".tests"), path], [probe])
    if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        report.write_text(json.dumps(probe.report()), encoding="utf-8")
    sys.stdout.flush()
    os._exit(code)


def table(faults: Sequence[Fault], verdicts: dict[str, Verdict]) -> str:
    """The table of ``docs/faults.md``."""
    lines = ["| fault | what goes wrong | planted in | verdict |", "|---|---|---|---|"]
    for fault in faults:
        found = verdicts[fault.name]
        where = f": `{found.test.partition('::')[2].partition('[')[0] or found.test}`" if found.test else ""
        lines.append(f"| {fault.name} | {fault.models} | `{fault.file}` | {found.verdict}{where} |")
    return "\n".join(lines) + "\n"


def write_table(page: Path, faults: Sequence[Fault], verdicts: dict[str, Verdict]) -> None:
    """Put the table into the section ``SECTION`` of a page, in place of the one that is there.

    Raises:
        NotRun: the page has no such section.
    """
    before, heading, rest = page.read_text(encoding="utf-8").partition(f"\n{SECTION}\n")
    if not heading:
        raise NotRun(f"{page}: has no section '{SECTION}' to put the table into; add it")
    section, following, after = rest.partition("\n## ")
    kept = [line for line in section.splitlines() if not line.startswith("|")]
    text = "\n".join(kept).rstrip() + "\n\n" + table(faults, verdicts)
    page.write_text(f"{before}{heading}{text}{following}{after}", encoding="utf-8")


def check(faults: Sequence[Fault], root: Path, *, jobs: int = 1) -> Iterator[Verdict]:
    """Judge faults, ``jobs`` at a time, each in a copy of its own; those with the same first tests one after another.

    The calling process must have started no threads: it is forked.

    Raises:
        NotRun: the tests are red without a fault, or a fault cannot be planted.
    """
    for fault in faults:
        fault.planted_in((root / fault.file).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        suite = Check(root, Path(folder))
        suite.import_frameworks()
        alike = sorted(faults, key=lambda fault: fault.first)
        groups = [list(group) for _, group in groupby(alike, key=lambda fault: fault.first)]
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
            judging = [pool.submit(suite.judge_all, group) for group in groups]
            try:
                for judged in as_completed(judging):
                    yield from judged.result()
            finally:
                [one.cancel() for one in judging]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="this fault alone (may be repeated)")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there, after each fault")
    parser.add_argument("--resume", action="store_true", help="keep the verdicts that the --json file already holds")
    parser.add_argument("--markdown", action="store_true", help="print the table of the docs at the end")
    parser.add_argument(
        "--docs", type=Path, metavar="FILE", help=f"put the table into the section '{SECTION[3:]}' of this page"
    )
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="the working tree (default: this one)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults judged at a time, each in its own copy")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = _parser()
    options = parser.parse_args(arguments)
    faults = read_faults(options.root)
    unknown = set(options.only or ()) - {fault.name for fault in faults}
    if unknown:
        parser.error(f"no fault is named {', '.join(sorted(unknown))}; --list shows their names")
    if options.resume and options.json is None:
        parser.error("--resume reads the verdicts of an earlier run from --json FILE; name it")
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; expected at least 1")
    if options.only and options.docs is not None:
        parser.error("--docs writes the table of all faults; leave --only out")
    faults = [fault for fault in faults if not options.only or fault.name in options.only]
    if options.list:
        print("\n".join(f"{fault.name:32} {fault.models}" for fault in faults))
        return 0
    known = _read_verdicts(options.json, faults) if options.resume and options.json.exists() else []
    verdicts = {verdict.name: verdict for verdict in known}
    open_faults = [fault for fault in faults if fault.name not in verdicts]
    try:
        for verdict in check(open_faults, options.root, jobs=options.jobs) if open_faults else ():
            verdicts[verdict.name] = verdict
            shown = f"{verdict.test}: {verdict.message}" if verdict.test else "no test failed"
            print(f"{verdict.verdict:8} {verdict.seconds:5.0f} s  {verdict.name}  {shown}", file=sys.stderr, flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps([asdict(one) for one in verdicts.values()], indent=1), encoding="utf-8")
        if options.docs is not None:
            write_table(options.docs, faults, verdicts)
    except NotRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        print(table(faults, verdicts), end="")
    caught = sum(verdict.verdict == "caught" for verdict in verdicts.values())
    print(f"{caught} of {len(faults)} faults caught", file=sys.stderr)
    return 0 if caught == len(faults) else 1


def _read_verdicts(path: Path, faults: Sequence[Fault]) -> list[Verdict]:
    wanted = {fault.name for fault in faults}
    found = [Verdict(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    return [verdict for verdict in found if verdict.name in wanted]


if __name__ == "__main__":
    sys.exit(main())
