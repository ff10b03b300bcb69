"""What a verification says: one finding a check, and the certificate they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from medllm.errors import UserError

Status = Literal["proved", "refuted", "noted", "not checked"]
Verdict = Literal["proved", "refuted", "nothing proved"]

STEPS = "optimizer steps taken anew"
"""The check without which nothing is proved of a training."""


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        what: What was looked at.
        status: ``noted`` is what a reader should know and what proves nothing either way.
        where: The step, the file or the problem.
        said: What was found there.
        error: How far what was recorded is from what was computed, where that is a number.
        tolerance: What ``error`` may be.
        reason: Why it is not zero.
    """

    what: str
    status: Status
    where: str = ""
    said: str = ""
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""

    @property
    def words(self) -> str:
        """All of it on a line."""
        figures = "" if self.error is None else f"error {self.error:.1e}, tolerance {self.tolerance:.0e}"
        return ": ".join(filter(None, [self.where, self.what, "; ".join(filter(None, [self.said, figures]))]))


def held(what: str, where: str, differences: Sequence[str], said: str = "") -> list[Finding]:
    """``proved`` where there are no differences, else a ``refuted`` for each."""
    if not differences:
        return [Finding(what, "proved", where, said)]
    return [Finding(what, "refuted", where, difference) for difference in differences]


def refuted_by(what: str, error: UserError, where: str = "") -> Finding:
    """What a check of the stage itself refuses."""
    return Finding(what, "refuted", where, str(error))


@dataclass(frozen=True)
class Certificate:
    """What was found of a run.

    Attributes:
        run: Its folder's name.
        stage: Its stage.
        engine: The engine that made it.
        needed: Checks without which nothing is proved of such a run.
        findings: In the order they were made.
        facts: By what it was verified, and how much of it.
    """

    run: str
    stage: str
    engine: str
    needed: tuple[str, ...]
    findings: Sequence[Finding]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """``proved`` where nothing is refuted and every check that is ``needed`` proved something."""
        if self.of("refuted"):
            return "refuted"
        proved = {one.what for one in self.of("proved")}
        return "proved" if proved.issuperset(self.needed) else "nothing proved"

    @property
    def missing(self) -> list[str]:
        """The needed checks that proved nothing."""
        proved = {one.what for one in self.of("proved")}
        return [what for what in self.needed if what not in proved]

    def of(self, status: Status) -> list[Finding]:
        """The findings of a status."""
        return [one for one in self.findings if one.status == status]

    def headline(self) -> str:
        """The verdict in a sentence."""
        counts = Counter(one.status for one in self.findings)
        if first := next(iter(self.of("refuted")), None):
            more = f" (and {counts['refuted'] - 1} more)" if counts["refuted"] > 1 else ""
            return f"{self.run}: REFUTED: {first.words}{more}"
        if self.missing:
            return f"{self.run}: nothing proved: {', '.join(self.missing)} could not be checked"
        left = f", {counts['not checked']} not checked" if counts["not checked"] else ""
        return f"{self.run}: proved: {counts['proved']} checks hold{left}"

    def to_json(self) -> dict[str, Any]:
        """The contents of ``certificate.json``."""
        return {
            "ok": self.verdict == "proved",
            "verdict": self.verdict,
            "run": self.run,
            "stage": self.stage,
            "engine": self.engine,
            "missing": self.missing,
            **self.facts,
            "findings": [asdict(one) for one in self.findings],
        }
