"""Retention along the agents: the mixers of Sable without its memory.

Source: Sable (arXiv 2410.01706), §3 and its published code.
"""

from dataclasses import replace
from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from mam.config import NetworkConfig
from mam.kernels.norm import normalise
from mam.kernels.retention import retention, retention_step
from mam.networks.layers import Dense
from mam.networks.mixers.base import (
    AbstractCausalMixer,
    AbstractMixer,
    Mixing,
    Roles,
    required,
)
from mam.networks.mixers.roles import living


class RetentionInputs(eqx.Module):
    """The projections of an agent; no query where the second sequence gives it."""

    query: Float[Array, "*batch E"] | None
    key: Float[Array, "*batch E"]
    value: Float[Array, "*batch E"]
    gate: Float[Array, "*batch E"]  # before the swish


class GroupNorm(eqx.Module):
    """Zero mean and unit variance within each head, then scale and offset; heads side by side."""

    scale: Float[Array, "E"]
    offset: Float[Array, "E"]
    eps: float = eqx.field(static=True)

    def __init__(self, dim: int, eps: float = 1e-6):
        self.scale, self.offset, self.eps = jnp.ones(dim), jnp.zeros(dim), eps

    def __call__(self, x: Float[Array, "*batch H F"]) -> Float[Array, "*batch E"]:
        ones = jnp.ones(x.shape[-1], self.scale.dtype)
        x = normalise(x, ones, jnp.zeros_like(ones), eps=self.eps)
        return x.reshape(*x.shape[:-2], -1) * self.scale + self.offset


class Retention(eqx.Module):
    """Multi-head retention, y = W_o (swish(W_g x) ⊙ GroupNorm(retention(q, k, v))).

        q = W_q x;  k = W_k x / √F;  v = W_v x

    No layer has a bias; all weights start as normal with deviation 1 / d_model.
    """

    query: Dense
    key: Dense
    value: Dense
    gate: Dense
    out: Dense
    norm: GroupNorm
    num_heads: int = eqx.field(static=True)

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""]):
        d_model = config.d_model

        def dense(key: Key[Array, ""]) -> Dense:
            layer = Dense(d_model, d_model, key=key, bias=False)
            weight = jax.random.normal(key, (d_model, d_model)) / d_model
            return eqx.tree_at(lambda layer: layer.weight, layer, weight)

        self.query, self.key, self.value, self.gate, self.out = map(dense, jax.random.split(key, 5))
        self.norm = GroupNorm(d_model)
        self.num_heads = config.num_heads

    def project(self, x: Float[Array, "*batch E"]) -> RetentionInputs:
        """Compute what is read of agents, each by itself."""
        return RetentionInputs(self.query(x), self.key(x), self.value(x), self.gate(x))

    def init_state(
        self, batch: tuple[int, ...], dtype: jnp.dtype | None = None
    ) -> Float[Array, "*batch H F F"]:
        """Return S before anything was read: zeros.

        Args:
            batch: leading axes.
            dtype: of the inputs; S is in float32 or wider.
        """
        dtype = dtype or jnp.zeros(()).dtype
        width = self.norm.scale.shape[0] // self.num_heads
        shape = (*batch, self.num_heads, width, width)
        return jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))

    def step(
        self,
        state: Float[Array, "*batch H F F"],
        inputs: RetentionInputs,
        alive: Bool[Array, "*batch"] | None = None,
    ) -> tuple[Float[Array, "*batch H F F"], Float[Array, "*batch E"]]:
        """Return the state after the next agent, and its output.

        Args:
            state: after the agents before.
            inputs: of the agent.
            alive: the dead leave the state as it was.
        """
        state, y = retention_step(*self._heads(inputs, alive), state)
        return state, self._out(y, inputs)

    def unroll(
        self,
        state: Float[Array, "*batch H F F"] | None,
        inputs: RetentionInputs,
        alive: Bool[Array, "*batch M"] | None = None,
        *,
        causal: bool,
    ) -> tuple[Float[Array, "*batch H F F"], Float[Array, "*batch M E"]]:
        """Return the state after the next M agents of one step, and their outputs.

        Args:
            state: after the agents before; None: there are none.
            inputs: of the M agents.
            alive: the dead leave the state as it was.
            causal: agents see those before them and themselves; if not, all M.
        """
        batch, dtype = inputs.key.shape[:-2], inputs.key.dtype
        after, y = self.unroll_steps(
            self.init_state(batch, dtype) if state is None else state,
            jax.tree.map(lambda v: v[None], inputs),
            None if alive is None else alive[None],
            jnp.zeros((1, *batch), bool),
            decay=(1.0,) * self.num_heads,
            causal=causal,
        )
        return after, y[0]

    def unroll_steps(
        self,
        state: Float[Array, "*batch H F F"],
        inputs: RetentionInputs,
        alive: Bool[Array, "T *batch N"] | None,
        reset: Bool[Array, "T *batch"],
        *,
        decay: tuple[float, ...],
        causal: bool,
    ) -> tuple[Float[Array, "*batch H F F"], Float[Array, "T *batch N E"]]:
        """Return the state after T environment steps, and the outputs of all agents.

        Args:
            state: before the first step.
            inputs: of the agents at step t, time first.
            alive: the dead leave the state as it was.
            reset: whether step t is the first of its episode.
            decay: of the state from one step to the next, by head.
            causal: agents see those before them and themselves; if not, all of their step.
        """
        q, k, v = self._heads(inputs, alive)
        state, y = retention(q, k, v, state, reset, decay=decay, causal=causal)
        return state, self._out(y, inputs)

    def mixing(
        self, inputs: RetentionInputs, alive: Bool[Array, "*batch N"] | None, *, causal: bool
    ) -> Mixing:
        """Return retention among the agents of an episode's first step as a matrix, Q Kᵀ.

        Args:
            inputs: of the agents.
            alive: nobody sees the others.
            causal: agents see those before them and themselves; if not, all.
        """
        q, k, v = self._heads(inputs, alive)
        batch = k.shape[:-3]
        state, first = self.init_state(batch, k.dtype), jnp.ones((1, *batch), bool)
        how = {"decay": (1.0,) * self.num_heads, "causal": causal}

        def apply(values: Array) -> Array:
            v = jnp.swapaxes(values, -2, -3)
            return jnp.swapaxes(
                retention(q[None], k[None], v[None], state, first, **how)[1][0], -2, -3
            )

        return Mixing(
            values=jnp.swapaxes(v, -2, -3),
            apply=apply,
            finish=lambda y: self._out(jnp.swapaxes(y, -2, -3), inputs),
        )

    def _heads(self, inputs: RetentionInputs, alive: Array | None) -> tuple[Array, Array, Array]:
        """Return query, key and value by head, [*batch, H, F]; the dead have no key and value."""
        rows = required(inputs.query), living(inputs.key, alive), living(inputs.value, alive)
        q, k, v = (x.reshape(*x.shape[:-1], self.num_heads, -1) for x in rows)
        return q, k * k.shape[-1] ** -0.5, v

    def _out(self, y: Float[Array, "*batch H F"], inputs: RetentionInputs) -> Array:
        gate = jax.nn.silu(inputs.gate)
        return self.out(gate * self.norm(y).astype(gate.dtype))


class FullRetention(AbstractMixer):
    """Every agent sees every living agent: the encoder's mixer."""

    retention: Retention

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""]):
        self.retention = Retention(config, key=key)

    def __call__(self, x, context=None, *, alive=None):
        return self.retention.unroll(None, self.retention.project(x), alive, causal=False)[1]

    def mixing(self, x, context=None, *, alive=None):
        return self.retention.mixing(self.retention.project(x), alive, causal=False)


class CausalRetention(AbstractCausalMixer):
    """Agent i sees agents 1…i of the action stream: the decoder's mixers.

    The query comes from the stream itself or, as `cross`, from the observation representation.
    """

    retention: Retention
    cross: bool = eqx.field(static=True)
    has_constant_state: ClassVar[bool] = True

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""], cross: bool = False):
        self.retention = Retention(config, key=key)
        self.cross = cross

    def project(self, x):
        r = self.retention
        query = None if self.cross else r.query(x)
        return RetentionInputs(query, r.key(x), r.value(x), r.gate(x))

    def project_context(self, context):
        return self.retention.query(required(context)) if self.cross else None

    def init_state(self, num_agents, batch=(), dtype=None):
        return self.retention.init_state(batch, dtype)

    def step(self, state, inputs, context):
        return self.retention.step(state, with_query(inputs, context))

    def unroll(self, state, inputs, context, alive=None):
        return self.retention.unroll(state, with_query(inputs, context), alive, causal=True)

    def mixing(self, x, context=None, *, alive=None):
        inputs = with_query(self.project(x), self.project_context(context))
        return self.retention.mixing(inputs, alive, causal=True)


def with_query(inputs: RetentionInputs, query: Array | None) -> RetentionInputs:
    """Return `inputs` with the query of the second sequence, if it gives one."""
    return inputs if query is None else replace(inputs, query=query)


ROLES = Roles(
    encoder=FullRetention, decoder=CausalRetention, cross=partial(CausalRetention, cross=True)
)
