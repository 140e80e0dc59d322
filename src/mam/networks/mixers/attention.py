"""Multi-head softmax attention over agents: the mixers of the Multi-Agent Transformer (arXiv 2205.14953, §3)."""

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
    """Softmax attention, softmax(q kᵀ / √F) v per head, over the visible positions; the softmax in float32."""
    scores = jnp.einsum("...nhf,...mhf->...hnm", query, key) * query.shape[-1] ** -0.5
    scores = jnp.where(visible[..., None, :, :], scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), MASKED)
    weights = jax.nn.softmax(scores).astype(value.dtype)
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


class AttentionInputs(eqx.Module):
    """What is read of an agent: its key and value, and its query unless the second sequence asks."""

    key: Float[Array, "*batch H F"]
    value: Float[Array, "*batch H F"]
    query: Float[Array, "*batch H F"] | None


class CausalAttention(AbstractCausalMixer):
    """Agent i attends to agents 1…i of the action stream: the decoder's mixers.

    The query comes from the stream itself or, as `cross`, from the observation representation.
    """

    projections: Projections
    cross: bool = eqx.field(static=True)

    def __init__(self, sizes: NetworkConfig, *, key: Key[Array, ""], cross: bool = False):
        self.projections = Projections(sizes, key=key)
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
        empty = jnp.zeros((*batch, num_agents, p.num_heads, p.query.weight.shape[1] // p.num_heads), dtype)
        return KVCache(keys=empty, values=empty, length=jnp.zeros((), jnp.int32))

    def advance(self, state, inputs, context):
        inputs, context = jax.tree.map(lambda v: v[..., None, :, :], (inputs, context))
        state, y = self.extend(state, inputs, context)
        return state, y[..., 0, :]

    def extend(self, state, inputs, context, alive=None):
        query = context if self.cross else inputs.query
        num_new = query.shape[-3]
        if state is None:
            state = KVCache(keys=inputs.key, values=inputs.value, length=jnp.array(num_new))
            visible = jnp.tril(jnp.ones((num_new, num_new), bool))
            visible = visible if alive is None else visible & alive[..., None, :]
        else:
            axis = query.ndim - 3  # of the agents in the cache
            keys, values = (
                lax.dynamic_update_slice_in_dim(cache, new, state.length, axis)
                for cache, new in ((state.keys, inputs.key), (state.values, inputs.value))
            )
            visible = jnp.arange(keys.shape[axis]) <= state.length + jnp.arange(num_new)[:, None]
            state = KVCache(keys=keys, values=values, length=state.length + num_new)
        return state, self.projections.merge(attend(query, state.keys, state.values, visible))
