"""Retention along time, as the memory of every agent by itself."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mam.config import NetworkConfig
from mam.networks.layers import MIXED_GAIN, Dense, LayerNorm, RMSNorm
from mam.networks.memory.base import AbstractRecurrence
from mam.networks.mixers.retention import Retention

HEAD_WIDTH = 16  # features of a head, at least: an agent keeps a square of them for every head


class RetentionMemory(AbstractRecurrence):
    """out = LN(x + W (swish(g) ⊙ GroupNorm(retention(RMSNorm(x))))), a token per step.

    The state is a matrix per head, which fades by κ = 1 − 2^−p from step to step, p evenly spread
    over the heads between 1 and 9. Difference from retention along agents: weights do not start
    near zero, of which the small gain of W takes care.
    """

    pre_norm: RMSNorm
    retention: Retention
    post_norm: LayerNorm
    decay: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""]):
        d_model = config.d_model
        heads = max(h for h in range(1, d_model + 1) if h == 1 or _fits(d_model, h))
        *keys, out_key = jax.random.split(key, 5)
        layers = [Dense(d_model, d_model, key=k, bias=False) for k in keys]
        layers.append(Dense(d_model, d_model, key=out_key, gain=MIXED_GAIN, bias=False))
        self.retention = eqx.tree_at(
            lambda r: [r.query, r.key, r.value, r.gate, r.out],
            Retention(replace(config, num_heads=heads), key=key),
            layers,
        )
        self.pre_norm, self.post_norm = RMSNorm(d_model), LayerNorm(d_model)
        exponents = 1 + 8 * (np.arange(heads) + 0.5) / heads
        self.decay = tuple((1 - 2.0**-exponents).tolist())

    def init(self, shape):
        return self.retention.init_state(shape)

    def step(self, state, x, reset):
        state, y = self._steps(state, x[None], reset[None])
        return state, y[0]

    def unroll(self, state, x, reset, action):
        return self._steps(state, x, reset)

    def _steps(self, state, x, reset):
        inputs = self.retention.project(self.pre_norm(x))
        state, y = self.retention.unroll_steps(
            state,
            jax.tree.map(lambda v: v[..., None, :], inputs),
            None,
            jnp.broadcast_to(reset[..., None], x.shape[:-1]),
            decay=self.decay,
            causal=True,
        )
        return state, self.post_norm(x, y[..., 0, :])


def _fits(d_model: int, heads: int) -> bool:
    return d_model % heads == 0 and d_model // heads >= HEAD_WIDTH
