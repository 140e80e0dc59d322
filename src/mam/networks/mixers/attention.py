"""Multi-head softmax attention over agents: the mixers of the Multi-Agent Transformer.

Source: MAT (arXiv 2205.14953), §3.
"""

from dataclasses import replace
from functools import partial, reduce
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mam.config import NetworkConfig
from mam.kernels.native.attention import native_attention, native_attention_supports
from mam.kernels.native.library import by_platform, use_native
from mam.networks.layers import SMALL_GAIN, Dense
from mam.networks.mixers.base import AbstractCausalMixer, AbstractMixer, Mixing, Roles, required

MASKED = -1e9
FEW_AGENTS = 8  # so few that sums over them are written out


class Projections(eqx.Module):
    """Query, key, value and output projections of an attention mixer; heads split and merged."""

    query: Dense
    key: Dense
    value: Dense
    out: Dense
    num_heads: int = eqx.field(static=True)

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""]):
        keys = jax.random.split(key, 4)
        d_model = config.d_model
        self.query, self.value, self.out = (
            Dense(d_model, d_model, key=k, gain=SMALL_GAIN) for k in keys[:3]
        )
        # No bias: one added to every key moves all of a query's scores alike, and the softmax takes
        # it out again.
        self.key = Dense(d_model, d_model, key=keys[3], gain=SMALL_GAIN, bias=False)
        self.num_heads = config.num_heads

    def split(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch H F"]:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def merge(self, x: Float[Array, "*batch H F"]) -> Float[Array, "*batch E"]:
        return self.out(x.reshape(*x.shape[:-2], -1))


class Attended(eqx.Module):
    """Agents to attend to."""

    keys: Float[Array, "*batch H M F"]
    values: Float[Array, "*batch H M F"]
    visible: Bool[Array, "..."]  # to which agents, [*batch, N, M] or less


@jax.custom_vjp
def _match(query: Float[Array, "*batch N F"], keys: Float[Array, "*batch M F"]) -> Array:
    """Return q kᵀ, [*batch, N, M]."""
    return jnp.einsum("...nf,...mf->...nm", query, keys)


@jax.custom_vjp
def _weigh(weights: Float[Array, "*batch N M"], values: Float[Array, "*batch M F"]) -> Array:
    """Return w v, [*batch, N, F], and so its gradients and those of `_match`.

    XLA takes up to seventeen times as long on CPU for many small products as for the sums.
    """

    def written_out(weights: Array, values: Array) -> Array:
        terms = [weights[..., m : m + 1] * values[..., m : m + 1, :] for m in range(num_agents)]
        return reduce(jnp.add, terms)

    num_agents, product = values.shape[-2], partial(jnp.einsum, "...nm,...mf->...nf")
    if num_agents > FEW_AGENTS or weights.dtype != jnp.float32:
        return product(weights, values)
    return by_platform(weights, values, default=product, cpu=written_out)


def _transposed(weights: Float[Array, "*batch N M"]) -> Float[Array, "*batch M N"]:
    return jnp.swapaxes(weights, -1, -2)


_match.defvjp(
    lambda query, keys: (_match(query, keys), (query, keys)),
    lambda inputs, g: (_weigh(g, inputs[1]), _weigh(_transposed(g), inputs[0])),
)
_weigh.defvjp(
    lambda weights, values: (_weigh(weights, values), (weights, values)),
    lambda inputs, g: (_match(g, inputs[1]), _weigh(_transposed(inputs[0]), g)),
)


def attend(query: Float[Array, "*batch H N F"], *parts: Attended) -> Float[Array, "*batch H N F"]:
    """Return softmax(q kᵀ / √F) v per head, the softmax in float32 or wider.

    Args:
        query: q.
        *parts: agents to attend to; the softmax is over what is visible of all of them.
    """
    first = parts[0]
    if len(parts) == 1 and use_native() and native_attention_supports(query, first.keys):
        return native_attention(query, first.keys, first.values, first.visible)

    def scores(part: Attended) -> Array:
        scores = _match(query, part.keys) * query.shape[-1] ** -0.5
        wide = jnp.promote_types(scores.dtype, jnp.float32)
        return jnp.where(part.visible[..., None, :, :], scores.astype(wide), MASKED)

    weights = jax.nn.softmax(jnp.concatenate([scores(part) for part in parts], axis=-1)).astype(
        query.dtype
    )
    shares = jnp.split(weights, np.cumsum([part.keys.shape[-2] for part in parts[:-1]]), axis=-1)
    products = [_weigh(w, part.values) for w, part in zip(shares, parts, strict=True)]
    return reduce(jnp.add, products)


def heads_first(x: Float[Array, "*batch N H F"]) -> Float[Array, "*batch H N F"]:
    """Move heads before agents: a decoder's step reads all cached keys as they are laid out."""
    return jnp.swapaxes(x, -2, -3)


def mixing_of(
    projections: Projections, query: Float[Array, "*batch H N F"], agents: Attended
) -> Mixing:
    """Return softmax(q kᵀ / √F) as a matrix.

    Args:
        projections: of the mixer.
        query: q.
        agents: to attend to.
    """
    return Mixing(
        values=agents.values,
        apply=lambda values: attend(query, replace(agents, values=values)),
        finish=lambda y: projections.merge(heads_first(y)),
    )


class Attention(AbstractMixer):
    """Every agent attends to every living agent: the encoder's mixer."""

    projections: Projections

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""]):
        self.projections = Projections(config, key=key)

    def __call__(self, x, context=None, *, alive=None):
        return self.mixing(x, alive=alive).output

    def mixing(self, x, context=None, *, alive=None):
        p = self.projections
        visible = jnp.ones((1, x.shape[-2]), bool) if alive is None else alive[..., None, :]
        query, key, value = (
            heads_first(p.split(project(x))) for project in (p.query, p.key, p.value)
        )
        return mixing_of(p, query, Attended(key, value, visible))


class KVCache(eqx.Module):
    """Keys and values of the agents that have decided, and their number."""

    keys: Float[Array, "*batch H N F"]
    values: Float[Array, "*batch H N F"]
    length: Int[Array, ""]


class AttentionInputs(eqx.Module):
    """An agent's key and value, and its query unless the second sequence gives it."""

    key: Float[Array, "*batch H F"]
    value: Float[Array, "*batch H F"]
    query: Float[Array, "*batch H F"] | None


class CausalAttention(AbstractCausalMixer):
    """Agent i attends to agents 1…i of the action stream: the decoder's mixers.

    The query comes from the stream itself or, as `cross`, from the observation representation.
    """

    projections: Projections
    cross: bool = eqx.field(static=True)

    def __init__(self, config: NetworkConfig, *, key: Key[Array, ""], cross: bool = False):
        self.projections = Projections(config, key=key)
        self.cross = cross

    def project(self, x):
        p = self.projections
        query = None if self.cross else p.split(p.query(x))
        return AttentionInputs(key=p.split(p.key(x)), value=p.split(p.value(x)), query=query)

    def project_context(self, context):
        p = self.projections
        return p.split(p.query(required(context))) if self.cross else None

    def init_state(self, num_agents, batch=(), dtype=None):
        p = self.projections
        empty = jnp.zeros(
            (*batch, p.num_heads, num_agents, p.query.weight.shape[1] // p.num_heads), dtype
        )
        return KVCache(keys=empty, values=empty, length=jnp.zeros((), jnp.int32))

    def step(self, state, inputs, context):
        inputs, context = jax.tree.map(lambda v: v[..., None, :, :], (inputs, context))
        state, y = self.unroll(state, inputs, context)
        return state, y[..., 0, :]

    def unroll(self, state, inputs, context, alive=None):
        query, new = self._read(inputs, context, alive)
        axis = query.ndim - 2  # of the agents
        num_new = query.shape[axis]
        if state is None:
            y = attend(query, new)
            state = KVCache(keys=new.keys, values=new.values, length=jnp.array(num_new))
        else:
            # The cache is read as it was before it is written: the other way round XLA copies it
            # twice as often.
            before = jnp.arange(state.keys.shape[axis]) < state.length
            y = attend(query, Attended(state.keys, state.values, before[None]), new)
            keys = lax.dynamic_update_slice_in_dim(state.keys, new.keys, state.length, axis)
            values = lax.dynamic_update_slice_in_dim(state.values, new.values, state.length, axis)
            state = KVCache(keys=keys, values=values, length=state.length + num_new)
        return state, self.projections.merge(heads_first(y))

    def mixing(self, x, context=None, *, alive=None):
        read = self._read(self.project(x), self.project_context(context), alive)
        return mixing_of(self.projections, *read)

    def _read(self, inputs: AttentionInputs, context: Any, alive: Array | None):
        """Return the queries of agents, and what these may attend to among themselves."""
        query = heads_first(required(context if self.cross else inputs.query))
        causal = jnp.tril(jnp.ones((query.shape[-2],) * 2, bool))
        visible = causal if alive is None else causal & alive[..., None, :]
        return query, Attended(heads_first(inputs.key), heads_first(inputs.value), visible)


ROLES = Roles(
    encoder=Attention, decoder=CausalAttention, cross=partial(CausalAttention, cross=True)
)
