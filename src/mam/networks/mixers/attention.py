"""Multi-head softmax attention over agents: the mixers of the Multi-Agent Transformer (arXiv 2205.14953, §3)."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mam.config import NetworkConfig
from mam.networks.layers import SMALL_GAIN, Dense
from mam.networks.mixers.base import AbstractCausalMixer, AbstractMixer, required

MASKED = -1e9


class Projections(eqx.Module):
    """Query, key, value and output projections, with heads split and merged; what all attention mixers share."""

    query: Dense
    key: Dense
    value: Dense
    out: Dense
    num_heads: int = eqx.field(static=True)

    def __init__(self, sizes: NetworkConfig, *, key: Key[Array, ""]):
        keys = jax.random.split(key, 4)
        d_model = sizes.d_model
        self.query, self.value, self.out = (Dense(d_model, d_model, key=k, gain=SMALL_GAIN) for k in keys[:3])
        # No bias: one added to every key moves all of a query's scores alike, and the softmax takes it out again.
        self.key = Dense(d_model, d_model, key=keys[3], gain=SMALL_GAIN, bias=False)
        self.num_heads = sizes.num_heads

    def split(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch H F"]:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def merge(self, x: Float[Array, "*batch H F"]) -> Float[Array, "*batch E"]:
        return self.out(x.reshape(*x.shape[:-2], -1))


def attend(
    query: Float[Array, "*batch N H F"],
    key: Float[Array, "*batch M H F"],
    value: Float[Array, "*batch M H F"],
    visible: Bool[Array, "*#batch #N M"],
) -> Float[Array, "*batch N H F"]:
    """Softmax attention, softmax(q kᵀ / √F) v per head, over the visible positions."""
    scores = jnp.einsum("...nhf,...mhf->...hnm", query, key) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible[..., None, :, :], scores, MASKED))
    return jnp.einsum("...hnm,...mhf->...nhf", weights, value)


class Attention(AbstractMixer):
    """Every agent attends to every living agent: the encoder's mixer."""

    projections: Projections

    def __init__(self, sizes: NetworkConfig, *, key: Key[Array, ""]):
        self.projections = Projections(sizes, key=key)

    def __call__(self, x, context=None, *, alive=None):
        p = self.projections
        visible = jnp.ones((1, x.shape[-2]), bool) if alive is None else alive[..., None, :]
        return p.merge(attend(p.split(p.query(x)), p.split(p.key(x)), p.split(p.value(x)), visible))


class KVCache(eqx.Module):
    """Keys and values of the agents that have decided, and their number."""

    keys: Float[Array, "*batch N H F"]
    values: Float[Array, "*batch N H F"]
    length: Int[Array, ""]


class AbstractCausalAttention(AbstractCausalMixer):
    """Agent i attends to agents 1…i of the action stream; subclasses say what the query is."""

    projections: eqx.AbstractVar[Projections]

    @abstractmethod
    def _query_source(self, x: Array, context: Array | None) -> Array: ...

    def __call__(self, x, context=None, *, alive=None):
        p, n = self.projections, x.shape[-2]
        query = p.split(p.query(self._query_source(x, context)))
        visible = jnp.tril(jnp.ones((n, n), bool))
        if alive is not None:
            visible = visible & alive[..., None, :]
        return p.merge(attend(query, p.split(p.key(x)), p.split(p.value(x)), visible))

    def init_state(self, num_agents, batch=()):
        p = self.projections
        empty = jnp.zeros((*batch, num_agents, p.num_heads, p.query.weight.shape[1] // p.num_heads))
        return KVCache(keys=empty, values=empty, length=jnp.zeros((), jnp.int32))

    def step(self, state, x, context=None):
        p = self.projections
        query = p.split(p.query(self._query_source(x, context)))
        axis = x.ndim - 1  # of the agents in the cache
        keys = lax.dynamic_update_index_in_dim(state.keys, p.split(p.key(x)), state.length, axis)
        values = lax.dynamic_update_index_in_dim(state.values, p.split(p.value(x)), state.length, axis)
        visible = jnp.arange(keys.shape[axis]) <= state.length
        y = attend(query[..., None, :, :], keys, values, visible[None])
        return KVCache(keys=keys, values=values, length=state.length + 1), p.merge(y[..., 0, :, :])


class CausalAttention(AbstractCausalAttention):
    """Self-attention among the actions chosen so far: the decoder's first mixer."""

    projections: Projections

    def __init__(self, sizes: NetworkConfig, *, key: Key[Array, ""]):
        self.projections = Projections(sizes, key=key)

    def _query_source(self, x: Array, context: Array | None) -> Array:
        return x


class CrossAttention(AbstractCausalAttention):
    """The observation representation asks the action stream: query from `context`, keys and values from `x`."""

    projections: Projections

    def __init__(self, sizes: NetworkConfig, *, key: Key[Array, ""]):
        self.projections = Projections(sizes, key=key)

    def _query_source(self, x: Array, context: Array | None) -> Array:
        return required(context)
