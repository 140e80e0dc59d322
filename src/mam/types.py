"""The library's structures and protocols: observations, time steps, transitions, policies.

Axis legend, used in every shape annotation of the library:

    T  rollout_length      steps of one rollout
    L  sequence_length     steps of one sequence that is learned from, a divisor of T
    B  num_envs            environments stepped side by side
    N  num_agents          agents of one environment
    M                      items side by side: sequences, episodes, rows, or the next agents
    O  obs_dim             features one agent observes
    G  state_dim           features of the global state
    Y X C                  rows, columns and channels of an image
    A  num_actions         choices of one agent, of all components side by side;
                           real components of its action where it is continuous
    K  action_components   components of one agent's action where each is a choice
    P  num_outputs         numbers that a network puts out for one agent's action
    Z                      numbers of the noise from which one agent's action is sampled
    V                      rows of the decoder's table of tokens
    E  d_model             width of the residual stream
    D  d_inner             width inside a state-space mixer (expand · d_model)
    S  d_state             state size per inner channel
    H  num_heads           heads of attention or Mamba-2
    R  dt_rank             rank of the step-size projection
    I                      features that a dense layer reads
    F                      features of any other vector, such as those of one head

`*batch` stands for any number of leading axes (none, B, or T B); an axis called by a word, such as
`seeds`, is a number of these. All arrays are stacked over agents; dictionaries keyed by agent names
stop at the environment adapters.

Where letters clash, the nearer meaning holds: arguments called A, B, C and D are the matrices of a
state-space model, not axes; a dense layer puts out O features [I, O]; a convolution has K taps
[K, F]; a head of SSD has P = D / H channels; CUDA decoders have C columns, R copies of an
environment and J states in each; `envs/check` has G groups of V lanes with K clocks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key, Num, PyTree

if TYPE_CHECKING:
    from jax import Array
else:
    # With external environments the same structures hold NumPy arrays
    Array = jax.Array | np.ndarray

EnvState = PyTree  # what an environment needs to go on
Memory = PyTree  # what a policy carries across environment steps; () if nothing
# Of all agents: indices [*batch, N], or [*batch, N, K] of components, or real components in
# [-1, 1].
Action = Int[Array, "..."] | Float[Array, "*batch N A"]
# Of one agent, or of any number along *batch: the same without N.
AgentAction = Int[Array, "..."] | Float[Array, "*batch A"]
Order = Int[Array, "*batch N"]  # order[k] = the agent that decides k-th
Reset = Bool[Array, "*batch"]  # True at the first step of an episode
Keys = Key[Array, "*batch"]  # one for each element of the batch
Greedy = bool | Bool[Array, ""]  # the most likely actions instead of samples


class Observation(eqx.Module):
    """The agents' views before they act, and the state that a critic may know besides."""

    agents_view: Float[Array, "*batch N O"]  # features, float32
    # True = legal, or in use; every agent has one, in every component
    action_mask: Bool[Array, "*batch N A"]
    # False = dead or padded: its action is ignored, nothing is learned from it
    alive: Bool[Array, "*batch N"]
    # An image for each agent
    grid: Num[Array, "*batch N Y X C"] | Bool[Array, "*batch N Y X C"] | None = None
    # Of the whole environment, for centralised critics
    state: Float[Array, "*batch G"] | None = None
    # Where agents are, in any unit that all share; decides their order (`network.order`)
    positions: Float[Array, "*batch N F"] | None = None


class TimeStep(eqx.Module):
    """The result of an environment's `reset` and `step`.

    `terminated` and `truncated` are never merged: a terminated episode is worth nothing more, a
    truncated one (time limit) would have gone on and is bootstrapped from `final_observation`.
    Where the dead earn nothing more, an agent that is alive there but not in `observation` was
    truncated alone, while others go on.
    """

    observation: Observation  # to act on next; the new episode's first one after an auto-reset
    # Of the action just taken, per agent; a team reward is repeated
    reward: Float[Array, "*batch N"]
    terminated: Bool[Array, "*batch"]  # the task itself ended
    truncated: Bool[Array, "*batch"]  # cut off by the time limit
    final_observation: Observation  # successor of the action just taken, before any auto-reset
    # Scalars such as episode_return; the same names at every step
    metrics: dict[str, Float[Array, "*batch"]]

    @property
    def ended(self) -> Bool[Array, "*batch"]:
        """Say whether the episode is over; `observation` then starts a new one."""
        return self.terminated | self.truncated


@dataclass(frozen=True)
class EnvSpec:
    """Sizes and limits of a task; hashable, known before anything runs on a device."""

    name: str  # "suite/task"
    num_agents: int
    obs_dim: int
    # Choices of one agent, of all components; with `continuous`, components of its action
    num_actions: int
    time_limit: int | None  # environment steps after which an episode is truncated; None if unknown
    continuous: bool = False  # actions are real numbers in [-1, 1] instead of indices
    grid_shape: tuple[int, int, int] | None = None  # of the image each agent sees
    grid_dtype: str = "uint8"  # of its numbers
    state_dim: int | None = None  # features of the global state, where the environment gives one
    # All agents earn the same, the dead too; if not, the dead earn nothing more
    team_reward: bool = True
    # Such as adversary_0; without its number it says of which kind one is
    agent_names: tuple[str, ...] | None = None
    id_dim: int = 0  # of the obs_dim features, the first that say who the agent is
    # Choices in each component, where an agent makes several at once
    action_components: tuple[int, ...] | None = None
    position_dim: int | None = None  # coordinates of one agent, where the environment gives them

    @property
    def joint_action(self) -> jax.ShapeDtypeStruct:
        """Shape and type of all agents' actions: [N], [N, K] or, if continuous, [N, A]."""
        if self.continuous:
            return jax.ShapeDtypeStruct((self.num_agents, self.num_actions), np.float32)
        components = () if self.action_components is None else (len(self.action_components),)
        return jax.ShapeDtypeStruct((self.num_agents, *components), np.int32)


@runtime_checkable
class Environment(Protocol):
    """One environment, unbatched, as two pure functions; batch it with `jax.vmap`.

    It does not reset itself: `mam.envs.wrappers.AutoReset` does that for a whole batch.
    """

    @property
    def spec(self) -> EnvSpec:
        """Sizes and limits, the same at any time."""
        ...

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        """Start an episode; reward is zero, `terminated` and `truncated` are False."""
        ...

    def step(
        self, state: EnvState, action: Action, key: Key[Array, ""]
    ) -> tuple[EnvState, TimeStep]:
        """Apply the joint action.

        Args:
            state: as `reset` or the last step returned it.
            action: of all agents, [N], [N, K] or, if continuous, [N, A].
            key: decides everything random in this step.

        Returns:
            The state after it and what it led to; `final_observation` equals `observation` here.
        """
        ...

    def animate(self, states: list[EnvState], path: Path) -> None:
        """Write a GIF of an episode.

        Args:
            states: consecutive and unbatched.
            path: the file.

        Raises:
            NotImplementedError: if the environment cannot be drawn.
        """
        raise NotImplementedError(f"{self.spec.name} cannot be drawn")


@runtime_checkable
class ExternalEnvironments(Protocol):
    """External (non-JAX) environments, stepped side by side.

    Time steps are as everywhere else, with NumPy arrays [B, …] that are not overwritten later. Each
    environment starts its next episode by itself: at an episode's last step `observation` is the
    next episode's first, and `final_observation` the ended one's last. Metrics hold
    `episode_return` and `episode_length`.
    """

    @property
    def spec(self) -> EnvSpec: ...

    @property
    def num_envs(self) -> int: ...

    @property
    def lost(self) -> Bool[np.ndarray, "B"]:
        """Say whose episodes the last step cut short because their process was lost."""
        ...

    def reset(self, seed: int) -> TimeStep:
        """Start an episode everywhere; environment i draws on (seed, i) alone from here on."""
        ...

    def step(self, action: np.ndarray) -> TimeStep:
        """Apply joint actions, [B, N], [B, N, K] or, if continuous, [B, N, A]."""
        ...

    def close(self) -> None:
        """End the environments and their processes; safe to call twice."""
        ...


class PolicyOutput(eqx.Module):
    """One joint action and what training needs to know about it."""

    action: Action
    log_prob: Float[Array, "*batch N"]  # of each agent's action given the earlier agents' actions
    value: Float[Array, "*batch N"]
    order: Int[Array, "*batch N"]  # order[k] = the agent that decided k-th
    # Of acting; the same names always
    metrics: dict[str, Float[Array, "*batch"]] = eqx.field(default_factory=dict)


class Evaluation(eqx.Module):
    """A stored joint action under the current parameters (teacher-forced)."""

    log_prob: Float[Array, "*batch N"]
    entropy: Float[Array, "*batch N"]
    value: Float[Array, "*batch N"]
    # The numbers that decide the distribution of each agent's action given those before it
    distribution: Float[Array, "*batch N _"] | None = None


@runtime_checkable
class Policy(Protocol):
    """All that the trainer, the evaluator and the command line know of an algorithm.

    Every leaf is an array, so `jax.jit`, `jax.grad` and `jax.vmap` apply as they are. Leading axes
    are free: the same methods serve one environment, a batch, or a whole rollout.
    """

    def init_memory(self, batch: tuple[int, ...] = ()) -> Memory:
        """Return the memory before an episode, for leading axes `batch`; no leaves if none."""
        ...

    def act(
        self, memory: Memory, obs: Observation, reset: Reset, key: Keys, *, greedy: Greedy = False
    ) -> tuple[Memory, PolicyOutput]:
        """Choose one joint action per batch element.

        Args:
            memory: after step t − 1; `init_memory` at first.
            obs: what is seen at step t.
            reset: whether t is the first step of an episode, in which `memory` is not read.
            key: decides what is sampled.
            greedy: take the most likely action instead of a sample.

        Returns:
            The memory after step t; the action, and its log-probability, value and order.
        """
        ...

    def evaluate(
        self, memory: Memory, obs: Observation, action: Action, order: Order, reset: Reset
    ) -> Evaluation:
        """Evaluate stored joint actions, differentiably in the policy.

        A policy with memory reads the first leading axis as time. For a policy without memory all
        leading axes are alike.

        Args:
            memory: before the first step, without the time axis.
            obs: what was seen at step t.
            action: the joint action at t.
            order: in which the agents decided at t.
            reset: whether t was the first step of its episode.

        Returns:
            Log-probability, entropy and value per agent, [*batch, N].
        """
        ...

    def successor_values(
        self, memory: Memory, obs: Observation, action: Action, reset: Reset, successor: Observation
    ) -> Float[Array, "*batch N"]:
        """Return the state values of what followed every step of a rollout, from one memory.

        Equals what `act` says of the successor at t with the memory after step t; axes are those of
        `evaluate`.

        Args:
            memory: what it was before the first step, without the time axis.
            obs: what was seen at step t.
            action: the joint action at t.
            reset: whether t was the first step of its episode.
            successor: what the action at t led to, before any auto-reset: `final_observation`.

        Returns:
            The value per agent of the successor, [*batch, N].
        """
        ...


@runtime_checkable
class ExportablePolicy(Policy, Protocol):
    """A policy that can also act without drawing anything itself; the library's own all can."""

    def act_on_noise(
        self, memory: Memory, obs: Observation, reset: Reset, noise: Float[Array, "*batch N Z"]
    ) -> tuple[Memory, PolicyOutput]:
        """Choose the joint action that noise leads to: `act` as a function without randomness.

        Args:
            memory: after step t − 1; `init_memory` at first.
            obs: what is seen at step t.
            reset: whether t is the first step of an episode, in which `memory` is not read.
            noise: of every agent, as its action's distribution draws it; zeros lead to the most
                likely action.

        Returns:
            The memory after step t; the action, and its log-probability, value and order.
        """
        ...


@runtime_checkable
class FollowingPolicy(Policy, Protocol):
    """A policy that can also watch another one act; the library's own all can."""

    def follow(
        self, memory: Memory, obs: Observation, action: Action, order: Order, reset: Reset
    ) -> Memory:
        """Return the memory after a step at which another policy acted.

        Equals what `act` returns where it chooses the same actions.

        Args:
            memory: after step t − 1; `init_memory` at first.
            obs: what is seen at step t.
            action: the joint action at t.
            order: in which the agents decided, the living first.
            reset: whether t is the first step of an episode.
        """
        ...


class Transition(eqx.Module):
    """One environment step as the learner sees it, stacked to [T, B, …] by the rollout.

    Time index: `observation`, `action`, `value` are at t; `reward`, `terminated`, `truncated` and
    `final_observation` are what the action at t led to (t + 1).
    """

    observation: Observation
    reset: Bool[Array, "*batch"]  # the observation is the first of its episode
    action: Action
    log_prob: Float[Array, "*batch N"] | None  # as of acting; None where another policy acted
    value: Float[Array, "*batch N"] | None
    order: Int[Array, "*batch N"]
    reward: Float[Array, "*batch N"]
    terminated: Bool[Array, "*batch"]
    truncated: Bool[Array, "*batch"]
    final_observation: Observation
    metrics: dict[str, Float[Array, "*batch"]]  # the environment's
    policy_metrics: dict[str, Float[Array, "*batch"]] = eqx.field(default_factory=dict)
