"""Hanabi from JaxMARL (`hanabi/…`): the card game, without a time limit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from mam.envs.jaxmarl.base import JaxMarlEnv, import_jaxmarl
from mam.types import EnvSpec, Observation


def make_hanabi(task: str) -> "HanabiEnv":
    """Make a task of `HANABI_TASKS`, the full game for 2 to 5 players.

    Players act in turn; one that is not to move has one legal action, which does nothing. The team
    earns 1 for each card played well, and loses it all with the last life. No time limit: every
    game comes to an end.
    """
    import_jaxmarl()
    from jaxmarl.environments import Hanabi

    env = Hanabi(int(task.removesuffix("p")))
    spec = EnvSpec(
        f"hanabi/{task}", env.num_agents, int(env.obs_size), int(env.num_moves), time_limit=None
    )
    return HanabiEnv(spec, env)


@dataclass(frozen=True)
class HanabiEnv(JaxMarlEnv):
    """A game of cards, whose actions are mostly illegal."""

    def _observe(self, views: Mapping[str, Array], state: Any) -> Observation:
        legal = self._stack(self.env.get_legal_moves(state)).astype(bool)
        return Observation(self._stack(views), legal, self._all_alive())

    def _is_cut_off(self, state: Any) -> Bool[Array, ""]:
        del state
        return jnp.zeros((), bool)
