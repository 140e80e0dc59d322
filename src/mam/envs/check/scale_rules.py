"""Rules for the scale of numbers beside each other; see `rules`."""

from collections.abc import Iterator

import numpy as np

from mam.envs.check.recording import Recording
from mam.envs.check.report import Finding
from mam.envs.check.rules import Rule, enough

# Times the smallest range of a feature: what hides it, unless each is normalised by itself.
APART = 100.0
# Times the range of rewards: what hides it, unless values are normalised.
OFFSET = 5.0


def feature_scale(recording: Recording) -> Iterator[Finding]:
    """Find features of one observation whose ranges are far apart in size."""
    for name in ("agents_view", "state") if enough(recording) else ():
        rows = []
        for episode in recording.episodes:
            value = getattr(episode.observation, name)
            if value is not None:
                rows.append(value[episode.observation.alive] if name == "agents_view" else value)
        if not rows or not (seen := np.concatenate(rows).astype(np.float64)).size:
            continue
        if not np.isfinite(seen).all():  # which is a finding of its own
            continue
        spread = np.ptp(seen, axis=0)
        varies = np.flatnonzero(spread)
        if varies.size and spread.max() > APART * spread[varies].min():
            small, large = int(varies[spread[varies].argmin()]), int(spread.argmax())
            expected = (
                f"ranges within {APART:.0f} times each other, "
                "or network.observation_norm = running, the default"
            )
            got = (
                f"feature {large} varies by {spread[large]:g}, feature {small} by {spread[small]:g}"
            )
            yield Finding("feature_scale", "warning", name, expected, got)


def reward_offset(recording: Recording) -> Iterator[Finding]:
    """Find rewards that vary little for their size: a constant part says nothing about actions."""
    earned = [
        episode.timestep.reward[episode.observation.alive[:-1]] for episode in recording.episodes
    ]
    reward = np.concatenate(earned).astype(np.float64)
    if not enough(recording) or not reward.size or not np.isfinite(reward).all():
        return
    least, most, spread = reward.min(), reward.max(), np.ptp(reward)
    offset = max(least, -most)  # what the best and the worst step have in common
    if spread and offset > OFFSET * spread:
        expected = (
            f"a constant part of at most {OFFSET:.0f} times what varies, "
            "or ppo.normalise_value, on by default"
        )
        got = f"rewards from {least:g} to {most:g} at every step"
        yield Finding("reward_offset", "warning", "reward", expected, got)


RULES: tuple[Rule, ...] = (feature_scale, reward_offset)
