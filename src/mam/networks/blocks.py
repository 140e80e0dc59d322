"""Encoder and decoder blocks: mixers and an MLP with residuals and post-norms.

Source: MAT (arXiv 2205.14953), §3; MAM keeps them.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mam.config import NetworkConfig
from mam.networks.layers import MIXED_GAIN, MLP, Dense, LayerNorm
from mam.networks.mixers.base import (
    AbstractCausalMixer,
    AbstractMixer,
    MixerInputs,
    MixerMemory,
    MixerState,
)
from mam.networks.mixers.registry import MixerFamily
from mam.networks.mixers.roles import CausalConv, living
from mam.networks.order import take_agents

LOCAL = 2  # its weights' key is the block's own, folded with this

# run(mixer, state, inputs, context): a causal mixer's form for one agent, several, or many steps'.
Run = Callable[[AbstractCausalMixer, MixerState, MixerInputs, MixerInputs], tuple]


# Further orders of the agents: places in the order in which they are given.
Scans = tuple[Int[Array, "*batch N"], ...]


class LocalBranch(eqx.Module):
    """Dense(SiLU(Conv(x))), a depthwise convolution around each agent, which starts small.

    Source: the local branch of MambaAD's block (arXiv 2404.06564), §3.3. Difference: no norm, and
    no projection before the convolution.
    """

    conv: CausalConv
    out: Dense

    def __init__(self, width: int, d_model: int, *, key: Key[Array, ""]):
        conv_key, out_key = jax.random.split(key)
        self.conv = CausalConv(d_model, width, key=conv_key)
        self.out = Dense(d_model, d_model, key=out_key, gain=MIXED_GAIN)

    def __call__(
        self, x: Float[Array, "*batch N E"], alive: Bool[Array, "*batch N"]
    ) -> Float[Array, "*batch N E"]:
        after = (self.conv.weight.shape[0] - 1) // 2  # agents that are read ahead
        ahead = jnp.pad(living(x, alive), [(0, 0)] * (x.ndim - 2) + [(0, after), (0, 0)])
        return self.out(self.conv.unroll(None, ahead)[1][..., after:, :])


class EncoderBlock(eqx.Module):
    """x = LN(x + Mix(x));  x = LN(x + MLP(x)).

    Along several orders Mix(x) is the mean of what the mixer, with the same weights, makes of each.
    """

    mixer: AbstractMixer
    local: LocalBranch | None
    mixer_norm: LayerNorm
    mlp: MLP
    mlp_norm: LayerNorm

    def __init__(self, mixers: MixerFamily, config: NetworkConfig, *, key: Key[Array, ""]):
        mixer_key, mlp_key = jax.random.split(key)
        self.mixer = mixers.build("encoder", config, key=mixer_key)
        width = config.encoder.local_branch
        local_key = jax.random.fold_in(key, LOCAL)
        self.local = LocalBranch(width, config.d_model, key=local_key) if width else None
        self.mixer_norm = LayerNorm(config.d_model)
        self.mlp = MLP(config.d_model, key=mlp_key)
        self.mlp_norm = LayerNorm(config.d_model)

    def __call__(
        self,
        memory: MixerMemory,
        x: Float[Array, "*batch N E"],
        alive: Bool[Array, "*batch N"],
        reset: Bool[Array, "*batch"],
        scans: Scans = (),
    ) -> tuple[MixerMemory, Float[Array, "*batch N E"]]:
        """Run T environment steps; see `AbstractMixer.mix_steps`.

        Args:
            memory: before the first step.
            x: the agents, in the order of deciding.
            alive: False for the dead, who are last in this order and in every other.
            reset: whether a step is the first of its episode.
            scans: the other orders, for mixers without memory.
        """
        memory, mixed = self._mix(memory, x, alive, reset)
        for places in scans:
            other = self._mix(memory, take_agents(x, places), alive, reset)[1]
            mixed += take_agents(other, jnp.argsort(places, axis=-1))
        x = self.mixer_norm(x, mixed / (1 + len(scans)) if scans else mixed)
        return memory, self.mlp_norm(x, self.mlp(x))

    def _mix(self, memory, x, alive, reset):
        memory, mixed = self.mixer.mix_steps(memory, x, alive, reset)
        return memory, mixed if self.local is None else mixed + self.local(x, alive)


class DecoderState(eqx.Module):
    """States of the two mixers of one decoder block, or what they remember."""

    mixer: MixerState
    cross: MixerState


class DecoderBlock(eqx.Module):
    """x = LN(x + CausalMix(x));  x = LN(obs_rep + CrossMix(x, obs_rep));  x = LN(x + MLP(x))."""

    mixer: AbstractCausalMixer
    mixer_norm: LayerNorm
    cross: AbstractCausalMixer
    cross_norm: LayerNorm
    mlp: MLP
    mlp_norm: LayerNorm

    def __init__(
        self,
        mixers: MixerFamily,
        cross_mixers: MixerFamily,
        config: NetworkConfig,
        *,
        key: Key[Array, ""],
    ):
        mixer_key, cross_key, mlp_key = jax.random.split(key, 3)
        self.mixer = mixers.build("decoder", config, key=mixer_key)
        self.cross = cross_mixers.build("cross", config, key=cross_key)
        self.mlp = MLP(config.d_model, key=mlp_key)
        self.mixer_norm, self.cross_norm, self.mlp_norm = (
            LayerNorm(config.d_model) for _ in range(3)
        )

    def init_state(self, num_agents: int, batch: tuple[int, ...], dtype) -> DecoderState:
        """Return the state before the first of `num_agents` agents.

        Args:
            num_agents: N, the most agents that the state will take.
            batch: leading axes.
            dtype: of the activations.
        """
        return DecoderState(
            mixer=self.mixer.init_state(num_agents, batch, dtype),
            cross=self.cross.init_state(num_agents, batch, dtype),
        )

    def init_memory(self, batch: tuple[int, ...]) -> DecoderState:
        """Return the memory before an episode, for leading axes `batch`."""
        return DecoderState(
            mixer=self.mixer.init_memory(batch), cross=self.cross.init_memory(batch)
        )

    def start_step(self, memory: DecoderState, *args, **kwargs) -> DecoderState:
        """Return the state before a step's first agent; see `AbstractCausalMixer.start_step`."""
        return DecoderState(
            mixer=self.mixer.start_step(memory.mixer, *args, **kwargs),
            cross=self.cross.start_step(memory.cross, *args, **kwargs),
        )

    def end_step(self, state: DecoderState) -> DecoderState:
        """Return the memory after a step."""
        return DecoderState(
            mixer=self.mixer.end_step(state.mixer), cross=self.cross.end_step(state.cross)
        )

    def __call__(
        self,
        state: DecoderState | None,
        x: Float[Array, "*batch E"],
        inputs: MixerInputs,
        obs_rep: Float[Array, "*batch E"],
        context: MixerInputs,
        *,
        run: Run,
    ) -> tuple[DecoderState, Float[Array, "*batch E"]]:
        """Run what comes after `state`.

        Args:
            state: what is known of what comes before; None: there is nothing.
            x: the action stream.
            inputs: `mixer.project(x)`.
            obs_rep: the observation representation.
            context: `cross.project_context(obs_rep)`.
            run: the form of the mixers: what is read at once, and what `state` is.

        Returns:
            The state after it, and the activations for the next block.
        """
        mixer_state, cross_state = (None, None) if state is None else (state.mixer, state.cross)
        mixer_state, mixed = run(self.mixer, mixer_state, inputs, None)
        x = self.mixer_norm(x, mixed)
        cross_state, crossed = run(self.cross, cross_state, self.cross.project(x), context)
        x = self.cross_norm(obs_rep, crossed)
        return DecoderState(mixer=mixer_state, cross=cross_state), self.mlp_norm(x, self.mlp(x))

    def all_at_once(
        self, x: Float[Array, "*batch N E"], obs_rep: Float[Array, "*batch N E"]
    ) -> Float[Array, "*batch N E"]:
        """Run all agents of a step at once.

        Args:
            x: the action stream.
            obs_rep: the observation representation.
        """

        def run(mixer, state, inputs, context):
            return mixer.unroll(state, inputs, context)

        read = (x, self.mixer.project(x), obs_rep, self.cross.project_context(obs_rep))
        return self(None, *read, run=run)[1]
