"""What an agent sees, features and an image if there is one, and does, as d_model numbers."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, Key

from mam.config import NetworkConfig
from mam.networks.actions import ActionDistribution, Token
from mam.networks.images import IMAGE_ENCODERS, ConvEncoder, ScanEncoder
from mam.networks.layers import HIDDEN_GAIN, Dense, LayerNorm, activate, gelu, lookup
from mam.types import EnvSpec, Observation

# Of the embedding's bias at the start, uniform; inputs contribute numbers of order 1.
BIAS_SCALE = 0.1


class ObservationEmbedding(eqx.Module):
    """x = LN(GELU(Dense(features))), or ReLU(Dense(features)) if plain, for each agent by itself.

    An image's encoding joins the features. The rows of dead agents are read as zeros: whatever
    stands there, NaN included, goes nowhere.

    Source: MAT (arXiv 2205.14953), §3. Difference: the bias does not start at zero. An agent whose
    features are all equal would be a row of zeros to every norm of the network, each of which
    multiplies its gradient by 1/√ε = 1000, beyond any float. There is no norm over the features
    either, unless `observation_norm` is "layer": it would take their mean and scale away, of one or
    two features nearly all there is to know.
    """

    obs_norm: LayerNorm | None  # None where features come normalised, or there are none
    image: ConvEncoder | ScanEncoder | None
    dense: Dense
    norm: LayerNorm | None  # None if plain

    def __init__(self, spec: EnvSpec, config: NetworkConfig, *, key: Key[Array, ""]):
        image_key, dense_key, bias_key = jax.random.split(key, 3)
        d_model, by_layer = config.d_model, spec.obs_dim > 0 and config.observation_norm == "layer"
        self.obs_norm = LayerNorm(spec.obs_dim) if by_layer else None
        encoder = IMAGE_ENCODERS[config.image]
        self.image = (
            None if spec.grid_shape is None else encoder(spec.grid_shape, config, key=image_key)
        )
        num_features = spec.obs_dim
        if self.image is not None:
            grid = jax.ShapeDtypeStruct((1, *(spec.grid_shape or ())), jnp.float32)
            num_features += jax.eval_shape(self.image, grid).shape[1]
        dense = Dense(num_features, d_model, key=dense_key, gain=HIDDEN_GAIN)
        bias = jax.random.uniform(bias_key, (d_model,), minval=-BIAS_SCALE, maxval=BIAS_SCALE)
        self.dense = eqx.tree_at(lambda dense: dense.bias, dense, bias)
        self.norm = None if config.plain else LayerNorm(d_model)

    def features(self, obs: Observation) -> Float[Array, "*batch N F"]:
        """Return what the dense layer reads."""
        alive, features = obs.alive[..., None], []
        if obs.agents_view.shape[-1]:
            view = jnp.where(alive, obs.agents_view, 0.0)
            features.append(view if self.obs_norm is None else self.obs_norm(view))
        if self.image is not None and obs.grid is not None:
            features.append(self.image(jnp.where(alive[..., None, None], obs.grid, 0)))
        return jnp.concatenate(features, axis=-1)

    def __call__(self, obs: Observation) -> Float[Array, "*batch N E"]:
        return activate(self.dense(self.features(obs)), self.norm)


class ActionEmbedding(eqx.Module):
    """LN(GELU(token W)), W a table of V = token_dim + 1 rows: a bias-free dense layer (MAT, §3).

    Its tokens are the distribution's with a feature more, the last, which only the start token has:
    that is what the first agent reads. Where tokens are one-hot, indices of rows stand for them.
    """

    table: Float[Array, "V E"]
    norm: LayerNorm
    indexed: bool = eqx.field(static=True)

    def __init__(self, distribution: ActionDistribution, d_model: int, *, key: Key[Array, ""]):
        self.table = initializers.orthogonal(HIDDEN_GAIN)(
            key, (distribution.token_dim + 1, d_model)
        )
        self.norm = LayerNorm(d_model)
        self.indexed = distribution.indexed

    def start(self, batch: tuple[int, ...]) -> Token:
        """Return the start token, for leading axes `batch`."""
        last = self.table.shape[0] - 1
        if self.indexed:
            return jnp.full(batch, last, jnp.int32)
        return jnp.broadcast_to(jnp.zeros(last + 1).at[last].set(1.0), (*batch, last + 1))

    def pad(self, token: Token) -> Token:
        """Return the distribution's token with what tells it from the start token."""
        return (
            token
            if self.indexed
            else jnp.concatenate([token, jnp.zeros_like(token[..., :1])], axis=-1)
        )

    def shift_right(self, tokens: Token, first: Token | None = None) -> Token:
        """Return what each agent reads, the token of the agent before it (teacher forcing).

        Args:
            tokens: the distribution's, of all agents in the order of deciding.
            first: what the first of them reads; the start token if None.
        """
        axis = -1 if self.indexed else -2
        tokens = self.pad(tokens)
        first = self.start(tokens.shape[: tokens.ndim + axis]) if first is None else first
        return jnp.concatenate(
            [
                jnp.expand_dims(first, axis),
                jnp.take(tokens, jnp.arange(tokens.shape[axis] - 1), axis=axis),
            ],
            axis=axis,
        )

    def __call__(self, token: Token) -> Float[Array, "... E"]:
        if self.indexed:
            return lookup(self.rows(), token)
        return self.norm(gelu(token @ self.table))

    def rows(self) -> Float[Array, "V E"]:
        """Return the embeddings of all tokens that are indices."""
        return self.norm(gelu(self.table))
