"""Recording episodes: a policy or a controller plays, and a dataset keeps what happened."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Key

from mam.data.steps import concatenate, illegal, without_ids
from mam.data.store import Writer, cut
from mam.envs.external.worker import describe
from mam.envs.wrappers import AutoReset
from mam.errors import RunError, UserError, shown
from mam.learning.external import seed_of
from mam.learning.rollout import RolloutState, make_transition, next_state
from mam.networks.order import decision_order
from mam.types import (
    EnvSpec,
    ExternalEnvironments,
    Memory,
    Observation,
    Policy,
    PolicyOutput,
    TimeStep,
    Transition,
)

# The joint action of every environment, of where it stands and a key
Actor = Callable[[RolloutState, Key[Array, ""]], tuple[Memory, PolicyOutput]]
CHUNK = 64  # steps between two looks at which episodes have ended
_GIVEN = ("observation", "state", "key", "reset")  # to controllers


def policy_actor(policy: Policy, *, greedy: bool) -> Actor:
    """Return a policy as what acts, compiled.

    Args:
        policy: the weights.
        greedy: take the most likely actions instead of sampling them.
    """

    @jax.jit
    def act(state: RolloutState, key: Key[Array, ""]) -> tuple[Memory, PolicyOutput]:
        keys = jax.random.split(key, state.reset.shape[0])
        return policy.act(state.memory, state.observation, state.reset, keys, greedy=greedy)

    return act


@dataclass(frozen=True)
class Controller:
    """A function of one environment's observation that returns its joint action.

    It is called with those of these that it names: `observation` (without agents' ids), `state`
    (the environment's own, of one in JAX), `key` (of JAX), `reset` (the episode's first step).
    What `jax.jit` made is compiled together with an environment in JAX; anything else is called
    with NumPy arrays at every step, and so may draw random numbers and remember what it likes.
    """

    function: Callable[..., Any]
    spec: EnvSpec

    def __post_init__(self):
        """Refuse a function of anything else."""
        if unknown := self._names - set(_GIVEN):
            raise UserError(
                f"a controller takes {', '.join(_GIVEN)}, not {', '.join(sorted(unknown))}"
            )

    @property
    def compiled(self) -> bool:
        """Whether it is a JAX program."""
        return isinstance(self.function, jax.stages.Wrapped)

    @cached_property
    def _names(self) -> set[str]:
        return set(inspect.signature(self.function).parameters)

    def _call(self, state: RolloutState, key: Key[Array, ""]) -> Any:
        env_state = getattr(state.env_state, "env_state", state.env_state)
        values: tuple[Any, ...] = (state.observation, env_state, key, state.reset)
        given: dict[str, Any] = dict(zip(_GIVEN, values, strict=True))
        try:
            return self.function(**{name: given[name] for name in self._names})
        except UserError:
            raise
        except Exception as error:
            raise RunError(f"the controller raised {describe(error)}") from error

    def traced(self, state: RolloutState, key: Key[Array, ""]) -> tuple[Memory, PolicyOutput]:
        """Act in every environment, as part of a JAX program; `check` what came of it."""
        keys = jax.random.split(key, state.reset.shape[0])
        return (), self._output(state, jax.vmap(self._call)(replace(state, memory=()), keys))

    def called(self, state: RolloutState, key: Key[Array, ""]) -> tuple[Memory, PolicyOutput]:
        """Act in one environment after another, with NumPy arrays."""
        state = replace(jax.device_get(state), memory=())
        keys = jax.random.split(key, state.reset.shape[0])
        actions = [
            np.asarray(self._call(jax.tree.map(lambda x, b=b: x[b], state), keys[b]))
            for b in range(state.reset.shape[0])
        ]
        if len({action.shape for action in actions}) > 1:
            raise UserError("the controller returns joint actions of different shapes")
        output = self._output(state, np.stack(actions))
        self.check(state.observation, output.action)
        return (), output

    def check(self, observation: Observation, action: Any) -> None:
        """Refuse actions that are none, or illegal, [*batch, N, …].

        Raises:
            UserError: with the first of them, and what its agent may do.
        """
        places = np.argwhere(illegal(observation, action, self.spec))
        if not len(places):
            return
        place, spec = tuple(places[0]), self.spec
        names = spec.agent_names or range(spec.num_agents)
        mask = np.flatnonzero(np.asarray(observation.action_mask)[place]).tolist()
        legal = "finite numbers" if spec.continuous else f"one of {mask}"
        if spec.action_components:
            legal = f"choices among {[*spec.action_components]} that its mask allows"
        raise UserError(
            f"the controller's action of agent {shown(names[place[-1]])} is "
            f"{np.asarray(action)[place].tolist()}: expected {legal}"
        )

    def _output(self, state: RolloutState, action: Any) -> PolicyOutput:
        expected = self.spec.joint_action
        if action.shape[1:] != expected.shape:
            raise UserError(
                f"the controller returns actions {[*action.shape[1:]]}, "
                f"{self.spec.name} takes {[*expected.shape]}"
            )
        if not (self.spec.continuous or jnp.issubdtype(action.dtype, jnp.integer)):
            raise UserError(
                f"the controller returns actions of {action.dtype}, {self.spec.name} takes indices"
            )
        if self.spec.continuous:
            action = action * state.observation.action_mask  # components that an agent lacks: 0
        alive = state.observation.alive
        zeros: Any = jnp.zeros(alive.shape)
        return PolicyOutput(
            action=action.astype(expected.dtype),
            log_prob=zeros,
            value=zeros,
            order=decision_order(jnp.asarray(alive)),
        )


@dataclass
class HostedEnvironments:
    """Environments in JAX that are stepped from outside: an `ExternalEnvironments`."""

    batched: AutoReset
    state: Any = None

    def __post_init__(self):
        self._step, self._reset = jax.jit(self.batched.step), jax.jit(self.batched.reset)

    @property
    def spec(self) -> EnvSpec:
        return self.batched.spec

    @property
    def num_envs(self) -> int:
        return self.batched.num_envs

    @property
    def lost(self) -> Bool[np.ndarray, "B"]:
        """Say that none was."""
        return np.zeros(self.num_envs, bool)

    def reset(self, seed: int) -> TimeStep:
        """Start an episode everywhere."""
        self._key, key = jax.random.split(jax.random.key(seed))
        self.state, timestep = self._reset(key)
        return timestep

    def step(self, action: np.ndarray) -> TimeStep:
        """Apply joint actions, [B, …]."""
        self._key, key = jax.random.split(self._key)
        self.state, timestep = self._step(self.state, jnp.asarray(action), key)
        return timestep

    def close(self) -> None:
        """Do nothing: there is nothing to end."""


def record(
    envs: AutoReset | ExternalEnvironments,
    actor: Policy | Controller,
    writer: Writer,
    num_episodes: int,
    *,
    greedy: bool = False,
    seed: int = 0,
    max_steps: int = 10_000,
    tell: Callable[[int, int], None] = lambda episodes, steps: None,
) -> None:
    """Play whole episodes side by side and append them to a dataset.

    Each environment plays as many as the others, or one more: short episodes are not preferred.

    Args:
        envs: B of them.
        actor: a policy, or a controller.
        writer: of the dataset.
        num_episodes: how many.
        greedy: take a policy's most likely actions instead of sampling them.
        seed: decides everything random.
        max_steps: of an episode.
        tell: called with the numbers of episodes and steps so far.

    Raises:
        RunError: an episode does not end.
    """
    num_envs = envs.num_envs
    quota = [num_episodes // num_envs + (b < num_episodes % num_envs) for b in range(num_envs)]
    spec, pending = envs.spec, [list[Transition]() for _ in range(num_envs)]
    episodes = steps = 0
    for chunk in _chunks(envs, actor, greedy, jax.random.key(seed)):
        chunk, _ = without_ids(chunk, spec)
        for b in range(num_envs):
            for piece in _episodes(jax.tree.map(lambda x, b=b: x[:, b], chunk), pending[b]):
                if quota[b]:
                    quota[b] -= 1
                    writer.append(piece)
                    episodes, steps = episodes + 1, steps + len(piece.reset)
            if quota[b] and sum(len(x.reset) for x in pending[b]) > max_steps:
                raise RunError(
                    f"an episode of {spec.name} has not ended after {max_steps:,} steps: "
                    "only whole episodes are recorded"
                )
        tell(episodes, steps)
        if not any(quota):
            return


def _episodes(column: Transition, pending: list[Transition]) -> list[Transition]:
    """Cut the steps of one environment into episodes; `pending` keeps the start of the next."""
    found, start = [], 0
    for stop in np.flatnonzero(column.terminated | column.truncated) + 1:
        found.append(concatenate([*pending, cut(column, start, int(stop))]))
        pending.clear()
        start = int(stop)
    if start < len(column.reset):
        pending.append(cut(column, start, len(column.reset)))
    return found


def _chunks(
    envs: AutoReset | ExternalEnvironments,
    actor: Policy | Controller,
    greedy: bool,
    key: Key[Array, ""],
) -> Any:
    """Yield what happens, CHUNK steps at a time, [T, B, …], as NumPy arrays."""
    start_key, key = jax.random.split(key)
    memory: Memory = () if isinstance(actor, Controller) else actor.init_memory((envs.num_envs,))
    if isinstance(envs, AutoReset):
        env_state, timestep = jax.jit(envs.reset)(start_key)
        state = RolloutState(env_state, timestep.observation, ~timestep.ended, memory)
        if not isinstance(actor, Controller):
            yield from _traced_chunks(envs, policy_actor(actor, greedy=greedy), state, key)
            return
        if actor.compiled:
            for chunk in _traced_chunks(envs, actor.traced, state, key):
                actor.check(chunk.observation, chunk.action)
                yield chunk
            return
        envs = HostedEnvironments(envs)
    act = actor.called if isinstance(actor, Controller) else policy_actor(actor, greedy=greedy)
    yield from _called_chunks(envs, act, memory, start_key, key)


def _traced_chunks(env: AutoReset, act: Actor, state: RolloutState, key: Key[Array, ""]) -> Any:
    def step(state: RolloutState, key: Key[Array, ""]) -> tuple[RolloutState, Transition]:
        act_key, env_key = jax.random.split(key)
        memory, output = act(state, act_key)
        env_state, timestep = env.step(state.env_state, output.action, env_key)
        return next_state(timestep, memory, env_state), make_transition(state, output, timestep)

    @partial(jax.jit, donate_argnums=0)
    def steps(state: RolloutState, key: Key[Array, ""]) -> tuple[RolloutState, Transition]:
        return lax.scan(step, state, jax.random.split(key, CHUNK))

    for number in range(2**31):
        state, transitions = steps(state, jax.random.fold_in(key, number))
        yield _plain(jax.device_get(transitions))


def _called_chunks(
    envs: ExternalEnvironments,
    act: Actor,
    memory: Memory,
    start_key: Key[Array, ""],
    key: Key[Array, ""],
) -> Any:
    timestep = envs.reset(seed_of(start_key[None]))
    reset: Any = np.ones(envs.num_envs, bool)
    state = RolloutState(getattr(envs, "state", ()), timestep.observation, reset, memory)
    number, found = 0, []
    while True:
        memory, output = act(state, jax.random.fold_in(key, number))
        output = jax.device_get(output)
        timestep = jax.device_get(envs.step(output.action))
        seen = jax.device_get(replace(state, env_state=(), memory=()))
        found.append(_plain(make_transition(seen, output, timestep)))
        state = next_state(timestep, memory, getattr(envs, "state", ()))
        number += 1
        if len(found) == CHUNK:
            yield jax.tree.map(lambda *x: np.stack(x), *found)
            found = []


def _plain(steps: Transition) -> Transition:
    """Return steps without metrics, whose names come up one by one."""
    return replace(steps, metrics={}, policy_metrics={})
