"""Rules for how episodes end and start, and for what actions do in them; see `rules`."""

from collections.abc import Iterator

import jax
import numpy as np

from mam.envs.check.recording import STEP_LIMIT, Episode, Numbers, Recording, differs
from mam.envs.check.report import Finding
from mam.envs.check.rules import RARE, Rule, at_least, chance, flags, places

MOST_FEATURES = 256  # that are compared from step to step
TINY = 1e-6  # less than that is rounding
FEW_DECISIONS, MANY_DECISIONS = 10, 50  # without any effect, before that is a warning, or an error

# Ends


def ended_at_reset(recording: Recording) -> Iterator[Finding]:
    """Find episodes that are over before they start."""
    for episode in recording.episodes:
        for name in ("terminated", "truncated") if episode.first is not None else ():
            flag = np.asarray(getattr(episode.first, name))[None].astype(bool)
            yield from places(
                episode, flag, ("ended_at_reset", "error", name, "False at a reset"), "True"
            )


def both_flags(recording: Recording) -> Iterator[Finding]:
    """Find ends that are termination and truncation at once."""
    kind = ("both_flags", "error", "truncated", "an episode to be terminated or truncated")
    for episode in recording.episodes:
        yield from places(episode, flags(episode).all(axis=1), kind, "both", offset=1)


def time_limit(recording: Recording) -> Iterator[Finding]:
    """Find truncations before `spec.time_limit`, and episodes that go on after it."""
    limit = recording.spec.time_limit
    if limit is None:
        return
    for episode in recording.episodes:
        terminated, truncated = flags(episode)[-1]
        if episode.length < limit and truncated and not terminated:
            expected = f"truncation at step {limit} (spec.time_limit), no sooner"
            got = f"truncation at step {episode.length}"
            yield Finding(
                "time_limit",
                "error",
                "truncated",
                expected,
                got,
                None,
                episode.length,
                episode.number,
            )
        elif episode.length > limit:
            got = (
                f"an end at step {episode.length}"
                if episode.ended
                else f"no end by step {episode.length}"
            )
            expected = f"an end by step {limit} (spec.time_limit)"
            yield Finding(
                "time_limit", "error", "truncated", expected, got, None, limit, episode.number
            )


def limit_as_termination(recording: Recording) -> Iterator[Finding]:
    """Find time limits that terminate: what would have gone on is worth something.

    So many terminations at one step that those at earlier steps do not explain them are a limit's.
    Where none is known it may be at the step that no episode gets past.
    """
    known = recording.spec.time_limit
    limit = known or max((episode.length for episode in recording.ended), default=0)
    reached = [episode for episode in recording.episodes if episode.length >= limit]
    ends = [(episode.length, *flags(episode)[-1]) for episode in recording.ended]
    at_limit = sum(
        length == limit and terminated and not truncated for length, terminated, truncated in ends
    )
    before = sum(length < limit and terminated for length, terminated, _ in ends)
    steps = sum(min(episode.length, limit - 1) for episode in recording.episodes)
    if at_limit >= 2 and at_least(at_limit, len(reached), (before + 1) / (steps + 1)) < RARE:
        got = f"termination in {at_limit} of the {len(reached)} episodes that got there"
        what = "the time limit" if known else "if that is the time limit"
        expected = f"truncation at step {limit}, {what} (right only if the task itself ends then)"
        yield Finding("limit_as_termination", "warning", "terminated", expected, got, step=limit)


def no_end(recording: Recording) -> Iterator[Finding]:
    """Find episodes without a known limit that do not end."""
    if recording.spec.time_limit is None and not recording.ended:
        longest = max(episode.length for episode in recording.episodes)
        if longest >= STEP_LIMIT:  # otherwise there was no time to see one, which is a note
            got = f"none in {len(recording.episodes)} episodes of up to {longest:,} steps"
            yield Finding("no_end", "error", "terminated", "an end of the episode", got)


# Resets


def _unlike_final(episode: Episode) -> list[tuple[str, Numbers]]:
    """Return, for every observed field, the steps [T] at which `final_observation` has another."""
    timestep = episode.timestep
    observations = (timestep.observation, timestep.final_observation)
    ours, final = (dict(jax.tree_util.tree_flatten_with_path(x)[0]) for x in observations)
    unlike = {path: differs(ours[path], final[path]) for path in ours if path in final}
    return [
        (jax.tree_util.keystr(path)[1:], x.reshape(len(x), -1).any(axis=1))
        for path, x in unlike.items()
    ]


def _changes(episode: Episode) -> Numbers:
    """Say which steps change anything that is observed, [T]."""
    leaves = [differs(x[1:], x[:-1]) for x in jax.tree.leaves(episode.observation)]
    return np.any([x.reshape(len(x), -1).any(axis=1) for x in leaves], axis=0)


def final_observation(recording: Recording) -> Iterator[Finding]:
    """Find steps within episodes at which `final_observation` is not `observation`.

    Both are the successor of the action, unless `observation` is already the next episode's.
    """
    for episode in recording.episodes:
        timestep = episode.timestep
        # There an agent was truncated alone, and has a last view in one of them only.
        parted = (timestep.final_observation.alive & ~np.asarray(timestep.observation.alive)).any(
            axis=1
        )
        other = flags(episode).any(axis=1) | (parted & recording.resets_itself)
        for name, unlike in _unlike_final(episode):
            kind = (
                "final_observation",
                "error",
                f"final_observation.{name}",
                "what observation holds",
            )
            yield from places(
                episode, unlike & ~other, kind, "something else", per_agent=False, offset=1
            )


def final_is_previous(recording: Recording) -> Iterator[Finding]:
    """Find ends at which `final_observation` is what came before the last action, not after it."""
    long = [
        episode for episode in recording.ended if episode.length >= 2 and recording.resets_itself
    ]
    changes = [_changes(episode) for episode in long]
    if not changes or any(change[-1] for change in changes):
        return
    others = np.concatenate([change[:-1] for change in changes])
    if chance(others.sum(), len(others), len(changes)) < RARE:
        got = f"what was there before it, at the end of all {len(changes)} episodes"
        expected = "what the last action led to"
        yield Finding("final_is_previous", "error", "final_observation", expected, got)


def auto_reset(recording: Recording) -> Iterator[Finding]:
    """Find an `Environment` that resets itself, and external ones that lose the last view."""
    yield from _lost_final(recording) if recording.resets_itself else _resets_itself(recording)


def _resets_itself(recording: Recording) -> Iterator[Finding]:
    expected = "an environment that does not reset itself"
    unlike = [np.any([x for _, x in _unlike_final(episode)], axis=0) for episode in recording.ended]
    if any(x[-1] for x in unlike) and not any(x[:-1].any() for x in unlike):
        kind = ("auto_reset", "error", "observation", expected)
        for episode, x in zip(recording.ended, unlike, strict=True):
            yield from places(
                episode, x, kind, "something else than final_observation, at ends only", offset=1
            )
        return
    clocks = [episode.clocks for episode in recording.ended if episode.length >= 4]
    counts = [(x[1:-1] > x[:-2]).all(axis=0) & (x[-1] <= x[0]) for x in clocks]
    if len(counts) >= 2 and np.all(counts, axis=0).any():
        # Whose turn it is counts like this as well, where all episodes are one round long.
        sure = len({len(x) for x in clocks}) > 1 or len(clocks[0]) > 8
        got = (
            "a count in the state that grows at every step and starts anew "
            f"at the end of all {len(counts)} episodes"
        )
        yield Finding("auto_reset", "error" if sure else "warning", "state", expected, got)


def _lost_final(recording: Recording) -> Iterator[Finding]:
    for number, end in enumerate(("terminated", "truncated")):
        episodes = [episode for episode in recording.ended if flags(episode)[-1, number]]
        same = [not any(unlike[-1] for _, unlike in _unlike_final(episode)) for episode in episodes]
        if (
            len(episodes) >= 3
            and all(same)
            and any(_changes(episode).any() for episode in episodes)
        ):
            expected = (
                "the next episode's first observation at an end, "
                "and the last one in final_observation"
            )
            got = f"the same in both, at the end of all {len(episodes)} episodes that are {end}"
            place = (None, episodes[0].length, episodes[0].number)
            yield Finding("auto_reset", "error", "observation", expected, got, *place)


def final_is_reset(recording: Recording) -> Iterator[Finding]:
    """Find time limits whose `final_observation` is the next episode's start.

    Seen from jumps: at the limit nothing happens that does not happen at other steps, so a number
    that then is what it may be at a start should seldom have changed more than at any other step:
    in one of so many steps.
    """
    for name in ("agents_view", "grid", "state"):
        episodes = [
            e
            for e in recording.episodes
            if getattr(e.observation, name) is not None and e.length >= 2
        ]
        cut = np.array([flags(episode)[-1, 1] for episode in episodes], bool)
        if cut.sum() < 3:
            continue
        seen = [_sample(getattr(episode.observation, name)) for episode in episodes]
        starts, last = (np.stack([x[k] for x in seen]) for k in (0, -1))
        moves = [np.abs(np.diff(x, axis=0)) for x in seen]
        inner = np.concatenate([x[:-1] for x in moves])
        like_start = (starts.min(axis=0) <= last) & (last <= starts.max(axis=0))
        further = np.stack([x[-1] for x in moves]) > inner.max(axis=0) + TINY
        jumps = (like_start & further).any(axis=1)[cut].sum()
        num_varying = (np.ptp(np.concatenate(seen), axis=0) > TINY).sum()
        if at_least(jumps, cut.sum(), min(1.0, num_varying / (len(inner) + 1))) < RARE:
            got = f"a jump to what starts look like, at {jumps} of {cut.sum()} time limits"
            expected = "what the last action led to"
            yield Finding("final_is_reset", "warning", f"final_observation.{name}", expected, got)


def _sample(x: Numbers) -> Numbers:
    """Return up to `MOST_FEATURES` numbers of every step, [T, F]; non-finite values become 0."""
    flat = np.nan_to_num(np.asarray(x, np.float64).reshape(len(x), -1), posinf=0.0, neginf=0.0)
    return flat[:, :: -(-flat.shape[1] // MOST_FEATURES)] if flat.shape[1] else flat


def episode_metrics(recording: Recording) -> Iterator[Finding]:
    """Find ends whose `episode_length` or `episode_return` (mean over agents) does not add up."""
    for episode in recording.ended:
        metrics = episode.timestep.metrics
        sums = {
            "episode_length": episode.length,
            "episode_return": float(episode.timestep.reward.mean(axis=1).sum()),
        }
        for name, expected in sums.items():
            if name not in metrics:
                if recording.resets_itself:
                    got = ", ".join(sorted(metrics)) or "none"
                    yield Finding(
                        "episode_metrics", "error", "metrics", f"{name} among the metrics", got
                    )
                continue
            value = float(metrics[name][-1])
            if np.isfinite(expected) and not np.isclose(value, expected, rtol=1e-3, atol=1e-3):
                text, got = (
                    "what its steps add up to at an episode's end",
                    f"{value:g}, not {expected:g}",
                )
                place = (None, episode.length, episode.number)
                yield Finding("episode_metrics", "error", f"metrics.{name}", text, got, *place)


# Actions


def actions_ignored(recording: Recording) -> Iterator[Finding]:
    """Find agents whose actions change nothing that is seen or earned."""
    decisions, effects = recording.influence.decisions, recording.influence.effects
    expected = "actions that change what agents see or earn"
    if decisions[-1] >= FEW_DECISIONS and not effects.any():
        got = (
            f"no effect in {decisions[-1]:,} joint actions "
            "that differed from those of an equal episode"
        )
        yield Finding("actions_ignored", "error", "action", expected, got)
        return
    # Where the team's actions rarely have an effect (a reward at the end, say), it takes more.
    rate = effects[-1] / decisions[-1] if decisions[-1] else 1.0
    telling = decisions[:-1] * rate
    for agent in np.flatnonzero((telling >= FEW_DECISIONS) & (effects[:-1] == 0)):
        severity = "error" if telling[agent] >= MANY_DECISIONS else "warning"
        got = (
            f"no effect in {decisions[agent]:,} actions of this agent "
            "that differed from those of an equal episode"
        )
        yield Finding("actions_ignored", severity, "action", expected, got, int(agent))


def agent_order(recording: Recording) -> Iterator[Finding]:
    """Find agents whose actions show at once in another agent's view, but not in their own."""
    at_once = recording.influence.at_once
    for agent, seen in enumerate(at_once):
        (others,) = np.nonzero(seen)
        if (
            len(others) == 1
            and others[0] != agent
            and seen.sum() >= 5
            and not at_once[others[0], others[0]]
        ):
            got = f"none in its own at once, but in that of agent {others[0]}"
            expected = "an agent's action to show in its own view"
            yield Finding("agent_order", "warning", "agents_view", expected, got, agent)


RULES: tuple[Rule, ...] = (
    *(ended_at_reset, both_flags, time_limit, limit_as_termination, no_end),
    *(final_observation, final_is_previous, final_is_reset, auto_reset, episode_metrics),
    *(actions_ignored, agent_order),
)
