"""What the checks found, and how it reads."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and the first place where it is.

    An error breaks the protocol of `mam.types`, or leaves nothing to learn; a warning is legal, but
    more often a mistake than not.
    """

    check: str  # which check found it
    severity: Severity
    field: str  # of the specification, the time step or the state
    expected: str
    got: str
    agent: int | None = None
    step: int | None = None  # 0 = the reset, t = what the t-th action led to
    episode: int | None = None
    count: int = 1  # places in all; the others are not told

    def __str__(self) -> str:
        """Return one line: `error · action_mask · agent 2: expected a legal action, got none`."""
        where = (("agent", self.agent), ("episode", self.episode), ("step", self.step))
        places = ", ".join(f"{name} {value}" for name, value in where if value is not None)
        field = self.field if self.field != self.check else ""
        head = " · ".join(filter(None, (self.severity, self.check, field, places)))
        times = f" ({self.count:,} times)" if self.count > 1 else ""
        return f"{head}: expected {self.expected}, got {self.got}{times}"


def collapse(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Merge findings of one kind into the first of them, errors before warnings.

    Findings with a step are places of one mistake, whichever agent they name; those without are
    statements about an agent, and every agent keeps its own.
    """
    merged: dict[tuple[object, ...], Finding] = {}
    for finding in findings:
        agent = finding.agent if finding.step is None else None
        kind = (finding.check, finding.severity, finding.field, finding.expected, agent)
        known = merged.get(kind)
        merged[kind] = replace(known, count=known.count + finding.count) if known else finding
    return tuple(sorted(merged.values(), key=lambda finding: finding.severity))


@dataclass(frozen=True)
class Report:
    """All findings, and how much was looked at, so that "no findings" means something."""

    name: str  # of the task
    findings: tuple[Finding, ...]
    checks: tuple[str, ...]  # that were made
    episodes: int
    steps: int  # of these episodes
    seconds: float
    notes: tuple[str, ...] = ()  # what could not be looked at

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def passed(self) -> bool:
        """Whether there are no errors."""
        return not self.errors

    def lines(self) -> list[str]:
        """Return the report as text: one line for each finding and note, then the verdict."""
        num_errors, num_warnings = len(self.errors), len(self.warnings)
        found = (_count(num_errors, "error"), _count(num_warnings, "warning"))
        verdict = " and ".join(text for text in found if text) or "nothing found"
        seen = (
            f"{_count(self.episodes, 'episode') or 'no episode'}, "
            f"{_count(self.steps, 'step') or 'no step'}"
        )
        summary = (
            f"{self.name}: {verdict} · {len(self.checks)} checks of {seen} in {self.seconds:.1f} s"
        )
        return [*map(str, self.findings), *(f"note · {note}" for note in self.notes), summary]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number > 1)}" if number else ""
