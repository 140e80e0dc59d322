"""How many steps of the episode have passed, read beside what agents see."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from mam.networks.clock import CountsSteps, count_steps, step_positions
from mam.networks.layers import MIXED_GAIN, Dense
from mam.networks.memory.base import AbstractRecurrence


class ClockState(CountsSteps):
    """The recurrence's own, and the count of steps."""

    recurrence: PyTree


class Clock(AbstractRecurrence):
    """Adds W p to what the recurrence reads of an agent: p, the position of the step.

    An episode in which nothing changes is then not the same observation for ever, to which a
    greedy policy has but one answer.

    Source: Sable (arXiv 2410.01706), §3, whose every projection reads p.
    """

    recurrence: AbstractRecurrence
    dense: Dense

    def __init__(self, recurrence: AbstractRecurrence, d_model: int, *, key: Key[Array, ""]):
        self.recurrence = recurrence
        self.dense = Dense(d_model, d_model, key=key, gain=MIXED_GAIN, bias=False)

    def init(self, shape):
        return ClockState(jnp.zeros(shape[:-1]), self.recurrence.init(shape))

    def step(self, state, x, reset):
        steps = count_steps(state.num_steps, reset[None])[0]
        inner, y = self.recurrence.step(state.recurrence, self._at(steps, x), reset)
        return ClockState(steps + 1, inner), y

    def note(self, state, action):
        return replace(state, recurrence=self.recurrence.note(state.recurrence, action))

    def unroll(self, state, x, reset, action):
        steps = count_steps(state.num_steps, reset)
        inner, y = self.recurrence.unroll(state.recurrence, self._at(steps, x), reset, action)
        return ClockState(steps[-1] + 1, inner), y

    def _at(
        self, steps: Float[Array, "*batch"], x: Float[Array, "*batch N E"]
    ) -> Float[Array, "*batch N E"]:
        return x + self.dense(step_positions(steps, x))[..., None, :]
