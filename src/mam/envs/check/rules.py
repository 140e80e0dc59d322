"""Rules for what is seen and earned: pure functions that yield what breaks them in a recording."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mam.envs.check.recording import Episode, Numbers, Recording, component_parts, differs
from mam.envs.check.report import Finding, Severity

HUGE = 1e6  # of an observation or reward: what networks do not survive unnormalised
RARE = 1e-4  # a coincidence less likely than this is called a pattern
FEW_EPISODES, MANY_STEPS = 5, 1000  # with fewer, what was not seen may just be late

Rule = Callable[[Recording], Iterator[Finding]]


def places(
    episode: Episode,
    bad: Numbers,
    finding: tuple[str, Severity, str, str],
    got: Callable[[Any], str] | str,
    *,
    per_agent: bool = True,
    offset: int = 0,
) -> Iterator[Finding]:
    """Yield one finding for all places where `bad` [steps(, agents)(, …)] is True.

    `got` may depend on the first of them.
    """
    bad = np.asarray(bad, bool)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        agent = place[1] if per_agent and bad.ndim > 1 else None
        count = (
            int(bad.reshape(*bad.shape[: 1 + per_agent], -1).any(axis=-1).sum())
            if bad.ndim > 1
            else int(bad.sum())
        )
        text = got if isinstance(got, str) else got(place)
        yield Finding(*finding, text, agent, place[0] + offset, episode.number, count)


def _fields(episode: Episode) -> Iterator[tuple[str, Numbers, int]]:
    """Yield every array of numbers with its name and the step of its first row."""
    observation = episode.observation
    for name in ("agents_view", "grid", "state"):
        if (value := getattr(observation, name)) is not None:
            yield name, value, 0
    yield "reward", episode.timestep.reward, 1
    if episode.first is not None:
        yield "reward", episode.first.reward[None], 0
        yield from (
            (f"metrics.{name}", value[None], 0) for name, value in episode.first.metrics.items()
        )
    yield from ((f"metrics.{name}", value, 1) for name, value in episode.timestep.metrics.items())


def flags(episode: Episode) -> Numbers:
    """Return `terminated` and `truncated`, [T, 2]."""
    return np.stack([episode.timestep.terminated, episode.timestep.truncated], axis=1).astype(bool)


def chance(num_changed: int, num_others: int, num_suspects: int) -> float:
    """Return how likely none of `num_suspects` steps changed anything.

    Those that did are taken to be any `num_changed` of all steps.
    """
    total = num_others + num_suspects
    return float(np.prod([(total - num_changed - i) / (total - i) for i in range(num_suspects)]))


def at_least(num_hits: int, num_tries: int, probability: float) -> float:
    """Return how likely so many hits or more are."""
    few = (
        math.comb(num_tries, k) * probability**k * (1 - probability) ** (num_tries - k)
        for k in range(num_hits)
    )
    return 1.0 - math.fsum(few)


def num_steps(recording: Recording) -> int:
    return sum(episode.length for episode in recording.episodes)


def enough(recording: Recording) -> bool:
    """Say whether what was not seen until now is not just late."""
    return len(recording.ended) >= FEW_EPISODES or num_steps(recording) >= MANY_STEPS


# Numbers


def finite(recording: Recording) -> Iterator[Finding]:
    """Find non-finite values in any field."""
    for episode in recording.episodes:
        for name, value, offset in _fields(episode):
            if value.dtype.kind == "f":
                kind = ("finite", "error", name, "finite numbers")
                per_agent = name in ("agents_view", "grid", "reward")
                bad = ~np.isfinite(value)
                yield from places(
                    episode,
                    bad,
                    kind,
                    lambda at, x=value: str(x[at]),
                    per_agent=per_agent,
                    offset=offset,
                )


def action_bounds(recording: Recording) -> Iterator[Finding]:
    """Find non-finite values that always follow components of exactly ±1, which are legal."""
    if not recording.spec.continuous:
        return
    followed = []
    for episode in recording.episodes:
        bad = ~np.isfinite(episode.observation.agents_view[1:]).all(axis=-1) | ~np.isfinite(
            episode.timestep.reward
        )
        if bad.any():
            step = int(np.argmax(bad.any(axis=1)))
            extreme = (np.abs(episode.action[step]) == 1).any(axis=-1)
            followed.append((episode.number, step + 1, np.flatnonzero(bad[step] & extreme)))
    if len(followed) >= 3 and all(len(agents) for *_, agents in followed):
        number, step, agents = followed[0]
        got = f"numbers that are not finite, in {len(followed)} episodes"
        expected = "actions with components of ±1 to be taken as any other"
        yield Finding(
            "action_bounds", "error", "action", expected, got, int(agents[0]), step, number
        )


def magnitude(recording: Recording) -> Iterator[Finding]:
    """Find observations and rewards that are too large for networks."""
    for episode in recording.episodes:
        for name, value, offset in _fields(episode):
            if not name.startswith("metrics"):
                kind = ("magnitude", "warning", name, f"numbers up to {HUGE:,.0f}, better near 1")
                bad = np.isfinite(value) & (np.abs(np.asarray(value, np.float64)) > HUGE)
                got = lambda at, x=value: f"{x[at]:g}"  # noqa: E731
                yield from places(episode, bad, kind, got, per_agent=name != "state", offset=offset)


# Masks


def action_mask(recording: Recording) -> Iterator[Finding]:
    """Find agents, dead or alive, that have no legal action in some component."""
    for episode in recording.episodes:
        got = lambda at, x=episode.observation.alive: (  # noqa: E731
            "none" if x[at] else "none (the agent is dead)"
        )
        for number, mask in enumerate(
            component_parts(recording.spec, episode.observation.action_mask)
        ):
            where = "" if recording.spec.action_components is None else f" in component {number}"
            kind = ("action_mask", "error", "action_mask", f"at least one legal action{where}")
            yield from places(episode, ~mask.any(axis=-1), kind, got)


def never_legal(recording: Recording) -> Iterator[Finding]:
    """Find actions that are never legal."""
    if not enough(recording):
        return
    masks = [episode.observation.action_mask.any(axis=(0, 1)) for episode in recording.episodes]
    got = f"illegal in all {num_steps(recording):,} steps"
    for number, legal in enumerate(component_parts(recording.spec, np.any(masks, axis=0))):
        where = "" if recording.spec.action_components is None else f" of component {number}"
        for action in np.flatnonzero(~legal):
            expected = f"action {action}{where} to be legal at some time"
            yield Finding("never_legal", "warning", "action_mask", expected, got)


def mask_frozen(recording: Recording) -> Iterator[Finding]:
    """Find masks that depend on where an episode starts, but not on how it goes on."""
    masks = [episode.observation.action_mask for episode in recording.episodes]
    if any((mask != mask[0]).any() for mask in masks) or not enough(recording):
        return
    if any((mask[0] != masks[0][0]).any() for mask in masks):
        got = "the first step's mask throughout every episode, another one in each"
        yield Finding("mask_frozen", "warning", "action_mask", "masks that follow the state", got)


# Observations


def stale(recording: Recording) -> Iterator[Finding]:
    """Find fields that the second step often changes, but the first never: they are a step late."""
    long = [episode for episode in recording.episodes if episode.length >= 2]
    for name in ("agents_view", "action_mask", "grid", "state"):
        values = [
            value for episode in long if (value := getattr(episode.observation, name)) is not None
        ]
        changes = [
            differs(value[1:], value[:-1]).reshape(len(value) - 1, -1).any(axis=1)
            for value in values
        ]
        if not changes or any(change[0] for change in changes):
            continue
        num_changed = sum(change[1] for change in changes)
        if chance(num_changed, len(changes), len(changes)) < RARE:
            expected = "what the first action led to"
            got = (
                f"what was there before, in all {len(changes)} episodes; "
                f"the second changed it in {num_changed}"
            )
            yield Finding("stale", "warning", name, expected, got, step=1)


def constant_view(recording: Recording) -> Iterator[Finding]:
    """Find agents whose view never changes."""
    if not enough(recording):
        return
    blind = np.ones(recording.spec.num_agents, bool)
    for name in ("agents_view", "grid"):
        values = [
            value
            for episode in recording.episodes
            if (value := getattr(episode.observation, name)) is not None
        ]
        if values and values[0].size:
            same = [~differs(value, values[0][:1]) for value in values]
            blind &= np.all([x.all(axis=(0, *range(2, x.ndim))) for x in same], axis=0)
    got = f"the same in all {num_steps(recording):,} steps"
    expected = "a view that changes at some time"
    if blind.all():
        yield Finding("constant_view", "warning", "agents_view", expected, f"{got}, for all agents")
    else:
        for agent in np.flatnonzero(blind):
            yield Finding("constant_view", "warning", "agents_view", expected, got, int(agent))


# Rewards and deaths


def reward_at_reset(recording: Recording) -> Iterator[Finding]:
    """Find rewards before the first action."""
    kind = ("reward_at_reset", "error", "reward", "0 at a reset")
    for episode in recording.episodes:
        if episode.first is not None:
            reward = np.asarray(episode.first.reward)[None]
            yield from places(
                episode,
                np.isfinite(reward) & (reward != 0),
                kind,
                lambda at, x=reward: f"{x[at]:g}",
            )


def team_reward(recording: Recording) -> Iterator[Finding]:
    """Find rewards that differ between agents where `spec.team_reward` is True."""
    if not recording.spec.team_reward:
        return
    kind = ("team_reward", "error", "reward", "the same for all agents, as spec.team_reward says")
    for episode in recording.episodes:
        reward = episode.timestep.reward
        got = lambda at, x=reward: f"{x[at]:g}, but {x[at[0], 0]:g} for agent 0"  # noqa: E731
        yield from places(episode, differs(reward, reward[:, :1]), kind, got, offset=1)


def dead_reward(recording: Recording) -> Iterator[Finding]:
    """Find agents, dead before and after a step, that earn in it without `spec.team_reward`."""
    if recording.spec.team_reward:
        return
    kind = ("dead_reward", "error", "reward", "0 for a dead agent (spec.team_reward is False)")
    for episode in recording.episodes:
        alive, reward = episode.observation.alive, episode.timestep.reward
        bad = ~alive[:-1] & ~alive[1:] & (reward != 0)
        yield from places(episode, bad, kind, lambda at, x=reward: f"{x[at]:g}", offset=1)


def all_dead(recording: Recording) -> Iterator[Finding]:
    """Find episodes that start, or go on, without a living agent."""
    for episode in recording.episodes:
        dead = ~episode.observation.alive.any(axis=1)
        kind = ("all_dead", "error", "alive", "a living agent at the start")
        yield from places(episode, dead[:1], kind, "none")
        goes_on = dead[1:] & ~flags(episode).any(axis=1)
        kind = ("all_dead", "error", "alive", "the episode to end with the last living agent")
        yield from places(
            episode, goes_on, kind, "none alive, and neither terminated nor truncated", offset=1
        )


RULES: tuple[Rule, ...] = (
    *(finite, action_bounds, magnitude),
    *(action_mask, never_legal, mask_frozen),
    *(stale, constant_view),
    *(reward_at_reset, team_reward, dead_reward, all_dead),
)
