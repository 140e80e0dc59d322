"""The encoder: embedded observations to representations, all agents at once."""

from collections.abc import Sequence
from typing import cast

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Key

from mam.config import NetworkConfig
from mam.networks.blocks import EncoderBlock, Scans
from mam.networks.heads import Head
from mam.networks.mixers.base import MixerMemory
from mam.networks.mixers.registry import MixerFamily

EncoderMemory = tuple[MixerMemory, ...]  # of every block


class Encoder(eqx.Module):
    """The blocks, and a value head that reads their result (MAT, §3)."""

    blocks: tuple[EncoderBlock, ...]
    value_head: Head | None  # None where a network of their own gives values
    remat: bool = eqx.field(static=True)

    def __init__(
        self,
        layout: Sequence[MixerFamily],
        config: NetworkConfig,
        *,
        valued: bool = True,
        key: Key[Array, ""],
    ):
        """Build the blocks.

        Args:
            layout: the mixers of every block.
            config: of the networks.
            valued: whether there is a value head.
            key: of the weights.
        """
        value_key, *block_keys = jax.random.split(key, 1 + len(layout))
        self.blocks = tuple(
            EncoderBlock(mixers, config, key=k)
            for mixers, k in zip(layout, block_keys, strict=True)
        )
        self.value_head = Head(config.d_model, 1, key=value_key) if valued else None
        self.remat = config.remat

    def init_memory(self, batch: tuple[int, ...]) -> EncoderMemory:
        """Return the memory before an episode, for leading axes `batch`."""
        return tuple(block.mixer.init_memory(batch) for block in self.blocks)

    def step(
        self,
        memory: EncoderMemory,
        x: Float[Array, "*batch N E"],
        alive: Bool[Array, "*batch N"],
        reset: Bool[Array, "*batch"],
        scans: Scans = (),
    ) -> tuple[EncoderMemory, Float[Array, "*batch N E"]]:
        """Encode the agents of one environment step, in the order of deciding.

        Args:
            memory: after the step before.
            x: the embedded observations; there is no time axis.
            alive: False for the dead.
            reset: whether the step is the first of its episode.
            scans: further orders; there are none with memory.
        """
        if not jax.tree.leaves(memory):
            return self.unroll(memory, x, alive, reset, scans)
        x, alive, reset = (v[None] for v in (x, alive, reset))
        memory, obs_rep = self.unroll(memory, x, alive, reset)
        return memory, obs_rep[0]

    def unroll(
        self,
        memory: EncoderMemory,
        x: Float[Array, "*batch N E"],
        alive: Bool[Array, "*batch N"],
        reset: Bool[Array, "*batch"],
        scans: Scans = (),
    ) -> tuple[EncoderMemory, Float[Array, "*batch N E"]]:
        """Encode agents given in the order of deciding, the dead last.

        Without memory all leading axes are alike; with it the first is time.

        Args:
            memory: before the first step.
            x: the embedded observations.
            alive: False for the dead, which change nothing for the others.
            reset: whether a step is the first of its episode.
            scans: further orders along which each block mixes.
        """
        after = []
        for block, before in zip(self.blocks, memory, strict=True):
            run = jax.checkpoint(EncoderBlock.__call__) if self.remat else EncoderBlock.__call__
            own, x = run(block, before, x, alive, reset, scans)
            after.append(own)
        return tuple(after), x

    def values(self, obs_rep: Float[Array, "*batch N E"]) -> Float[Array, "*batch N"]:
        """Return the values that representations stand for; only with a value head."""
        return cast(Head, self.value_head)(obs_rep)[..., 0]
