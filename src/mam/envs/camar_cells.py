"""CAMAR without comparing everything with everything: what is near is looked up in cells.

CAMAR measures every agent against every obstacle, and every pair of agents, at each move of a step
and once more for the views, where it sorts all of them. Yet what does not touch an agent does not
push it, and what is beyond the window is seen as zeros. Obstacles stand still in an episode, so
they are sorted into cells when it begins. Agents are still compared with each other, but pushes are
computed only where they touch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from camar.environment import Camar
from camar.maps.utils import idx2pos
from jaxtyping import Array, Float, Int, Key

FAR = 1e6  # coordinates of what stands for no object
SLACK = 1 + 1e-4  # of distances: CAMAR's own formulas decide what is just within reach


class CellCamar(Camar):
    """CAMAR with the same results, up to rounding; all agents have one radius, all obstacles one.

    CAMAR hands `sizes`, which are empty then, to all that needs the obstacles: here they are the
    obstacles' numbers by cell.
    """

    def __init__(self, suite: Camar, places: list[np.ndarray]) -> None:
        """Make the environment.

        Args:
            suite: CAMAR's own, whose settings this one has.
            places: for each of its maps [M, 2], where obstacles can stand.
        """
        self.__dict__.update(vars(suite))
        self.suite = suite
        self._world: Any = suite.map_generator
        world = self._world
        self._touch = world.agent_rad + world.landmark_rad
        self._side = 2 * world.landmark_rad  # obstacles stand on lattices of this width
        # The edges of cells lie where obstacles never are, so that none is taken for its neighbour.
        gaps = [_widest_gap(axis / self._side) for axis in np.concatenate(places).T]
        self._edges, widths = np.array(gaps).T
        self._off_centre = (1 - widths.min()) / 2  # of an obstacle in its cell, in cells
        cells = [np.floor(one / self._side - self._edges).astype(int) for one in places]
        _, margin = self._window(self.window + self._touch)
        first = np.concatenate(cells).min(0) - margin
        self._edges += first
        self._shape = np.concatenate(cells).max(0) - first + margin + 1
        self._capacity = max(np.unique(one, axis=0, return_counts=True)[1].max() for one in cells)
        self.map_reset = self._reset_map

    def get_obs(self, state: Any) -> Float[Array, "N O"]:
        n, radius, window = self.num_agents, self._world.agent_rad, self.window
        place = state.physical_state.agent_pos.T
        objects = _objects(place, state.landmark_pos)
        near = n + self._near(state.sizes, place, window + self._touch)
        number = jnp.concatenate([jnp.broadcast_to(jnp.arange(n)[:, None], (n, n)), near])
        ways = [place[:, :, None] - place[:, None], objects[:, near] - place[:, None]]
        distance = _length(jnp.concatenate(ways, axis=1))
        # The nearest is the agent itself.
        nearest = _smallest(distance, number, self.max_obs + 1, objects.shape[1] - 1)[1:]

        radii = jnp.where(nearest < n, radius, self._world.landmark_rad)
        way = objects[:, nearest] - place[:, None]
        distance = _length(way)
        gap = _length(way * (1 - (radius + radii) / distance))
        seen = way * (1 - (window + radii) / distance) / (window - radius)
        seen = jnp.where(gap < window, seen, 0.0)
        way = state.goal_pos.T - place
        distance = _length(way)
        goal = way / jnp.where(distance > window, distance, window)
        return jnp.concatenate([goal[:, None], seen], axis=1).T.reshape(n, -1)

    def _get_environment_force(
        self,
        agent_force: Any,
        physical_state: Any,
        landmark_pos: Any,
        sizes: Any,
        is_collision: Any,
    ) -> tuple[Float[Array, "N 2"], Int[Array, "N"]]:
        """Add up what touches each agent in the order in which CAMAR does.

        That is agents by index from the next one on, around to the one before, then obstacles.

        Args:
            agent_force: where to begin, [N, 2].
            physical_state: with `agent_pos`, [N, 2].
            landmark_pos: of the obstacles, [M, 2].
            sizes: the obstacles' numbers by cell, [capacity, X, Y].
            is_collision: collisions so far, [N].

        Returns:
            The force on each agent, and how many collisions it has.
        """
        n, position = self.num_agents, physical_state.agent_pos
        place, number = position.T, jnp.arange(n)
        objects = _objects(place, landmark_pos)
        last = objects.shape[1] - 1

        def touching(turns, other, reach):
            return jnp.where(_length(other - place[:, None]) <= reach * SLACK, turns, last)

        near = n + self._near(sizes, place, self._touch)
        between = 2 * self._world.agent_rad
        turns = jnp.concatenate(
            [
                touching((number[:, None] - number) % n, place[:, :, None], between),
                touching(near, objects[:, near], self._touch),
            ]
        )

        def following(turn):
            return jnp.where(turns > turn, turns, last).min(0)

        def push(carry):
            turn, force, collisions = carry
            other = jnp.where(turn < n, (number + turn) % n, turn)
            reach = jnp.where(turn < n, between, self._touch)
            more, collision = self._calculate_collision_force(position, objects[:, other].T, reach)
            return following(turn), force + more, collisions + collision

        carry = (following(jnp.zeros(n, int)), agent_force, is_collision)
        _, force, collisions = jax.lax.while_loop(
            lambda carry: (carry[0] < last).any(), push, carry
        )
        return force, collisions

    def _reset_map(self, key: Key[Array, ""]) -> tuple[Array, ...]:
        *world, _ = self._world.reset(key)
        return (*world, self._sort(world[1]))

    def _sort(self, landmarks: Float[Array, "M 2"]) -> Int[Array, "capacity X Y"]:
        """Return the numbers of the obstacles in each cell, M for none."""
        rows, columns = self._shape
        x, y = jnp.floor(self._in_cells(landmarks.T)).astype(int)
        inside = (x >= 0) & (x < rows) & (y >= 0) & (y < columns)
        cell = jnp.where(inside, x * columns + y, rows * columns)
        order = jnp.argsort(cell)
        cell = cell[order]
        place = jnp.arange(len(cell)) - jnp.searchsorted(cell, cell)
        table = jnp.full((self._capacity, rows * columns), len(cell))
        table = table.at[place, cell].set(order, mode="drop")
        return table.reshape(-1, rows, columns)

    def _near(
        self, table: Int[Array, "capacity X Y"], place: Float[Array, "2 N"], reach: float
    ) -> Int[Array, "K N"]:
        """Return the numbers of all obstacles within reach of each agent, and of some beyond it."""
        within, width = self._window(reach)
        first = jnp.ceil(self._in_cells(place) - within - 0.5).astype(int)
        x, y = jnp.clip(first, 0, self._shape[:, None] - width)
        step = np.arange(width)
        near = table[:, x + step[:, None, None], y + step[:, None]]
        return near.reshape(-1, place.shape[1])

    def _in_cells(self, place: Float[Array, "2 n"]) -> Float[Array, "2 n"]:
        return place / self._side - self._edges[:, None]

    def _window(self, reach: float) -> tuple[float, int]:
        """Return how far from an agent the middles of cells with obstacles within reach can be.

        And how many cells side by side that takes; both in cells.
        """
        within = reach * SLACK / self._side + self._off_centre
        return within, int(2 * within) + 1


def grid_places(world: Any) -> list[np.ndarray]:
    """Return where the obstacles of random grids can stand."""
    full = world.get_landmarks(world.map_coordinates, world.grain_factor, world.obstacle_size)
    return [np.concatenate([full.reshape(-1, 2), world.border_landmarks])]


def cave_places(world: Any) -> list[np.ndarray]:
    """Return where the obstacles of caves can stand."""
    row, column = np.divmod(np.arange(world.num_rows * world.num_cols), world.num_cols)
    places = idx2pos(row, column, 2 * world.landmark_rad, world.height, world.width)
    return [np.concatenate([places, world.border_landmarks])]


def text_places(world: Any) -> list[np.ndarray]:
    """Return where the obstacles of each drawn map stand, without those that only fill arrays."""
    return [one[one[:, 0] > -world.width] for one in np.asarray(world.landmark_pos_batch)]


def _widest_gap(coordinates: Float[np.ndarray, "..."]) -> tuple[float, float]:
    """Return the middle and the width of the widest gap between numbers, both modulo 1."""
    found = np.unique(np.round(coordinates % 1, 3) % 1)
    gaps = np.diff(np.append(found, found[0] + 1))
    return float((found + gaps / 2)[gaps.argmax()]), float(gaps.max())


def _objects(agents: Float[Array, "2 N"], landmarks: Float[Array, "M 2"]) -> Float[Array, "2 n"]:
    """Return where agents and obstacles are, and what stands for none."""
    return jnp.concatenate([agents, landmarks.T, jnp.full((2, 1), FAR)], axis=1)


def _length(ways: Float[Array, "2 *n"]) -> Float[Array, "*n"]:
    """Return lengths, to the bit as CAMAR does along the last axis, in an eighth of the time."""
    return jnp.linalg.norm(ways, axis=0)


def _smallest(
    distance: Float[Array, "K N"], number: Int[Array, "K N"], count: int, none: int
) -> Int[Array, "n N"]:
    """Return the numbers at the smallest distances, smaller numbers first where these are equal."""
    # Integers order as the numbers do that are not negative, and XLA compares them side by side.
    distance = jax.lax.bitcast_convert_type(distance, jnp.int32)
    infinite = jnp.iinfo(jnp.int32).max
    found = []
    for _ in range(count):
        least = distance.min(0)
        first = jnp.where(distance == least, number, none).min(0)
        distance = jnp.where(number == first, infinite, distance)
        found.append(jnp.where(least < infinite, first, none))
    return jnp.stack(found)
