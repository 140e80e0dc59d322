"""What is wrong with an environment, found by playing it: `check_environment`.

report         what was found, and how it reads
static         the specification, signatures, tracing
shapes         shapes and types
jax_play       plays an `Environment`, in the lanes of `lanes`
external_play  plays `ExternalEnvironments`, in the runs of `external_run`
parallel       the same for PettingZoo's, with what their workers noted
recording      what was played
rules          what must hold of it: what is seen and earned;
episode_rules  how episodes end and start, and what actions do
scale_rules    the size of numbers beside each other
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jaxtyping

from mam.envs.check import episode_rules, external_play, jax_play, rules, scale_rules
from mam.envs.check.recording import STEP_LIMIT, Recording
from mam.envs.check.report import Finding, Report, Severity, collapse
from mam.envs.check.shapes import is_fatal
from mam.envs.check.static import (
    Unplayable,
    batch_environment,
    check_retraced,
    check_signatures,
    check_spec,
    check_traced,
    read_spec,
    trace_environment,
)
from mam.envs.wrappers import AutoReset
from mam.types import EnvSpec

__all__ = ["Finding", "Report", "Severity", "check_environment"]

RULES = (*rules.RULES, *episode_rules.RULES, *scale_rules.RULES)
CHECKS = (
    *(
        "protocol",
        "spec",
        "exception",
        "shape",
        "dtype",
        "metrics",
        "determinism",
        "keys_ignored",
        "dead_acts",
    ),
    *(rule.__name__ for rule in RULES),
)
JAX_CHECKS = ("jit", "vmap", "structure", "weak_type", "hidden_state")
EXTERNAL_CHECKS = ("leak", "env_seeds", "env_independence", "overwritten")
_METHODS = {
    False: {"reset": ("key",), "step": ("state", "action", "key"), "animate": ("states", "path")},
    True: {"reset": ("seed",), "step": ("action",), "close": ()},
}


def check_environment(
    env: Any, *, seed: int = 0, num_episodes: int = 24, time_budget: float = 25.0
) -> Report:
    """Play episodes of random legal actions, and report broken rules and likely mistakes.

    A finding that makes playing impossible (of shapes, say) hides others: mend it, then check
    again.

    Args:
        env: an `Environment`, an `AutoReset` (of which the inner environment is checked), or
            `ExternalEnvironments`, which are left open. Annotated as anything, because whether it
            is one of them is the question.
        seed: decides keys and actions.
        num_episodes: how many to play at least.
        time_budget: seconds after which no further step is played. A single call that takes long
            (compilation, a simulator's step) is waited for.
    """
    start = time.perf_counter()
    env = env.env if isinstance(env, AutoReset) else env
    is_external = hasattr(env, "num_envs") and not hasattr(env, "animate")
    name, findings, recording = type(env).__name__, [], None
    with _unchecked_types():
        try:
            spec = read_spec(env)
            name = str(spec.name)
            _report(findings, check_spec(spec))
            _report(findings, check_signatures(env, _METHODS[is_external]))
            play = _play_external if is_external else _play_jax
            recording = play(env, spec, findings, seed, num_episodes, start + time_budget)
        except Unplayable as error:
            findings.extend(error.findings)
    if recording is not None and recording.episodes:
        notes = (*getattr(env, "notes", ()), *_notes(recording))
    else:
        notes = ["not all could be checked: mend this first"]
    return Report(
        name,
        collapse(findings),
        checks=(*CHECKS, *(EXTERNAL_CHECKS if is_external else JAX_CHECKS)),
        episodes=len(recording.episodes) if recording else 0,
        steps=sum(episode.length for episode in recording.episodes) if recording else 0,
        seconds=time.perf_counter() - start,
        notes=tuple(notes),
    )


def _play_jax(
    env: Any, spec: EnvSpec, findings: list[Finding], seed: int, num_episodes: int, deadline: float
) -> Recording:
    traced = trace_environment(env, spec)
    _report(findings, check_traced(traced, spec))
    batch_environment(env, traced)
    recording = jax_play.play(env, spec, traced.first[1], seed, num_episodes, deadline)
    _judge(findings, recording)
    try:
        findings.extend(check_retraced(traced, env, spec))
    except Unplayable as error:
        findings.extend(error.findings)
    return recording


def _play_external(
    env: Any, spec: EnvSpec, findings: list[Finding], seed: int, num_episodes: int, deadline: float
) -> Recording:
    if not isinstance(env.num_envs, int) or env.num_envs < 1:
        raise Unplayable(
            Finding(
                "protocol", "error", "num_envs", "a whole number, at least 1", repr(env.num_envs)
            )
        )
    recording = external_play.play(env, spec, seed, num_episodes, deadline)
    _judge(findings, recording)
    return recording


def _judge(findings: list[Finding], recording: Recording) -> None:
    findings.extend(recording.findings)
    if recording.episodes:
        for rule in RULES:
            findings.extend(rule(recording))


def _report(findings: list[Finding], found: Iterator[Finding]) -> None:
    """Add to the findings; raise `Unplayable` if one of them makes playing impossible."""
    found_now = list(found)
    findings.extend(found_now)
    if any(map(is_fatal, found_now)):
        raise Unplayable


def _notes(recording: Recording) -> Iterator[str]:
    """Yield what the episodes did not show."""
    yield from recording.notes
    limit = recording.spec.time_limit
    longest = max(episode.length for episode in recording.episodes)
    if limit is None and not recording.ended and longest < STEP_LIMIT:
        yield f"no episode ended within {longest:,} steps"
    if limit is not None and longest < limit:
        yield f"no episode got to the time limit of {limit:,} steps; the longest had {longest:,}"


@contextlib.contextmanager
def _unchecked_types() -> Iterator[None]:
    """Turn off the run-time checks of jaxtyping's import hook: findings say more, and go on."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
