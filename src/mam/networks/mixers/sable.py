"""Retention along agents and time: the mixers of Sable, which remember earlier environment steps.

One matrix per head and environment, which all agents share, goes from step to step. Every
projection also reads how many steps of the episode have passed, as sines and cosines.

Source: Sable (arXiv 2410.01706), §3 and its published code.
"""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from mam.config import NetworkConfig
from mam.networks.clock import CountsSteps, count_steps, step_positions
from mam.networks.mixers.base import AbstractCausalMixer, AbstractMixer, Roles
from mam.networks.mixers.retention import (
    CausalRetention,
    FullRetention,
    RetentionInputs,
    with_query,
)


class StepMemory(CountsSteps):
    """The memory of a mixer: the state after an environment step, and the count of steps."""

    state: Float[Array, "*batch H F F"]


class FullRetentionOverTime(AbstractMixer):
    """Every agent sees every living agent of its step and of earlier ones: the encoder's mixer."""

    mixer: FullRetention
    decay: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""]):
        self.mixer = FullRetention(config, key=key)
        self.decay = decay_of(config)

    def init_memory(self, batch):
        return _no_memory(self.mixer, batch)

    def __call__(self, x, context=None, *, alive=None):
        batch = x.shape[:-2]
        alive = jnp.ones(x.shape[:-1], bool) if alive is None else alive
        first = jnp.ones((1, *batch), bool)
        return self.mix_steps(self.init_memory(batch), x[None], alive[None], first)[1][0]

    def mix_steps(self, memory, x, alive, reset):
        retention, steps = self.mixer.retention, count_steps(memory.num_steps, reset)
        inputs = _at(retention.project(step_positions(steps, x)), retention.project(x))
        state, y = retention.unroll_steps(
            memory.state, inputs, alive, reset, decay=self.decay, causal=False
        )
        return StepMemory(steps[-1] + 1, state), y

    def mixing(self, x, context=None, *, alive=None):
        """Return the matrix of an episode's first step."""
        retention = self.mixer.retention
        inputs = _at(retention.project(_first(x)), retention.project(x))
        return retention.mixing(inputs, alive, causal=False)


class StepState(eqx.Module):
    """The state of a mixer among the agents of one environment step."""

    memory: StepMemory  # with the agents so far, and with this step in its number of steps
    position: RetentionInputs  # the step's, projected
    num_living: Int[Array, "*batch"]  # agents to come; those after them are dead


class CausalRetentionOverTime(AbstractCausalMixer):
    """Agent i sees agents 1…i of its step and all of earlier steps: the decoder's mixers.

    Agents are tokens of the action stream, so that a later step sees the actions of all living
    agents but the last, which no token holds.
    """

    mixer: CausalRetention
    decay: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""], cross: bool = False):
        self.mixer = CausalRetention(config, key=key, cross=cross)
        self.decay = decay_of(config)

    def project(self, x):
        return self.mixer.project(x)

    def project_context(self, context):
        return self.mixer.project_context(context)

    def init_memory(self, batch):
        return _no_memory(self.mixer, batch)

    def init_state(self, num_agents, batch=(), dtype=None):
        alive, first = jnp.ones((*batch, num_agents), bool), jnp.ones(batch, bool)
        return self.start_step(self.init_memory(batch), num_agents, alive, first, dtype)

    def start_step(self, memory, num_agents, alive, reset, dtype=None):
        decay = jnp.asarray(self.decay, memory.state.dtype)[:, None, None]
        steps = count_steps(memory.num_steps, reset[None])[0]
        state = jnp.where(reset[..., None, None, None], 0, memory.state * decay)
        like = jnp.zeros(self.mixer.retention.norm.scale.shape, dtype)
        return StepState(
            memory=StepMemory(steps + 1, state),
            position=self.mixer.retention.project(step_positions(steps, like)),
            num_living=alive.sum(axis=-1),
        )

    def end_step(self, state):
        return state.memory

    def step(self, state, inputs, context):
        inputs = _at(state.position, with_query(inputs, context))
        memory, y = self.mixer.retention.step(state.memory.state, inputs, state.num_living > 0)
        return _after(state, memory, 1), y

    def unroll(self, state, inputs, context, alive=None):
        *batch, num_new, _ = inputs.key.shape
        if state is None:
            state = self.init_state(num_new, tuple(batch), inputs.key.dtype)
        living = jnp.arange(num_new) < state.num_living[..., None]
        living = living if alive is None else living & alive
        inputs = _at(state.position, with_query(inputs, context))
        memory, y = self.mixer.retention.unroll(state.memory.state, inputs, living, causal=True)
        return _after(state, memory, num_new), y

    def unroll_steps(self, memory, inputs, context, alive, reset):
        retention, steps = self.mixer.retention, count_steps(memory.num_steps, reset)
        position = retention.project(step_positions(steps, inputs.key))
        state, y = retention.unroll_steps(
            memory.state,
            _at(position, with_query(inputs, context)),
            alive,
            reset,
            decay=self.decay,
            causal=True,
        )
        return StepMemory(steps[-1] + 1, state), y

    def mixing(self, x, context=None, *, alive=None):
        """Return the matrix of an episode's first step."""
        inputs = with_query(self.project(x), self.project_context(context))
        inputs = _at(self.mixer.retention.project(_first(x)), inputs)
        return self.mixer.retention.mixing(inputs, alive, causal=True)


def decay_of(config: NetworkConfig) -> tuple[float, ...]:
    """Return κ per head, (1 − 2^−p) f with p from 5 to 9: what S keeps from step to step."""
    rates = 1 - 2.0 ** -np.linspace(5, 9, config.num_heads)
    return tuple((config.retention_decay * rates).tolist())


def _no_memory(mixer: FullRetention | CausalRetention, batch: tuple[int, ...]) -> StepMemory:
    state = mixer.retention.init_state(batch)
    return StepMemory(jnp.zeros(batch, state.dtype), state)


def _after(state: StepState, memory: Array, num_new: int) -> StepState:
    return replace(
        state,
        memory=replace(state.memory, state=memory),
        num_living=state.num_living - num_new,
    )


def _first(x: Float[Array, "*batch N E"]) -> Float[Array, "*batch E"]:
    """Return the positions of the first step of an episode, whose agents are `x`."""
    return step_positions(jnp.zeros(x.shape[:-2], x.dtype), x)


def _at(position: RetentionInputs, inputs: RetentionInputs) -> RetentionInputs:
    """Return the inputs of a step's agents at its position: W (x + p) = W x + W p.

    Args:
        position: W p, of environment steps.
        inputs: W x, of one agent each or, with an axis more, of several.
    """
    one = inputs.key.ndim == position.key.ndim
    return jax.tree.map(lambda x, p: x + (p if one else p[..., None, :]), inputs, position)


ROLES = Roles(
    encoder=FullRetentionOverTime,
    decoder=CausalRetentionOverTime,
    cross=partial(CausalRetentionOverTime, cross=True),
)
