"""The grids of Jumanji's suites: what agents see of them, a function per view; LBF's starts.

A view takes Jumanji's state and observation, unbatched, and returns ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from mam.types import Observation

CONNECTOR_CHANNELS = (
    "own path",
    "own head",
    "own target",
    "others' paths",
    "others' heads",
    "others' targets",
)
CLEANER_CHANNELS = ("dirty", "clean", "wall", "own position", "others' positions")
LOCAL_CHANNELS = ("agents' levels", "food's levels", "free")


def vector_view(state: Any, observation: Any) -> Observation:
    """Return the views of LBF and RWARE: Jumanji's own features, as floats."""
    view, cells = observation.agents_view.astype(jnp.float32), state.agents.position
    if hasattr(cells, "x"):  # RWARE's rows and columns
        cells = jnp.stack([cells.x, cells.y], axis=-1)
    return Observation(
        view,
        observation.action_mask,
        alive=jnp.ones(view.shape[0], bool),
        positions=cells.astype(jnp.float32),
    )


def local_view(state: Any, observation: Any, *, grid_size: int, sight: int) -> Observation:
    """Return the views of LBF of any size: the cells within `sight`, [channel, row, column].

    They are flattened, and those of Jumanji's `GridObserver`, which fills a grid for every agent
    and item before it adds them up, and mixes dtypes (JAX warns). The mask is read off the view,
    where Jumanji compares all agents with all. With 64 agents a step of the environment is 6 times
    as fast as with it, 4 times as with the `VectorObserver`.

    Args:
        state: Jumanji's; one entity on a cell at most, eaten food aside.
        observation: Jumanji's, of which nothing is used and so nothing computed under `jax.jit`.
        grid_size: rows and columns of the grid.
        sight: cells to each side; beyond the edge of the grid they are 0 in all channels.
    """
    del observation
    agents, food = state.agents, state.food_items
    num_agents, width = agents.level.shape[0], 2 * sight + 1

    levels = jnp.zeros((2, grid_size + 2 * sight, grid_size + 2 * sight), jnp.float32)
    levels = levels.at[0, *(agents.position + sight).T].set(agents.level.astype(jnp.float32))
    levels = levels.at[1, *(food.position + sight).T].set(
        jnp.where(food.eaten, 0, food.level).astype(jnp.float32)
    )
    inside = np.pad(np.ones((grid_size, grid_size), bool), sight)
    board = jnp.concatenate([levels, (inside & ~levels.any(axis=0))[None].astype(jnp.float32)])
    view = jax.vmap(lambda corner: jax.lax.dynamic_slice(board, (0, *corner), (3, width, width)))(
        agents.position
    )
    view = jnp.where((agents.level > 0)[:, None, None, None], view, 0.0)  # dead from the start

    up_down_left_right = view[
        :, :, [sight - 1, sight + 1, sight, sight], [sight, sight, sight - 1, sight + 1]
    ]
    _, food_beside, free_beside = jnp.moveaxis(up_down_left_right > 0, 1, 0)
    stay, load = jnp.ones((num_agents, 1), bool), food_beside.any(axis=1, keepdims=True)
    return Observation(
        agents_view=view.reshape(num_agents, -1),
        action_mask=jnp.concatenate([stay, free_beside, load], axis=1),
        alive=agents.level > 0,
        positions=agents.position.astype(jnp.float32),
    )


def with_fewer(
    state: Any, number: Int[Array, ""], grid_size: int, *, as_many: bool, coop: bool
) -> Any:
    """Return LBF's state with so many agents; the others have level 0 and stand beside the grid.

    There they see, reach and hinder nothing. An item's level is at most those of the three weakest
    that are left together.

    Args:
        state: Jumanji's, of a new episode.
        number: of agents that are left, the first ones.
        grid_size: rows and columns of the grid.
        as_many: leave as much food; the rest is eaten and of level 0.
        coop: every item has that level.
    """
    agents, food = state.agents, state.food_items
    here = jnp.arange(agents.level.shape[0]) < number
    heavy = jnp.iinfo(agents.level.dtype).max
    weakest = jnp.sort(jnp.where(here, agents.level, heavy))[:3]
    limit = jnp.where(weakest < heavy, weakest, 0).sum()
    left = jnp.arange(food.level.shape[0]) < number if as_many else ~food.eaten
    beside = jnp.full_like(agents.position, 3 * grid_size)
    return state.replace(
        agents=agents.replace(
            position=jnp.where(here[:, None], agents.position, beside),
            level=jnp.where(here, agents.level, 0),
        ),
        food_items=food.replace(
            level=jnp.where(left, limit if coop else jnp.minimum(food.level, limit), 0),
            eaten=~left,
        ),
    )


def without_the_missing(state: Any) -> Any:
    """Return LBF's state, of NumPy arrays, with the agents alone that are on its grid."""
    here = state.agents.level > 0
    return state.replace(agents=jax.tree.map(lambda x: x[here], state.agents))


def connector_view(state: Any, observation: Any) -> Observation:
    """Return the views of Connector: the whole grid as each agent sees it.

    agents_view: row and column of its head, then of its target, in [0, 1]. grid:
    `CONNECTOR_CHANNELS`, bool; an agent that has connected has a head and no target, an empty cell
    has nothing. state: channels path, head and target, in which a cell that belongs to agent i is
    (i + 1) / N.
    """
    agents, size = state.agents, state.grid.shape[0]
    num_agents = agents.position.shape[0]
    # A cell of Jumanji's grid is 0, or 1 + 3 · owner + (0 path, 1 head, 2 target): few values, so
    # what each of them looks like is tabulated, which costs a third of computing it cell by cell.
    owner, kind = np.divmod(np.arange(3 * num_agents), 3)
    is_own = owner == np.arange(num_agents)[:, None]
    grid_of = np.zeros((num_agents, 1 + 3 * num_agents, len(CONNECTOR_CHANNELS)), bool)
    grid_of[:, 1:] = np.where(is_own, kind, 3 + kind)[..., None] == np.arange(
        len(CONNECTOR_CHANNELS)
    )
    state_of = np.zeros((1 + 3 * num_agents, 3), np.float32)
    state_of[1 + 3 * owner + kind, kind] = (owner + 1) / num_agents
    return Observation(
        agents_view=_scaled(jnp.concatenate([agents.position, agents.target], axis=1), size),
        action_mask=observation.action_mask,
        alive=jnp.ones(num_agents, bool),
        grid=jnp.asarray(grid_of)[:, state.grid],
        state=jnp.asarray(state_of)[state.grid].ravel(),
        positions=agents.position.astype(jnp.float32),
    )


def cleaner_view(state: Any, observation: Any) -> Observation:
    """Return the views of Cleaner: the whole grid as each agent sees it.

    agents_view: its row and column, in [0, 1]. grid: `CLEANER_CHANNELS`, bool; agents may share a
    tile. state: channels dirty, wall, and share of the agents that are on the tile.
    """
    position, size = state.agents_locations, state.grid.shape[0]
    num_agents = position.shape[0]
    # Dirty, clean, wall in Jumanji's order.
    tiles = state.grid[..., None] == jnp.arange(3, dtype=state.grid.dtype)
    here = (position[:, :1, None] == np.arange(size)[:, None]) & (
        position[:, 1:, None] == np.arange(size)
    )
    count = here.sum(axis=0, dtype=jnp.int32)
    grid = [
        jnp.broadcast_to(tiles, (num_agents, *tiles.shape)),
        here[..., None],
        (count > here)[..., None],
    ]
    dirty, _, wall = jnp.moveaxis(tiles.astype(jnp.float32), -1, 0)
    return Observation(
        agents_view=_scaled(position, size),
        action_mask=observation.action_mask,
        alive=jnp.ones(num_agents, bool),
        grid=jnp.concatenate(grid, axis=-1),
        state=jnp.stack([dirty, wall, count / num_agents], axis=-1).ravel(),
        positions=position.astype(jnp.float32),
    )


def draw_positions(
    key: Key[Array, ""], grid_size: int, num_food: int, num_agents: int
) -> tuple[Int[Array, "num_food 2"], Int[Array, "num_agents 2"]]:
    """Draw where the food and the agents of LBF start, rows and columns; no two on one cell.

    Food: one item after another, uniformly over the cells that are neither at the edge nor beside
    an item. Agents: uniformly over the cells without food. Jumanji's own generator means the same,
    but takes rows and columns of food for two rows of the grid to keep agents off: with much food
    it puts agents on it.
    """
    food_key, agent_key = jax.random.split(key)
    num_cells = grid_size**2
    index, at_and_beside = np.arange(num_cells), np.array([0, 1, -1, grid_size, -grid_size])

    def place(rank: Float[Array, "cells"], _: None) -> tuple[Float[Array, "cells"], Int[Array, ""]]:
        # This is argmax, which takes 6 times as long on CPUs.
        cell = jnp.where(rank == rank.max(), index, 0).max()
        return rank.at[cell + at_and_beside].set(-1.0), cell

    # The inner cells in random order: the first that is still allowed is uniform over those.
    rank = jnp.pad(
        jax.random.uniform(food_key, (grid_size - 2, grid_size - 2)), 1, constant_values=-1.0
    )
    _, food = jax.lax.scan(place, rank.ravel(), length=num_food)
    is_free = jnp.ones(num_cells).at[food].set(0.0)
    agents = jax.random.choice(agent_key, num_cells, (num_agents,), replace=False, p=is_free)
    food, agents = (jnp.stack(jnp.divmod(cells, grid_size), axis=1) for cells in (food, agents))
    return food, agents


def _scaled(cells: Int[Array, "N F"], size: int) -> Float[Array, "N F"]:
    return cells.astype(jnp.float32) / (size - 1)
