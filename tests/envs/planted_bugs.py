"""Good toy environments, and the same with one bug each, for `mam.envs.check` to tell apart.

Walkers stand on a line of cells, each with a target, and may fall ill: a dead walker stays where it
is. An episode ends when every living walker is on its target, when all are dead, or at the time
limit. Every bug is a subclass of such a toy; `BUGS` says what the check has to find.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mam.types import EnvSpec, Observation, TimeStep

NUM_AGENTS, NUM_CELLS, LIMIT = 3, 5, 7
STAY, LEFT, RIGHT = 0, 1, 2


@dataclass(frozen=True)
class Bug:
    """A planted bug and the finding it must lead to; field and agent None = whatever."""

    make: Callable[[], Any]
    about: str
    check: str
    field: str | None
    agent: int | None


BUGS: dict[str, Bug] = {}
GOOD: dict[str, Callable[[], Any]] = {}


def planted(
    check: str, field: str | None = None, agent: int | None = None
) -> Callable[[type], type]:
    def add(cls: type) -> type:
        BUGS[cls.__name__] = Bug(cls, cls.__doc__ or "", check, field, agent)
        return cls

    return add


def good(cls: type) -> type:
    GOOD[cls.__name__] = cls
    return cls


def draw(key, *shape):
    """Whole numbers, at random enough, which compile faster than those of `jax.random`."""
    one, other = jax.random.key_data(key)
    numbers = one ^ (other + np.arange(np.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B9))
    numbers = (numbers ^ (numbers >> 15)) * np.uint32(0x85EBCA6B)
    return ((numbers ^ (numbers >> 13)) >> 8).astype(jnp.int32).reshape(shape)


# Good ones ----------------------------------------------------------------------------------------


class State(eqx.Module):
    cell: Any  # [N]
    target: Any  # [N]
    alive: Any  # [N]
    count: Any


@good
class Walk:
    """Team reward: minus the mean distance to the targets."""

    spec = EnvSpec("toy/walk", NUM_AGENTS, 4, 3, LIMIT)

    def reset(self, key):
        state = self.start(key)
        return state, self.timestep(
            state, jnp.zeros(NUM_AGENTS), jnp.zeros((), bool), jnp.zeros((), bool)
        )

    def start(self, key):
        cell, target = draw(key, 2, NUM_AGENTS) % NUM_CELLS
        return State(cell, target, jnp.ones(NUM_AGENTS, bool), jnp.zeros((), jnp.int32))

    def step(self, state, action, key):
        after = self.move(state, action, key)
        return after, self.timestep(after, self.reward(state, after), *self.ends(after))

    def move(self, state, action, key):
        ill = draw(key, NUM_AGENTS) % 10 == 0
        way = jnp.where(state.alive, self.way(action), 0)
        cell = jnp.clip(state.cell + way, 0, NUM_CELLS - 1)
        return State(cell, state.target, state.alive & ~ill, state.count + 1)

    def way(self, action):
        return (action == RIGHT).astype(jnp.int32) - (action == LEFT)

    def distance(self, state):
        return jnp.abs(state.cell - state.target) / NUM_CELLS

    def reward(self, before, after):
        return jnp.full(NUM_AGENTS, -self.distance(after).mean())

    def ends(self, state):
        terminated = (~state.alive | (state.cell == state.target)).all()
        return terminated, ~terminated & (state.count >= LIMIT)

    def view(self, state):
        ones = jnp.ones(NUM_AGENTS)
        columns = (
            state.cell / NUM_CELLS,
            state.target / NUM_CELLS,
            state.alive * ones,
            state.count / LIMIT * ones,
        )
        return jnp.stack(columns, axis=1)

    def mask(self, state):
        left, right = state.alive & (state.cell > 0), state.alive & (state.cell < NUM_CELLS - 1)
        return jnp.stack([jnp.ones_like(left), left, right], axis=1)

    def observe(self, state):
        return Observation(self.view(state), self.mask(state), state.alive)

    def metrics(self, state):
        return {"distance": self.distance(state).mean()}

    def timestep(self, state, reward, terminated, truncated):
        observation = self.observe(state)
        return TimeStep(
            observation, reward, terminated, truncated, observation, self.metrics(state)
        )

    def animate(self, states, path):
        raise NotImplementedError


@good
class Carriers(Walk):
    """Walkers that also choose whether to carry what they have, but may not at the ends."""

    spec = replace(Walk.spec, num_actions=5, action_components=(3, 2))

    def way(self, action):
        return super().way(action[:, 0])

    def mask(self, state):
        inside = (state.cell > 0) & (state.cell < NUM_CELLS - 1)
        return jnp.concatenate(
            [super().mask(state), jnp.stack([jnp.ones_like(inside), inside], axis=1)], axis=1
        )


@good
class Selfish(Walk):
    """Every walker earns for itself, the dead nothing."""

    spec = replace(Walk.spec, name="toy/selfish", team_reward=False)

    def reward(self, before, after):
        return jnp.where(before.alive, -self.distance(after), 0.0)


@good
class Glide(Walk):
    """Continuous actions: how far to go."""

    spec = replace(Walk.spec, name="toy/glide", num_actions=1, continuous=True)

    def start(self, key):
        state = super().start(key)
        return State(state.cell.astype(jnp.float32), state.target, state.alive, state.count)

    def way(self, action):
        return action[:, 0]

    def mask(self, state):
        return jnp.ones((NUM_AGENTS, 1), bool)

    def ends(self, state):
        terminated = ~state.alive.any()
        return terminated, ~terminated & (state.count >= LIMIT)


@good
class Picture(Walk):
    """Walkers see an image of themselves on the line, and the critic sees where all are."""

    spec = replace(
        Walk.spec,
        name="toy/image",
        obs_dim=0,
        grid_shape=(1, NUM_CELLS, 2),
        grid_dtype="bool",
        state_dim=NUM_AGENTS,
    )

    def view(self, state):
        return jnp.zeros((NUM_AGENTS, 0))

    def observe(self, state):
        places = jnp.stack([state.cell, state.target], axis=1)[:, None, None]
        grid = places == jnp.arange(NUM_CELLS)[None, None, :, None]
        return replace(super().observe(state), grid=grid, state=state.cell / NUM_CELLS)


# Shapes, types, layout ----------------------------------------------------------------------------


@planted("dtype", "reward")
class IntReward(Walk):
    """Whole numbers for a reward."""

    def reward(self, before, after):
        return jnp.full(NUM_AGENTS, (after.cell == after.target).sum())


@planted("dtype", "agents_view")
class IntView(Walk):
    """Cells as they are."""

    def view(self, state):
        return jnp.stack(
            [state.cell, state.target, state.alive.astype(jnp.int32), state.cell * 0 + state.count],
            axis=1,
        )


@planted("dtype", "alive")
class AliveAsNumber(Walk):
    """1 and 0 for alive."""

    def observe(self, state):
        return replace(super().observe(state), alive=state.alive.astype(jnp.int32))


@planted("dtype", "terminated")
class FloatFlags(Walk):
    """1.0 for the end."""

    def ends(self, state):
        terminated, truncated = super().ends(state)
        return terminated.astype(jnp.float32), truncated.astype(jnp.float32)


@planted("protocol", "animate")
class NoPictures(Walk):
    """Cannot be drawn, and has no method that says so."""

    animate = None


@planted("protocol", "observation")
class BareView(Walk):
    """An array for an observation."""

    def observe(self, state):
        return self.view(state)


@planted("shape", "action_mask")
class OneMask(Walk):
    """One mask for all agents."""

    def mask(self, state):
        return super().mask(state)[0]


@planted("shape", "agents_view")
class ForgottenFeature(Walk):
    """A feature was added, the specification not changed."""

    spec = replace(Walk.spec, obs_dim=3)


@planted("shape", "num_agents")
class ForgottenAgent(Walk):
    """The specification counts an agent that is not there."""

    spec = replace(Walk.spec, num_agents=4)


@planted("shape", "grid")
class NoPicture(Walk):
    """An image is promised and not given."""

    spec = replace(Walk.spec, grid_shape=(1, NUM_CELLS, 2))


@planted("shape", "state")
class WrongState(Picture):
    """The global state is longer than promised."""

    spec = replace(Picture.spec, state_dim=2)


@planted("spec", "time_limit")
class NoTime(Walk):
    """0 for no time limit."""

    spec = replace(Walk.spec, time_limit=0)


@planted("spec", "agent_names")
class OneNameForAll(Walk):
    """One name for three agents."""

    spec = replace(Walk.spec, agent_names=("walker",))


@planted("spec", "action_components")
class UncountedComponent(Carriers):
    """Sizes of components that do not add up to the number of actions."""

    spec = replace(Carriers.spec, action_components=(3, 3))


@planted("metrics", "metrics")
class MetricsFromStepsOnly(Walk):
    """A reset has no metrics."""

    def reset(self, key):
        state, timestep = super().reset(key)
        return state, replace(timestep, metrics={})


@planted("weak_type", "state.count")
class WeakCount(Walk):
    """A count that starts as a Python number."""

    def start(self, key):
        state = super().start(key)
        return State(state.cell, state.target, state.alive, 0)

    def move(self, state, action, key):
        after = super().move(state, action, key)
        return State(after.cell, after.target, after.alive, after.count.astype(jnp.int32))


@planted("structure", "state.cell")
class FloatCell(Walk):
    """Cells turn into floats at the first step."""

    def way(self, action):
        return 1.0 * super().way(action)


@planted("protocol", "step")
class GymStep(Walk):
    """The five results of Gymnasium."""

    def step(self, state, action, key):
        state, timestep = super().step(state, action, key)
        return timestep.observation, timestep.reward, timestep.terminated, timestep.truncated, {}


@planted("protocol", "step")
class KeyInState(Walk):
    """A step without a key."""

    def step(self, state, action):
        return super().step(state, action, jax.random.key(0))


@planted("jit", "step")
class PythonIf(Walk):
    """Python's `if` on a traced value."""

    def ends(self, state):
        return (jnp.array(False), jnp.array(True)) if state.count >= LIMIT else super().ends(state)


@planted("exception", "step")
class WrongAxis(Walk):
    """Fails at the first step."""

    def reward(self, before, after):
        return self.distance(after).mean(axis=1)


@planted("vmap")
class HostCall(Walk):
    """Asks the host, which is called with one environment only."""

    def reward(self, before, after):
        return jax.pure_callback(
            lambda x: -x, jax.ShapeDtypeStruct((NUM_AGENTS,), jnp.float32), self.distance(after)
        )


@planted("exception", "reset")
class CallbackFails(Walk):
    """Fails on the host, when the program runs."""

    def view(self, state):
        view = super().view(state)
        shape = jax.ShapeDtypeStruct(view.shape, view.dtype)
        return jax.pure_callback(lambda x: x / "0", shape, view, vmap_method="broadcast_all")


# What it remembers --------------------------------------------------------------------------------


@planted("hidden_state", "reset")
class Counter(Walk):
    """Episodes are counted in Python, and get harder."""

    num_episodes = 0

    def start(self, key):
        self.num_episodes += 1
        state = super().start(key)
        return replace(state, target=(state.target + self.num_episodes) % NUM_CELLS)


@planted("hidden_state", "reset")
class NumpyTargets(Walk):
    """Targets from NumPy, drawn as the program is compiled."""

    def start(self, key):
        target = np.random.randint(0, NUM_CELLS, NUM_AGENTS).astype(np.int32)
        return replace(super().start(key), target=jnp.asarray(target))


@planted("hidden_state", "step")
class RemembersTargets(Walk):
    """`reset` leaves the targets in an attribute, for `step`."""

    def start(self, key):
        state = super().start(key)
        self.target = state.target
        return state

    def distance(self, state):
        return jnp.abs(state.cell - self.target) / NUM_CELLS


@planted("determinism", "agents_view")
class HostNoise(Walk):
    """Noise in the views, from the host."""

    def view(self, state):
        view = super().view(state)
        shape = jax.ShapeDtypeStruct(view.shape, view.dtype)
        noise = jax.pure_callback(
            lambda x: np.random.random(x.shape).astype(np.float32),
            shape,
            view,
            vmap_method="broadcast_all",
        )
        return view + noise


@planted("keys_ignored")
class FixedSeed(Walk):
    """One episode for all keys: `reset` has its own, and nobody falls ill."""

    def start(self, key):
        return super().start(jax.random.key(42))

    def move(self, state, action, key):
        return replace(super().move(state, action, key), alive=state.alive)


# What agents see ----------------------------------------------------------------------------------


@planted("finite", "agents_view")
class Direction(Walk):
    """The direction to the target, divided by the distance."""

    def view(self, state):
        way = (state.target - state.cell).astype(jnp.float32)
        return super().view(state).at[:, 1].set(way / jnp.abs(way))


@planted("magnitude", "agents_view")
class Nanoseconds(Walk):
    """Time as the clock has it."""

    def view(self, state):
        return super().view(state).at[:, 3].set(1e9 * state.count)


@planted("feature_scale", "agents_view")
class Millimetres(Walk):
    """One place in cells, the other in thousandths."""

    def view(self, state):
        return super().view(state).at[:, 1].multiply(1000.0)


@planted("reward_offset", "reward")
class CostsTenAStep(Walk):
    """Whatever is done, a step costs ten times what can be made up for."""

    def reward(self, before, after):
        return super().reward(before, after) - 10.0


@planted("stale", "agents_view")
class PreviousView(Walk):
    """The observation is made before the move."""

    def step(self, state, action, key):
        after, timestep = super().step(state, action, key)
        view = self.view(state)
        old = replace(timestep.observation, agents_view=view)
        return after, replace(timestep, observation=old, final_observation=old)


@planted("constant_view", "agents_view", agent=1)
class BlindAgent(Walk):
    """One agent's row is never written."""

    def view(self, state):
        return super().view(state).at[1].set(0.0)


@planted("action_mask", "action_mask")
class NothingForTheDead(Walk):
    """The dead have no legal action."""

    def mask(self, state):
        return super().mask(state) & state.alive[:, None]


@planted("action_mask", "action_mask")
class NothingInOneComponent(Carriers):
    """One component has no legal choice at the ends, the other has."""

    def mask(self, state):
        return super().mask(state).at[:, 3].set(False)


@planted("never_legal", "action_mask")
class OneBased(Walk):
    """One action more than there is, and never legal."""

    spec = replace(Walk.spec, num_actions=4)

    def mask(self, state):
        return jnp.concatenate([super().mask(state), jnp.zeros((NUM_AGENTS, 1), bool)], axis=1)


class Started(State):
    first: Any  # [N, A] the mask at the start


@planted("mask_frozen", "action_mask")
class FirstMask(Walk):
    """The mask of the reset, throughout."""

    def start(self, key):
        state = super().start(key)
        return Started(state.cell, state.target, state.alive, state.count, Walk.mask(self, state))

    def move(self, state, action, key):
        after = super().move(state, action, key)
        return Started(after.cell, after.target, after.alive, after.count, state.first)

    def mask(self, state):
        return state.first


@planted("stale", "action_mask")
class PreviousMask(Walk):
    """The mask is made before the move."""

    def step(self, state, action, key):
        after, timestep = super().step(state, action, key)
        old = replace(timestep.observation, action_mask=self.mask(state))
        return after, replace(timestep, observation=old, final_observation=old)


# What agents do -----------------------------------------------------------------------------------


@planted("actions_ignored", "action", agent=2)
class DeafAgent(Walk):
    """A loop over agents that stops one short."""

    def way(self, action):
        return super().way(action.at[NUM_AGENTS - 1].set(STAY))


@planted("actions_ignored", "action")
class AllDeaf(Walk):
    """Everybody walks to the right, whatever they choose."""

    def way(self, action):
        return super().way(jnp.full_like(action, RIGHT))


@planted("agent_order", "agents_view", agent=0)
class ReversedActions(Walk):
    """Actions in another order than views."""

    def way(self, action):
        return super().way(action[::-1])

    def mask(self, state):
        return jnp.ones((NUM_AGENTS, 3), bool)

    def move(self, state, action, key):
        return replace(super().move(state, action, key), alive=state.alive)


@planted("dead_acts", "alive")
class DeadWalk(Walk):
    """The dead go on walking, and are shown to."""

    def move(self, state, action, key):
        moved = super().move(replace(state, alive=jnp.ones_like(state.alive)), action, key)
        return replace(moved, alive=moved.alive & state.alive)

    def mask(self, state):
        return super().mask(replace(state, alive=jnp.ones_like(state.alive)))


@planted("action_bounds", "action")
class Squashed(Glide):
    """The inverse of tanh, which ±1 do not have; and no clipping."""

    def move(self, state, action, key):
        moved = super().move(state, action, key)
        return replace(moved, cell=state.cell + state.alive * jnp.arctanh(action[:, 0]))


# What agents earn ---------------------------------------------------------------------------------


@planted("team_reward", "reward")
class NotShared(Walk):
    """Everybody earns for itself, though the specification says otherwise."""

    def reward(self, before, after):
        return -self.distance(after)


@planted("dead_reward", "reward")
class DeadEarn(Selfish):
    """The dead go on earning."""

    def reward(self, before, after):
        return -self.distance(after)


@planted("reward_at_reset", "reward")
class RewardAtReset(Walk):
    """A reset pays."""

    def reset(self, key):
        state, timestep = super().reset(key)
        return state, replace(timestep, reward=1.0 + self.reward(state, state))


# How episodes end ---------------------------------------------------------------------------------


@planted("time_limit", "truncated")
class OneShort(Walk):
    """Truncated a step before the time limit."""

    def ends(self, state):
        terminated, _ = super().ends(state)
        return terminated, ~terminated & (state.count >= LIMIT - 1)


@planted("time_limit", "truncated")
class OneLong(Walk):
    """Truncated a step after the time limit."""

    def ends(self, state):
        terminated, _ = super().ends(state)
        return terminated, ~terminated & (state.count > LIMIT)


@planted("time_limit", "truncated")
class NoLimit(Walk):
    """Goes on and on, though the specification has a limit."""

    def ends(self, state):
        return super().ends(state)[0], jnp.zeros((), bool)


@planted("limit_as_termination", "terminated")
class LimitTerminates(Walk):
    """The time limit is reported as the task's own end."""

    def ends(self, state):
        terminated, truncated = super().ends(state)
        return terminated | truncated, jnp.zeros((), bool)


@planted("limit_as_termination", "terminated")
class LimitTerminatesSome(Walk):
    """The time limit is reported as the task's own end where the first target is even."""

    def ends(self, state):
        terminated, truncated = super().ends(state)
        wrong = truncated & (state.target[0] % 2 == 0)
        return terminated | wrong, truncated & ~wrong


@planted("limit_as_termination", "terminated")
class UnknownLimitTerminates(LimitTerminates):
    """The same, and the specification knows of no limit."""

    spec = replace(Walk.spec, time_limit=None)


@planted("both_flags", "truncated")
class BothFlags(Walk):
    """Truncated whenever terminated."""

    def ends(self, state):
        ended = jnp.logical_or(*super().ends(state))
        return ended, ended


@planted("ended_at_reset", "terminated")
class DoneAtReset(Walk):
    """A flag that says whether a new episode starts."""

    def reset(self, key):
        state, timestep = super().reset(key)
        return state, replace(timestep, terminated=jnp.ones((), bool))


@planted("all_dead", "alive")
class GhostTown(Walk):
    """Goes on when all are dead."""

    def ends(self, state):
        terminated = (state.cell == state.target).all()
        return terminated, ~terminated & (state.count >= LIMIT)


@planted("auto_reset", "state")
class ResetsItself(Walk):
    """Starts anew at the end; the last observation is lost."""

    def step(self, state, action, key):
        after, timestep = super().step(state, action, key)
        fresh, _ = self.reset(key)
        after = jax.tree.map(lambda a, b: jnp.where(timestep.ended, a, b), fresh, after)
        observation = self.observe(after)
        return after, replace(timestep, observation=observation, final_observation=observation)


@planted("auto_reset")
class ResetsItselfKindly(Walk):
    """Starts anew at the end, and keeps the last observation."""

    def step(self, state, action, key):
        after, timestep = super().step(state, action, key)
        fresh, _ = self.reset(key)
        after = jax.tree.map(lambda a, b: jnp.where(timestep.ended, a, b), fresh, after)
        return after, replace(timestep, observation=self.observe(after))


@planted("final_observation", "final_observation.agents_view")
class FinalIsPrevious(Walk):
    """`final_observation` is what was seen before the step."""

    def step(self, state, action, key):
        after, timestep = super().step(state, action, key)
        return after, replace(timestep, final_observation=self.observe(state))


@planted("final_is_reset", "final_observation.agents_view")
class FinalIsReset(Walk):
    """At the time limit walkers are seen where the next episode might start."""

    def step(self, state, action, key):
        after, timestep = super().step(state, action, key)
        fresh = replace(self.start(key), alive=after.alive, count=after.count)
        seen = self.observe(
            jax.tree.map(lambda a, b: jnp.where(timestep.truncated, a, b), fresh, after)
        )
        return after, replace(timestep, observation=seen, final_observation=seen)


@planted("episode_metrics", "metrics.episode_length")
class LengthFromZero(Walk):
    """The length of an episode is the number of its last step, from 0."""

    def metrics(self, state):
        return {"episode_length": jnp.maximum(state.count - 1, 0).astype(jnp.float32)}


# Environments on the host -------------------------------------------------------------------------


class HostWalk:
    """The walk in NumPy: environments side by side that start their next episodes themselves."""

    spec = replace(Walk.spec, name="toy/host-walk")
    num_envs = 3

    def reset(self, seed):
        self.generators = [self.generator(seed, env) for env in range(self.num_envs)]
        self.cell, self.target, self.alive = (
            np.zeros((self.num_envs, NUM_AGENTS), int) for _ in range(3)
        )
        self.count, self.earned = np.zeros(self.num_envs, int), np.zeros(self.num_envs)
        for env in range(self.num_envs):
            self.start(env)
        no = np.zeros(self.num_envs, bool)
        first = self.observe()
        return TimeStep(
            first, np.zeros(self.cell.shape, np.float32), no, no.copy(), first, self.metrics()
        )

    def generator(self, seed, env):
        return np.random.default_rng((seed, env))

    def start(self, env):
        self.cell[env], self.target[env] = self.generators[env].integers(
            0, NUM_CELLS, (2, NUM_AGENTS)
        )
        self.alive[env], self.count[env], self.earned[env] = 1, 0, 0

    def step(self, action):
        self.before = self.observe()
        way = (action == RIGHT).astype(int) - (action == LEFT)
        self.cell = np.clip(self.cell + way * self.alive, 0, NUM_CELLS - 1)
        ill = np.stack([generator.random(NUM_AGENTS) < 0.1 for generator in self.generators])
        was_alive, self.alive = self.alive > 0, self.alive * ~ill
        self.count = self.count + 1
        reward = self.reward(was_alive).astype(np.float32)
        self.earned = self.earned + reward.mean(axis=1)
        terminated = ((self.alive == 0) | (self.cell == self.target)).all(axis=1)
        truncated = ~terminated & (self.count >= LIMIT)
        return self.finish(reward, terminated, truncated)

    def finish(self, reward, terminated, truncated):
        final, metrics = self.observe(), self.metrics()
        for env in np.flatnonzero(terminated | truncated):
            self.start(env)
        return TimeStep(self.observe(), reward, terminated, truncated, final, metrics)

    def distance(self):
        return np.abs(self.cell - self.target) / NUM_CELLS

    def reward(self, was_alive):
        return np.repeat(-self.distance().mean(axis=1, keepdims=True), NUM_AGENTS, axis=1)

    def view(self):
        count = np.repeat(self.count[:, None] / LIMIT, NUM_AGENTS, axis=1)
        columns = (self.cell / NUM_CELLS, self.target / NUM_CELLS, self.alive, count)
        return np.stack(columns, axis=-1).astype(np.float32)

    def observe(self):
        alive = self.alive > 0
        left, right = alive & (self.cell > 0), alive & (self.cell < NUM_CELLS - 1)
        return Observation(self.view(), np.stack([np.ones_like(left), left, right], axis=-1), alive)

    def metrics(self):
        length, earned = self.count.astype(np.float32), self.earned.astype(np.float32)
        return {"episode_length": length, "episode_return": earned}

    def close(self):
        pass


@good
class HostSelfish(HostWalk):
    """Every walker earns for itself, the dead nothing."""

    spec = replace(HostWalk.spec, name="toy/host-selfish", team_reward=False)

    def reward(self, was_alive):
        return -self.distance() * was_alive


@good
class HostAlone(HostWalk):
    """One environment."""

    num_envs = 1


good(HostWalk)


@planted("dtype", "agents_view")
class HostDoubles(HostWalk):
    """NumPy's own floats."""

    def view(self):
        return super().view().astype(float)


@planted("shape", "reward")
class HostTeamReward(HostWalk):
    """One reward for all."""

    def finish(self, reward, terminated, truncated):
        return super().finish(reward[:, 0], terminated, truncated)


@planted("auto_reset", "observation")
class HostNextStepReset(HostWalk):
    """The next episode starts at the next step, as in Gymnasium 1.0."""

    def step(self, action):
        for env in np.flatnonzero(getattr(self, "over", np.zeros(self.num_envs, bool))):
            self.start(env)
        return super().step(action)

    def reset(self, seed):
        self.over = np.zeros(self.num_envs, bool)
        return super().reset(seed)

    def finish(self, reward, terminated, truncated):
        self.over = terminated | truncated
        return TimeStep(
            self.observe(), reward, terminated, truncated, self.observe(), self.metrics()
        )


@planted("auto_reset", "observation")
class HostLosesFinal(HostWalk):
    """`final_observation` is the next episode's first as well."""

    def finish(self, reward, terminated, truncated):
        timestep = super().finish(reward, terminated, truncated)
        return replace(timestep, final_observation=timestep.observation)


@planted("auto_reset", "observation")
class HostLosesFinalAtLimit(HostWalk):
    """The same where the time limit strikes, only."""

    def finish(self, reward, terminated, truncated):
        timestep = super().finish(reward, terminated, truncated)

        def choose(final, first):
            return np.where(truncated.reshape(-1, *[1] * (final.ndim - 1)), first, final)

        final = jax.tree.map(choose, timestep.final_observation, timestep.observation)
        return replace(timestep, final_observation=final)


@planted("final_is_previous", "final_observation")
class HostFinalIsPrevious(HostWalk):
    """`final_observation` is what was seen before the last action."""

    def finish(self, reward, terminated, truncated):
        timestep = super().finish(reward, terminated, truncated)
        ended = timestep.terminated | timestep.truncated

        def choose(previous, now):
            return np.where(ended.reshape(-1, *[1] * (now.ndim - 1)), previous, now)

        return replace(
            timestep,
            final_observation=jax.tree.map(choose, self.before, timestep.final_observation),
        )


@planted("env_independence")
class HostSharedGenerator(HostWalk):
    """All environments draw on one generator."""

    def reset(self, seed):
        self.shared = np.random.default_rng(seed)
        return super().reset(seed)

    def generator(self, seed, env):
        return self.shared


@planted("env_seeds", "reset")
class HostSameSeed(HostWalk):
    """All environments have the same seed."""

    def generator(self, seed, env):
        return np.random.default_rng(seed)


@planted("determinism")
class HostUnseeded(HostWalk):
    """The seed is not used."""

    def generator(self, seed, env):
        return np.random.default_rng()


@planted("keys_ignored", "reset")
class HostFixedSeed(HostWalk):
    """Another seed is not another episode."""

    def generator(self, seed, env):
        return np.random.default_rng(env)


@planted("leak")
class HostOldTargets(HostWalk):
    """Targets are drawn once and outlast a reset."""

    targets = None

    def start(self, env):
        super().start(env)
        if self.targets is None:
            self.targets = self.generators[env].integers(0, NUM_CELLS, NUM_AGENTS)
        self.target[env] = self.targets


@planted("leak", "reward")
class HostPaysLate(HostWalk):
    """A prize for arriving together, which is rare, is paid in the next episode."""

    owed = np.zeros(HostWalk.num_envs)

    def reward(self, was_alive):
        paid, self.owed = self.owed, (self.cell == self.target).all(axis=1) * self.alive.all(axis=1)
        return super().reward(was_alive) + paid[:, None]


@planted("overwritten", "agents_view")
class HostTwoBuffers(HostWalk):
    """Time steps are returned in two sets of arrays in turn."""

    def __init__(self):
        self.sets = [{}, {}]

    def kept(self, timestep):
        self.sets.reverse()

        def keep(path, x):
            kept = self.sets[0].setdefault(jax.tree_util.keystr(path), np.empty_like(x))
            kept[...] = x
            return kept

        return jax.tree_util.tree_map_with_path(keep, timestep)

    def reset(self, seed):
        return self.kept(super().reset(seed))

    def step(self, action):
        return self.kept(super().step(action))


@planted("overwritten", "agents_view")
class HostBuffer(HostWalk):
    """Views are written to the same array at every step."""

    buffer = np.zeros((HostWalk.num_envs, NUM_AGENTS, 4), np.float32)

    def view(self):
        self.buffer[:] = super().view()
        return self.buffer


@planted("episode_metrics", "metrics.episode_return")
class HostSumOfAgents(HostWalk):
    """The return is summed over agents."""

    def metrics(self):
        return super().metrics() | {"episode_return": (self.earned * NUM_AGENTS).astype(np.float32)}


@planted("episode_metrics", "metrics")
class HostNoMetrics(HostWalk):
    """Nothing about the episodes."""

    def metrics(self):
        return {}


@planted("exception", "step")
class HostNoThirdAction(HostWalk):
    """An action fewer than there should be."""

    def step(self, action):
        assert (action < RIGHT).all(), "no such action"
        return super().step(action)


@planted("actions_ignored", "action", agent=1)
class HostDeafAgent(HostWalk):
    """One agent's action does not reach the simulator."""

    def step(self, action):
        action[:, 1] = STAY
        return super().step(action)


@planted("dead_reward", "reward")
class HostDeadEarn(HostSelfish):
    """The dead go on earning."""

    def reward(self, was_alive):
        return -self.distance()


@planted("finite", "agents_view")
class HostDirection(HostWalk):
    """The direction to the target, divided by the distance."""

    def view(self):
        view, way = super().view(), (self.target - self.cell).astype(np.float32)
        with np.errstate(all="ignore"):
            view[..., 1] = way / np.abs(way)
        return view
