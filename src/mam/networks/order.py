"""The order in which agents are encoded and decide: by index, at random, or along a curve.

    index            by index
    random           drawn anew at every step; by index where the most likely actions are taken
    hilbert          along a Hilbert curve through their positions: who is near decides near
    sweep            in ⌈√N⌉ bands across their positions, every other one backwards
    module:function  by one's own keys of an observation, [N], the smallest first

Equal keys are told apart by index; the dead come last. Positions count in the box of the living, so
that neither their unit nor where they are changes the order; of more than two coordinates the first
two are read, and of a single one either curve is its direction.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key, Num

from mam.config import CURVES, ORDERS
from mam.errors import UserError, import_function, unknown_name
from mam.types import Array, EnvSpec, Greedy, Keys, Observation, Order

BITS = 15  # of a quantised coordinate: a place on the curve is an int32
SIDE = 2**BITS
_STREAM = 2**31 - 1  # of random orders: the noise of agents' actions is keyed by their indices
Cells = Int[Array, "*batch N F"]


def decision_order(
    alive: Bool[Array, "*batch N"], keys: Num[Array, "*batch N"] | None = None
) -> Order:
    """Return the agents by key, the living first: order[k] decides k-th.

    Args:
        alive: False for the dead, who come last, by index.
        keys: the smallest decides first, and of equal ones the lowest index; by index if None.
    """
    xp = jnp if isinstance(alive, jax.Array) else np
    if keys is None:
        return xp.argsort(~alive, axis=-1, stable=True).astype(np.int32)
    by_key = xp.argsort(xp.where(alive, keys, 0), axis=-1, stable=True)
    last = ~xp.take_along_axis(alive, by_key, axis=-1)
    living_first = xp.argsort(last, axis=-1, stable=True)
    return xp.take_along_axis(by_key, living_first, axis=-1).astype(np.int32)


def order_agents(
    name: str, obs: Observation, key: Keys | None = None, greedy: Greedy = False
) -> Order:
    """Return the order of this name.

    Args:
        name: as in `network.order`.
        obs: what is seen; its positions are read where the order depends on them.
        key: draws a random order, which is by index without one.
        greedy: as without a key.
    """
    if name == "random" and key is not None:
        drawn = _draw(key, obs.alive.shape[-1])
        return decision_order(obs.alive, jnp.where(greedy, 0.0, drawn))
    return decision_order(obs.alive, _keys(name, obs))


def shifted_orders(num: int, obs: Observation) -> tuple[Order, ...]:
    """Return the orders along so many more Hilbert curves, shifted across the box as on a torus.

    Agents that are near and yet far apart on one curve, on either side of a seam of its squares,
    are near on another: the seams of a curve that is shifted by a third, or another odd fraction,
    lie elsewhere (Chan 2002, "Closest-point problems simplified on the RAM").

    Args:
        num: how many besides the one that is not shifted.
        obs: with positions.
    """
    if not num:
        return ()
    cells, parts = _cells(obs), (num + 1) | 1
    shifts = [SIDE * k // parts for k in range(1, num + 1)]
    return tuple(decision_order(obs.alive, _hilbert((cells + s) % SIDE)) for s in shifts)


def check_order(name: str, spec: EnvSpec) -> None:
    """Refuse an order that there is not, or for which the task gives no positions.

    One's own function is called, on paper.

    Raises:
        UserError: saying what there is.
    """
    if name not in ORDERS and ":" not in name:
        known = (*ORDERS, "package.module:function")
        raise unknown_name("network.order", name, known, see="mam train --help")
    if name in CURVES and spec.position_dim is None:
        raise UserError(
            f"network.order {name} needs to know where agents are: {spec.name} gives no positions"
        )
    if ":" in name:
        jax.eval_shape(partial(order_agents, name), _seen(spec))


def _seen(spec: EnvSpec) -> Any:
    """Return the shapes of an observation."""

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((spec.num_agents, *shape), dtype)

    return jax.eval_shape(
        Observation,
        agents_view=array(jnp.float32, spec.obs_dim),
        action_mask=array(bool, spec.num_actions),
        alive=array(bool),
        grid=array(spec.grid_dtype, *spec.grid_shape) if spec.grid_shape else None,
        state=jax.ShapeDtypeStruct((spec.state_dim,), jnp.float32) if spec.state_dim else None,
        positions=array(jnp.float32, spec.position_dim) if spec.position_dim else None,
    )


def hilbert_index(
    x: Int[Array, "*batch"], y: Int[Array, "*batch"], bits: int = BITS
) -> Int[Array, "*batch"]:
    """Return how far along the Hilbert curve through 2^bits × 2^bits cells a cell lies.

    Square by square, from the largest: a quarter of the square lies before, and each quarter is the
    whole curve again, mirrored and turned.

    Args:
        x: column of the cell.
        y: row of the cell.
        bits: log2 of the curve's side.

    Source: Hilbert 1891, "Über die stetige Abbildung einer Linie auf ein Flächenstück".
    """
    index = jnp.zeros_like(x)
    for bit in reversed(range(bits)):
        right, upper = (x >> bit) & 1, (y >> bit) & 1
        index = 4 * index + ((3 * right) ^ upper)
        # The lower quarters are turned: the left one about one diagonal, the right about the other.
        flip = (1 - upper) * right * (2**bits - 1)
        x, y = x ^ flip, y ^ flip
        x, y = jnp.where(upper == 1, x, y), jnp.where(upper == 1, y, x)
    return index


def take_agents(x: Array, index: Int[Array, "*batch N"]) -> Array:
    """Take entries of [*batch, N], or rows of [*batch, N, F], along the agents."""
    if x.ndim == index.ndim:
        return jnp.take_along_axis(x, index, axis=-1)
    return jnp.take_along_axis(x, index[..., None], axis=-2)


def _draw(key: Keys, num_agents: int) -> Float[Array, "*batch N"]:
    """Draw a number for each agent, keyed by the agent and apart from the noise of its action."""

    def one(key: Key[Array, ""]) -> Float[Array, "N"]:
        agents = jnp.arange(num_agents)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, _STREAM), agents)
        return jax.vmap(jax.random.uniform)(keys)

    return jax.vmap(one)(key.reshape(-1)).reshape(*key.shape, num_agents)


def _keys(name: str, obs: Observation) -> Num[Array, "*batch N"] | None:
    if ":" in name:
        return _own_keys(name)(obs)
    if name not in CURVES:
        return None
    return _hilbert(_cells(obs)) if name == "hilbert" else _sweep(_cells(obs), obs.alive)


def _cells(obs: Observation) -> Cells:
    """Return the first two coordinates in whole numbers from 0 to SIDE − 1.

    No product is added to anything, which compilers would round once or twice as they please:
    acting and learning, two programs, find the same cells.
    """
    if obs.positions is None:
        raise UserError("the order of the agents needs their positions: there are none")
    places, alive = jnp.asarray(obs.positions)[..., :2], jnp.asarray(obs.alive)[..., None]
    least = jnp.where(alive, places, jnp.inf).min(axis=-2, keepdims=True)
    most = jnp.where(alive, places, -jnp.inf).max(axis=-2, keepdims=True)
    offset = jnp.where(alive, places - least, 0.0)
    span = jnp.where(alive, most - least, 0.0).max(axis=(-2, -1), keepdims=True)
    unit = offset / jnp.where(span > 0, span, 1.0)
    return (unit * (SIDE - 1)).astype(jnp.int32)


def _hilbert(cells: Cells) -> Int[Array, "*batch N"]:
    return cells[..., 0] if cells.shape[-1] == 1 else hilbert_index(cells[..., 0], cells[..., 1])


def _sweep(cells: Cells, alive: Bool[Array, "*batch N"]) -> Int[Array, "*batch N"]:
    """Return keys band by band; there are √N bands of √N agents, if the N living lie evenly."""
    if cells.shape[-1] == 1:
        return cells[..., 0]
    across, along = cells[..., 0], cells[..., 1]
    num_bands = jnp.ceil(jnp.sqrt(alive.sum(axis=-1, keepdims=True))).astype(jnp.int32)
    band = across * num_bands // SIDE
    return band * SIDE + jnp.where(band % 2 == 0, along, SIDE - 1 - along)


@cache
def _own_keys(name: str) -> Callable[[Observation], Num[Array, "*batch N"]]:
    """Return one's own function, which sees one environment, for any number of them."""
    one = import_function("order", name)

    def keys(obs: Observation) -> Num[Array, "*batch N"]:
        function = one
        for _ in obs.alive.shape[:-1]:
            function = jax.vmap(function)
        found = jnp.asarray(function(obs))
        if found.shape != obs.alive.shape:
            n = obs.alive.shape[-1]
            raise UserError(f"the order {name} returns {list(found.shape)}: expected [{n}] keys")
        return found

    return keys
