"""Playing `ExternalEnvironments`: the same seed again and again, with some agents acting otherwise.

The noise that random legal actions are made of does not depend on the environments' seed, so two
runs of one seed differ by the actions of those agents only that deviate, and runs of two seeds by
the seed only.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mam.envs.check.external_run import Run, cut, deviation, stack
from mam.envs.check.recording import (
    STEP_LIMIT,
    Influence,
    Numbers,
    Recording,
    choose,
    dead_acts,
    differs,
    ends,
    first_difference,
    not_repeated,
    steps_that_fit,
)
from mam.envs.check.report import Finding
from mam.envs.check.shapes import check_fields, check_metric_names, is_fatal
from mam.envs.check.static import Unplayable, attempt
from mam.types import EnvSpec, Observation, TimeStep

MAIN_SHARE = 0.4  # of the time, for the episodes that are recorded
NUM_SEED_STEPS = 20  # for which two seeds are compared
NUM_HELD = 4  # time steps that must stay as they are while others follow: buffers may take turns
NUM_LEAKS, NUM_LEAK_STEPS = 16, 5  # how often the first steps are played again after other episodes

Deviates = Callable[[Numbers], Numbers]  # alive [B, N] -> whose actions are others, [B, N]


def play(env: Any, spec: EnvSpec, seed: int, num_episodes: int, deadline: float) -> Recording:
    """Play until there are enough episodes or time is up, then the runs to compare with them.

    See `jax_play.play` for the arguments.

    Raises:
        Unplayable: the reset fails.
    """
    recording = Recording(spec, resets_itself=True, influence=Influence.none(spec.num_agents))
    player = _Player(env, spec, recording)
    now = time.perf_counter()
    share_end = now + MAIN_SHARE * (deadline - now)
    main = player.run(seed, STEP_LIMIT, share_end, num_episodes=num_episodes)
    if not main.length:
        return recording
    recording.episodes.extend(cut(main))
    if len(recording.ended) < num_episodes and time.perf_counter() >= share_end:
        recording.notes.append(
            f"time was up after {len(recording.ended)} of {num_episodes} episodes; "
            "--seconds gives more"
        )
    try:
        player.compare(seed, main, deadline)
    except Unplayable as error:
        recording.findings.extend(error.findings)
    return recording


class _Player:
    """The environments, and the runs of them that are compared."""

    def __init__(self, env: Any, spec: EnvSpec, recording: Recording) -> None:
        self.env, self.spec, self.recording = env, spec, recording
        self.batch = (env.num_envs, spec.num_agents)

    def run(
        self,
        seed: int,
        num_steps: int,
        deadline: float,
        *,
        num_episodes: int = 0,
        deviates: Deviates | None = None,
    ) -> Run:
        """Reset and step until there are enough steps, or episodes, or time is up."""
        held = [self._call("reset", 0, lambda: self.env.reset(seed))]
        timesteps, actions = [_copy(held[0])], []
        num_steps = min(num_steps, steps_that_fit(timesteps[0]))
        num_ended, age = 0, np.zeros(self.batch[0], int)
        while len(actions) < num_steps and time.perf_counter() < deadline:
            action = self._actions(timesteps[-1].observation, len(actions), deviates)
            try:
                timestep = self._call(
                    "step", len(actions) + 1, functools.partial(self.env.step, action.copy())
                )
            except Unplayable as error:  # what was played until now is still worth looking at
                self.recording.findings.extend(error.findings)
                break
            self.recording.findings.extend(
                check_metric_names(timesteps[0], timestep, len(actions) + 1)
            )
            for old, copy in zip(held, timesteps[-len(held) :], strict=True):
                self.recording.findings.extend(_check_held(old, copy, len(actions)))
            held = [*held, timestep][-NUM_HELD:]
            timesteps.append(_copy(timestep))
            actions.append(action)
            num_ended, age = num_ended + ends(timestep).sum(), np.where(ends(timestep), 0, age + 1)
            if num_episodes and (
                num_ended >= num_episodes or age.max() > (self.spec.time_limit or STEP_LIMIT)
            ):
                break
        return stack(actions, timesteps, (self.batch[0], *self.spec.joint_action.shape))

    def _call(self, name: str, step: int, function: Callable[[], Any]) -> TimeStep:
        timestep = attempt(name, function, step=step)
        if not isinstance(timestep, TimeStep):
            raise Unplayable(
                Finding("protocol", "error", name, "a TimeStep", type(timestep).__name__, step=step)
            )
        found = [
            dataclasses.replace(finding, step=step)
            for finding in _check_arrays(timestep, self.spec, self.batch)
        ]
        if any(map(is_fatal, found)):
            raise Unplayable(*found)
        self.recording.findings.extend(found)
        return timestep

    def _actions(self, observation: Observation, step: int, deviates: Deviates | None) -> Numbers:
        shape = (*self.batch, self.spec.num_actions + 1)
        noise = np.random.default_rng((0, step)).random(shape, np.float32)
        if deviates is not None:
            other = np.random.default_rng((1, step)).random(shape, np.float32)
            noise = np.where(deviates(observation.alive.astype(bool))[..., None], other, noise)
        return choose(self.spec, observation.action_mask.astype(bool), noise)

    def compare(self, seed: int, main: Run, deadline: float) -> None:
        """Play the runs that are compared with the main one, each in an equal share of the time."""
        num_envs, num_agents = self.batch
        comparisons = [
            self._repeated,
            self._after_others,
            self._other_seed,
            self._others,
            self._dead,
        ]
        comparisons += [self._agents(first) for first in range(0, num_agents, num_envs)]
        for number, comparison in enumerate(comparisons):
            now, left = time.perf_counter(), len(comparisons) - number
            if now >= deadline:
                self.recording.notes.append(
                    f"no time for {left} of {len(comparisons)} comparisons of runs"
                )
                break
            found = list(comparison(seed, main, now + (deadline - now) / left))
            self.recording.findings.extend(found)
            if found and number < 2:  # the repetitions
                self.recording.notes.append(
                    "one seed, several outcomes: what actions change could not be checked"
                )
                break

    def _repeated(self, seed: int, main: Run, deadline: float) -> Iterator[Finding]:
        """Check that the same seed and actions lead to the same, whatever was played before."""
        second = self.run(seed, main.length, deadline)
        difference = first_difference(main.first(second.length), second.timestep, num_lead=2)
        if difference is None:
            return
        name, (step, _, *agent) = difference
        third = self.run(seed, step, deadline)
        finding = not_repeated(name, agent[0] if agent else None, step, None, "seed and actions")
        if first_difference(second.first(third.length), third.timestep, num_lead=2) is None:
            got = "other values after other episodes: something is left of them"
            finding = dataclasses.replace(finding, check="leak", got=got)
        yield finding

    def _after_others(self, seed: int, main: Run, deadline: float) -> Iterator[Finding]:
        """Check that nothing is left of other seeds' episodes when the first ones begin again."""
        for other in range(1, NUM_LEAKS + 1):
            if other > 1 and time.perf_counter() >= deadline:
                return
            self.run(seed + other, STEP_LIMIT, deadline, num_episodes=1)
            again = self.run(seed, min(main.length, NUM_LEAK_STEPS), deadline)
            if difference := first_difference(main.first(again.length), again.timestep, num_lead=2):
                name, (step, _, *agent) = difference
                expected = "the same values for the same seed and actions"
                got = "other values after other episodes: something is left of them"
                yield Finding(
                    "leak", "error", name, expected, got, agent[0] if agent else None, step
                )
                return

    def _other_seed(self, seed: int, main: Run, deadline: float) -> Iterator[Finding]:
        """Check that other seeds lead to other episodes, in all environments."""
        other = self.run(seed + 1, min(main.length, NUM_SEED_STEPS), deadline)
        if first_difference(main.first(other.length), other.timestep) is None:
            got = f"the same first {other.length} steps for equal actions"
            yield Finding("keys_ignored", "warning", "reset", "other seeds, other episodes", got)
        starts = [run.timestep.observation.agents_view[0] for run in (main, other)]
        alike = [not differs(start, start[:1]).any() for start in starts]
        if self.batch[0] > 1 and all(alike) and differs(*starts).any():
            expected = "every environment to draw on a seed of its own"
            yield Finding(
                "env_seeds",
                "error",
                "reset",
                expected,
                f"{self.batch[0]} times the same first observation",
            )

    def _others(self, seed: int, main: Run, deadline: float) -> Iterator[Finding]:
        """Check that environment 0 does as before while all agents of the others deviate.

        A single environment deviates itself.
        """
        deviating = np.ones(self.batch, bool)
        deviating[0] = self.batch[0] == 1
        run = self.run(seed, main.length, deadline, deviates=lambda alive: deviating & alive)
        for env in range(self.batch[0]):
            if deviating[env].any():
                self._measure(main, run, env, who=self.spec.num_agents)
        if not deviating[0].any():
            ours, theirs = (
                jax.tree.map(lambda x: x[:, 0], r.first(run.length)) for r in (main, run)
            )
            if difference := first_difference(ours, theirs, num_lead=1):
                name, (step, *agent) = difference
                expected = "an environment that the actions in others do not change"
                place = (agent[0] if agent else None, step)
                yield Finding(
                    "env_independence",
                    "error",
                    name,
                    expected,
                    "other values in environment 0",
                    *place,
                )

    def _dead(self, seed: int, main: Run, deadline: float) -> Iterator[Finding]:
        """Check that nothing changes where dead agents deviate."""
        run = self.run(seed, main.length, deadline, deviates=lambda alive: ~alive)
        for env in range(self.batch[0]):
            sees, rest, acts = deviation(main, run, env)
            effects = np.logical_or(sees.any(axis=1), rest)
            if effects.any() and acts[: np.argmax(effects) + 1].any():
                yield dead_acts(acts)

    def _agents(self, first: int) -> Callable[[int, Run, float], Iterator[Finding]]:
        """Return a comparison in which one agent of every environment deviates.

        It is agent `first` in environment 0, and the next in the next.
        """
        num_envs, num_agents = self.batch

        def compare(seed: int, main: Run, deadline: float) -> Iterator[Finding]:
            who = (first + np.arange(num_envs)) % num_agents
            deviating = who[:, None] == np.arange(num_agents)
            run = self.run(seed, main.length, deadline, deviates=lambda alive: deviating & alive)
            for env in range(num_envs):
                self._measure(main, run, env, int(who[env]))
            yield from ()

        return compare

    def _measure(self, main: Run, run: Run, env: int, who: int) -> None:
        """Count the actions that differed, up to their first effect."""
        sees, rest, acts = deviation(main, run, env)
        effects = np.logical_or(sees.any(axis=1), rest)
        until = int(np.argmax(effects)) + 1 if effects.any() else len(effects)
        acted = acts[:until].any(axis=1) if who == self.spec.num_agents else acts[:until, who]
        influence = self.recording.influence
        influence.decisions[who] += acted.sum()
        influence.effects[who] += effects.any()
        if who < self.spec.num_agents and acted.any():
            influence.at_once[who] += sees[np.argmax(acted)]


def _check_arrays(timestep: TimeStep, spec: EnvSpec, batch: tuple[int, int]) -> Iterator[Finding]:
    found = list(check_fields(timestep, spec, batch[:1]))
    yield from found
    for path, leaf in jax.tree_util.tree_flatten_with_path(timestep)[0]:
        if not found and not isinstance(leaf, np.ndarray):
            yield Finding(
                "dtype",
                "error",
                jax.tree_util.keystr(path)[1:],
                "a NumPy array",
                type(leaf).__name__,
            )


def _check_held(held: TimeStep, copy: TimeStep, step: int) -> Iterator[Finding]:
    """Check that time steps stay as they were returned."""
    same = jax.tree.map(lambda x, y: x is y or x.tobytes() == y.tobytes(), copy, held)
    if not jax.tree.all(same) and (difference := first_difference(copy, held)):
        expected = "arrays that nobody overwrites once they were returned"
        yield Finding(
            "overwritten",
            "error",
            difference[0],
            expected,
            "other values after the next step",
            step=step,
        )


def _copy(timestep: TimeStep) -> TimeStep:
    return jax.tree.map(np.array, timestep)
