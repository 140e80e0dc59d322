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
    """Adds W p to what the recurrence puts out: p, the position of the step.

    What agents see may then stay the same for ever, and a greedy policy still has another answer.

    Source: Sable (arXiv 2410.01706), §3, whose every projection reads p. Difference: the recurrence
    does not read it, for it changes at every step and would drown what happened once (a cue that is
    to be told after 50 steps: results/memory/README.md).
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
        inner, y = self.recurrence.step(state.recurrence, x, reset)
        return ClockState(steps + 1, inner), self._at(steps, y)

    def note(self, state, action):
        return replace(state, recurrence=self.recurrence.note(state.recurrence, action))

    def unroll(self, state, x, reset, action):
        steps = count_steps(state.num_steps, reset)
        inner, y = self.recurrence.unroll(state.recurrence, x, reset, action)
        return ClockState(steps[-1] + 1, inner), self._at(steps, y)

    def _at(
        self, steps: Float[Array, "*batch"], y: Float[Array, "*batch N E"]
    ) -> Float[Array, "*batch N E"]:
        return y + self.dense(step_positions(steps, y))[..., None, :]
