"""The words everything else is written in: observations, time steps, transitions and the two protocols.

Axis legend, used in every shape annotation of the library:

    T  rollout_length      steps of one rollout
    B  num_envs            environments stepped side by side
    N  num_agents          agents of one environment
    O  obs_dim             features one agent observes
    A  num_actions         discrete actions of one agent
    E  d_model             width of the residual stream
    D  d_inner             width inside a state-space mixer (expand · d_model)
    S  d_state             state size per inner channel
    H  num_heads           attention heads

`*batch` stands for any number of leading axes (none, B, or T B). All arrays are stacked over agents;
dictionaries keyed by agent names stop at the environment adapters.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

EnvState = PyTree  # whatever an environment needs to go on
Memory = PyTree  # what a policy carries across environment steps; () if nothing


class Observation(eqx.Module):
    """What the agents see before they act."""

    agents_view: Float[Array, "*batch N O"]  # features, float32
    action_mask: Bool[Array, "*batch N A"]  # True = legal; every agent has at least one legal action
    alive: Bool[Array, "*batch N"]  # False = dead or padded: acts on nothing, is trained on nothing


class TimeStep(eqx.Module):
    """What an environment returns from `reset` and `step`.

    `terminated` and `truncated` are never merged: a terminated episode is worth nothing more, a
    truncated one (time limit) would have gone on and is bootstrapped from `final_observation`.
    """

    observation: Observation  # to act on next; the new episode's first one after an auto-reset
    reward: Float[Array, "*batch N"]  # of the action just taken, per agent; a team reward is repeated
    terminated: Bool[Array, "*batch"]  # the task itself ended
    truncated: Bool[Array, "*batch"]  # cut off by the time limit
    final_observation: Observation  # successor of the action just taken, before any auto-reset
    metrics: dict[str, Float[Array, "*batch"]]  # scalars such as episode_return; the same names at every step

    @property
    def ended(self) -> Bool[Array, "*batch"]:
        """Whether the episode is over, for either reason; `observation` then starts a new one."""
        return self.terminated | self.truncated


@dataclass(frozen=True)
class EnvSpec:
    """Sizes and limits of a task; hashable, known before anything runs on a device."""

    name: str  # "suite/task"
    num_agents: int
    obs_dim: int
    num_actions: int
    time_limit: int  # environment steps after which an episode is truncated


@runtime_checkable
class Environment(Protocol):
    """One environment, unbatched, as two pure functions; batch it with `jax.vmap`.

    It does not reset itself: `mam.envs.wrappers.AutoReset` does that for a whole batch.
    """

    @property
    def spec(self) -> EnvSpec: ...

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        """Starts an episode; reward is zero, `terminated` and `truncated` are False."""
        ...

    def step(self, state: EnvState, action: Int[Array, "N"], key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        """Applies the joint action; `final_observation` equals `observation` here."""
        ...

    def animate(self, states: list[EnvState], path: Path) -> None:
        """Writes a GIF of consecutive unbatched states; raises `NotImplementedError` where nothing can draw them."""
        ...


class PolicyOutput(eqx.Module):
    """One joint action and what training needs to know about it."""

    action: Int[Array, "*batch N"]
    log_prob: Float[Array, "*batch N"]  # of each agent's action given the earlier agents' actions
    value: Float[Array, "*batch N"]
    order: Int[Array, "*batch N"]  # order[k] = the agent that decided k-th


class Evaluation(eqx.Module):
    """A stored joint action under the current parameters (teacher-forced)."""

    log_prob: Float[Array, "*batch N"]
    entropy: Float[Array, "*batch N"]
    value: Float[Array, "*batch N"]


@runtime_checkable
class Policy(Protocol):
    """All that the trainer, the evaluator and the command line know of an algorithm.

    Every leaf is an array, so `jax.jit`, `jax.grad` and `jax.vmap` apply as they are. Leading axes are
    free: the same methods serve one environment, a batch, or a whole rollout.
    """

    def init_memory(self, batch: tuple[int, ...] = ()) -> Memory:
        """Memory before the first step of an episode, for leading axes `batch`; () for policies without one."""
        ...

    def act(
        self,
        memory: Memory,
        obs: Observation,
        reset: Bool[Array, "*batch"],
        key: Key[Array, "*batch"],
        *,
        greedy: bool = False,
    ) -> tuple[Memory, PolicyOutput]:
        """Chooses one joint action per batch element; `reset` marks the first step of an episode."""
        ...

    def evaluate(
        self,
        memory: Memory,
        obs: Observation,
        action: Int[Array, "*batch N"],
        order: Int[Array, "*batch N"],
        reset: Bool[Array, "*batch"],
    ) -> Evaluation:
        """Log-probability, entropy and value of stored joint actions, differentiable in the policy."""
        ...

    def value(self, memory: Memory, obs: Observation) -> Float[Array, "*batch N"]:
        """State value per agent."""
        ...


class Transition(eqx.Module):
    """One environment step as the learner sees it, stacked to [T, B, …] by the rollout.

    Time index: `observation`, `action`, `value` are at t; `reward`, `terminated`, `truncated` and
    `final_observation` are what the action at t led to (t + 1).
    """

    observation: Observation
    reset: Bool[Array, "*batch"]  # the observation is the first of its episode
    memory: Memory  # the policy's memory before it acted
    action: Int[Array, "*batch N"]
    log_prob: Float[Array, "*batch N"]
    value: Float[Array, "*batch N"]
    order: Int[Array, "*batch N"]
    reward: Float[Array, "*batch N"]
    terminated: Bool[Array, "*batch"]
    truncated: Bool[Array, "*batch"]
    final_observation: Observation
    metrics: dict[str, Float[Array, "*batch"]]
