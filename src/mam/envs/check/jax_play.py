"""Playing a JAX environment: rounds of short episodes, and of others that deviate from them."""

import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mam.envs.check.lanes import AGENT_LANES, Carry, Lanes, Record
from mam.envs.check.recording import (
    BEYOND_LIMIT,
    STEP_LIMIT,
    Episode,
    Influence,
    Numbers,
    Recording,
    as_typed,
    dead_acts,
    ends,
    first_difference,
    not_repeated,
    steps_that_fit,
)
from mam.envs.check.report import Finding
from mam.envs.check.static import attempt, compile_quickly
from mam.types import EnvSpec, TimeStep

NUM_LANES = 192
NUM_PROBED = 15  # agents that deviate in one round
NUM_REPEATED = 3  # steps that are played again, to see whether the same comes out
# A callback that raised; anything else would be a bug of ours.
_FAILED_ON_DEVICE = jax.errors.JaxRuntimeError


def play(
    env: Any, spec: EnvSpec, timestep: TimeStep, seed: int, num_episodes: int, deadline: float
) -> Recording:
    """Play rounds of episodes until there are enough and every agent has deviated, or time is up.

    Args:
        env: an environment that traces.
        spec: its specification.
        timestep: what it returns, in the abstract.
        seed: decides everything.
        num_episodes: how many to record at least.
        deadline: when to stop, in seconds of `time.perf_counter`.

    Raises:
        Unplayable: it fails as it runs.
    """
    num_probed = min(spec.num_agents, NUM_PROBED)
    num_groups = min(NUM_LANES // (AGENT_LANES + num_probed), num_episodes)
    num_steps = STEP_LIMIT if spec.time_limit is None else spec.time_limit + BEYOND_LIMIT
    num_groups = max(2, min(num_groups, steps_that_fit(timestep) // num_steps))
    num_steps = min(num_steps, steps_that_fit(timestep) // num_groups)
    num_rounds = max(-(-num_episodes // num_groups), -(-spec.num_agents // num_probed))
    player = _Player(
        Lanes(env, spec, num_groups, num_probed),
        seed=seed,
        num_steps=num_steps,
        deadline=deadline,
        recording=Recording(spec, resets_itself=False, influence=Influence.none(spec.num_agents)),
    )
    recording = player.recording
    for number in range(num_rounds):
        if number == 0 or time.perf_counter() < deadline:
            player.play_round(number)
    if repeated := list(player.check_repeated()):
        # Where the same actions have several outcomes, nothing follows from what others lead to.
        recording.findings, recording.influence = repeated, Influence.none(spec.num_agents)
    recording.findings.extend(player.check_keys())
    if len(recording.ended) < num_episodes and time.perf_counter() >= deadline:
        recording.notes.append(
            f"time was up after {len(recording.ended)} of {num_episodes} episodes; "
            "--seconds gives more"
        )
    return recording


class _Player:
    """The compiled lanes, and where their records go."""

    def __init__(
        self, lanes: Lanes, seed: int, num_steps: int, deadline: float, recording: Recording
    ) -> None:
        self.lanes, self.num_steps, self.deadline, self.recording = (
            lanes,
            num_steps,
            deadline,
            recording,
        )
        self.seed = seed
        self._begin, self._advance = compile_quickly(lanes.begin), compile_quickly(lanes.advance)

    def probed(self, number: int) -> np.ndarray:
        """Return which agents deviate in a round."""
        first = number * self.lanes.num_probed
        return (np.arange(self.lanes.num_probed) + first) % self.lanes.spec.num_agents

    def begin(self, number: int) -> tuple[Carry, TimeStep, Numbers]:
        """Reset all lanes for a round."""
        keys, _ = self._draw(number, 0)
        begin = functools.partial(self._begin, keys)
        carry, first, clocks = attempt(
            "reset", lambda: jax.block_until_ready(begin()), catch=_FAILED_ON_DEVICE
        )
        return carry, jax.device_get(first), jax.device_get(clocks)

    def steps(self, number: int, carry: Carry) -> Iterator[Record]:
        """Yield the steps of a round, without end."""
        for step in itertools.count(1):
            advance = functools.partial(
                self._advance, carry, *self._draw(number, step), self.probed(number)
            )
            carry, record = attempt(
                "step",
                lambda f=advance: jax.block_until_ready(f()),
                step=step,
                catch=_FAILED_ON_DEVICE,
            )
            yield jax.device_get(record)

    def _draw(self, number: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw keys [G, …] and action noise [2, G, N, A + 1] of a step.

        NumPy draws them, since JAX's generator would be slow to compile.
        """
        spec, num_groups = self.lanes.spec, self.lanes.num_groups
        generator = np.random.default_rng((self.seed, number, step))
        key = jax.eval_shape(jax.random.key_data, jax.eval_shape(lambda: jax.random.key(0)))
        keys = generator.integers(2**32, size=(num_groups, *key.shape), dtype=key.dtype)
        noise = generator.random((2, num_groups, spec.num_agents, spec.num_actions + 1), np.float32)
        noise[:, 1] = noise[:, 0]
        return keys, noise

    def play_round(self, number: int) -> None:
        """Play an episode in every group, as far as there is time."""
        carry, first, clocks = self.begin(number)
        records, over = [], np.zeros(self.lanes.num_groups, bool)
        for record in self.steps(number, carry):
            records.append(record)
            over |= ends(record.timestep)
            if over.all() or len(records) == self.num_steps or time.perf_counter() >= self.deadline:
                break
        stacked = jax.tree.map(lambda *steps: np.stack(steps, axis=1), *records)  # [G, T, …]
        for group in range(self.lanes.num_groups):
            record = jax.tree.map(lambda x, g=group: x[g], stacked)
            (ended,) = np.nonzero(ends(record.timestep))
            record = jax.tree.map(lambda x, n=ended[0] + 1: x[:n], record) if len(ended) else record
            start = jax.tree.map(lambda x, g=group: x[g], first)
            episode = _episode(len(self.recording.episodes), start, clocks[group], record)
            self.recording.episodes.append(episode)
            self._measure(episode, record, self.probed(number))

    def _measure(self, episode: Episode, record: Record, probed: np.ndarray) -> None:
        """Count what the lanes that deviate from an episode did otherwise, and what came of it."""
        influence, num_agents = self.recording.influence, self.lanes.spec.num_agents
        alive = episode.observation.alive[:-1]
        effects = record.sees.any(axis=-1) | record.rest  # [T, V]
        for lane, who in enumerate((num_agents, None, *probed)):
            (over,) = np.nonzero(record.ended[:, lane] | effects[:, lane])
            # Later on the lanes are different stories.
            until = over[0] + 1 if len(over) else episode.length
            effect = effects[until - 1, lane]
            acts = record.acts[:until, lane] & (~alive if who is None else alive)[:until]
            if who is None:
                if effect and acts.any():
                    self.recording.findings.append(dead_acts(acts, episode.number))
                continue
            acted = acts.any(axis=1) if who == num_agents else acts[:, who]
            influence.decisions[who] += acted.sum()
            influence.effects[who] += effect
            if who < num_agents and acted.any():
                influence.at_once[who] += record.sees[np.argmax(acted), lane]

    def check_keys(self) -> Iterator[Finding]:
        """Find resets that are all alike, with steps that do not depend on the key either."""
        episodes = self.recording.episodes[: self.lanes.num_groups]
        one, other = episodes[:2]  # of the same action noise
        if one.length != other.length or first_difference(one.timestep, other.timestep):
            return
        starts = [episode.first for episode in episodes if episode.first is not None]
        if all(first_difference(starts[0], start) is None for start in starts):
            got = f"{len(starts)} resets alike, and equal episodes for equal actions"
            yield Finding("keys_ignored", "warning", "reset", "other keys, other episodes", got)

    def check_repeated(self) -> Iterator[Finding]:
        """Play the first round's first steps again: equal keys and actions have equal results."""
        carry, first, _ = self.begin(0)
        records = itertools.islice(self.steps(0, carry), NUM_REPEATED)
        again = (first, *(record.timestep for record in records))
        for episode in self.recording.episodes[: self.lanes.num_groups]:
            for step, timestep in enumerate(again[: episode.length + 1]):
                known = (
                    jax.tree.map(lambda x, t=step: x[t - 1], episode.timestep)
                    if step
                    else episode.first
                )
                again_here: Any = jax.tree.map(lambda x, g=episode.number: x[g], timestep)
                if known is not None and (difference := first_difference(known, again_here)):
                    field, index = difference
                    agent = index[0] if index else None
                    yield not_repeated(field, agent, step, episode.number, "keys and actions")
                    break


def _episode(number: int, first: TimeStep, clocks: np.ndarray, record: Record) -> Episode:
    def join(start: Numbers, rest: Numbers) -> Numbers:
        return np.concatenate([start[None], rest])

    observation = as_typed(jax.tree.map(join, first.observation, record.timestep.observation))
    return Episode(
        number, observation, record.action, record.timestep, first, join(clocks, record.clocks)
    )
