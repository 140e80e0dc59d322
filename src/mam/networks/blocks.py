"""Encoder and decoder blocks: mixers and an MLP with residuals and post-norms (MAT, §3; MAM keeps them)."""

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Key

from mam.config import NetworkConfig
from mam.networks.layers import MLP, LayerNorm
from mam.networks.mixers import AbstractCausalMixer, AbstractMixer, MixerFamily
from mam.networks.mixers.base import MixerState


class EncoderBlock(eqx.Module):
    """x = LN(x + Mix(x));  x = LN(x + MLP(x))."""

    mixer: AbstractMixer
    mixer_norm: LayerNorm
    mlp: MLP
    mlp_norm: LayerNorm

    def __init__(self, mixers: MixerFamily, sizes: NetworkConfig, *, key: Key[Array, ""]):
        mixer_key, mlp_key = jax.random.split(key)
        self.mixer = mixers.encoder(sizes, key=mixer_key)
        self.mixer_norm = LayerNorm(sizes.d_model)
        self.mlp = MLP(sizes.d_model, key=mlp_key)
        self.mlp_norm = LayerNorm(sizes.d_model)

    def __call__(
        self, x: Float[Array, "*batch N E"], alive: Bool[Array, "*batch N"] | None = None
    ) -> Float[Array, "*batch N E"]:
        x = self.mixer_norm(x + self.mixer(x, alive=alive))
        return self.mlp_norm(x + self.mlp(x))


class DecoderState(eqx.Module):
    """States of the two mixers of one decoder block."""

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

    def __init__(self, mixers: MixerFamily, sizes: NetworkConfig, *, key: Key[Array, ""]):
        mixer_key, cross_key, mlp_key = jax.random.split(key, 3)
        self.mixer = mixers.decoder(sizes, key=mixer_key)
        self.cross = mixers.cross(sizes, key=cross_key)
        self.mlp = MLP(sizes.d_model, key=mlp_key)
        self.mixer_norm, self.cross_norm, self.mlp_norm = (LayerNorm(sizes.d_model) for _ in range(3))

    def __call__(
        self, x: Float[Array, "*batch N E"], obs_rep: Float[Array, "*batch N E"]
    ) -> Float[Array, "*batch N E"]:
        x = self.mixer_norm(x + self.mixer(x))
        x = self.cross_norm(obs_rep + self.cross(x, obs_rep))
        return self.mlp_norm(x + self.mlp(x))

    def init_state(self, num_agents: int, batch: tuple[int, ...] = ()) -> DecoderState:
        return DecoderState(
            mixer=self.mixer.init_state(num_agents, batch), cross=self.cross.init_state(num_agents, batch)
        )

    def step(
        self, state: DecoderState, x: Float[Array, "*batch E"], obs_rep: Float[Array, "*batch E"]
    ) -> tuple[DecoderState, Float[Array, "*batch E"]]:
        mixer_state, mixed = self.mixer.step(state.mixer, x)
        x = self.mixer_norm(x + mixed)
        cross_state, crossed = self.cross.step(state.cross, x, obs_rep)
        x = self.cross_norm(obs_rep + crossed)
        return DecoderState(mixer=mixer_state, cross=cross_state), self.mlp_norm(x + self.mlp(x))
