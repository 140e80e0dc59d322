"""`check_environment` for PettingZoo environments, with what shows only where they are stepped."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mam.config import WorkerConfig
from mam.envs.check.check import check_environment
from mam.envs.check.report import Finding, Report, collapse
from mam.envs.check.rules import RARE, at_least
from mam.envs.external.audit import END, Audited, read_notes
from mam.envs.external.pool import ExternalPool

NUM_ENVS = 4
CHECKS = ("space", "mask_name", "limit_of_one")


def check_parallel(name: str, factory: Callable[..., Any], **kwargs: Any) -> Report:
    """Play a ParallelEnv in worker processes, and report what is wrong with it.

    Args:
        name: of the task.
        factory: as for `ExternalPool`.
        kwargs: as for `check_environment`.

    Raises:
        UserError: it cannot be made, or has spaces that are not supported.
    """
    with tempfile.TemporaryDirectory() as folder:
        with ExternalPool(
            name,
            Audited(name, factory, folder),
            NUM_ENVS,
            agent_id="none",
            limits=WorkerConfig(max_restarts=0),
        ) as env:
            report = check_environment(env, **kwargs)
        found = read_findings(folder)
    raised = any(finding.check == "exception" for finding in found)  # of which the pool says less
    others = [
        finding for finding in report.findings if not (raised and finding.check == "exception")
    ]
    return replace(report, findings=collapse([*found, *others]), checks=(*report.checks, *CHECKS))


def read_findings(folder: str) -> list[Finding]:
    """Return the findings from what all `Audited` environments noted in the folder."""
    notes = list(read_notes(folder))
    found = [Finding(*note) for note in notes if note[0] != END]
    return [*found, *limit_of_one([note[1:] for note in notes if note[0] == END])]


def limit_of_one(ends: Sequence[Sequence]) -> Iterator[Finding]:
    """Find agents that a time limit terminates where it truncates others.

    Args:
        ends: (step, agents that terminated, agents that were truncated, whether no agent goes on),
            for every step at which an agent ended.
    """
    at_limit = [(step, dead, cut) for step, dead, cut, over in ends if over and cut]
    for agent in sorted({agent for _, dead, _ in at_limit for agent in dead}):
        reached = [(step, agent in dead) for step, dead, cut in at_limit if agent in (*dead, *cut)]
        lives = [step for step, dead, cut, _ in ends if agent in (*dead, *cut)]
        terminations = sum(agent in dead for _, dead, _, _ in ends)
        count = sum(dead for _, dead in reached)
        hazard = (terminations - count + 1) / (sum(lives) + 1)
        if at_least(count, len(reached), hazard) < RARE:
            expected = "truncation at the time limit, as for other agents"
            got = f"termination in {count} of {len(reached)} episodes"
            yield Finding(
                "limit_of_one", "warning", "terminated", expected, got, agent, reached[0][0]
            )
