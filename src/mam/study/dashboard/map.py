"""The map of a replay: where agents were, as numbers for the canvas that moves them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from nicegui import ui

from mam.study.dashboard.replay import Replay


class Map(ui.element, component="map.js"):
    """A canvas on which the agents of an episode move, and the clock of the replay.

    Args:
        tell: called with which opening of an episode it shows, at which state, and whether it
            plays, a few times a second while it does.
    """

    def __init__(self, tell: Callable[[int, int, bool], None]):
        super().__init__()
        self.set(episode={"opened": 0, "last": 0})
        self.on("state", lambda event: tell(*event.args))

    def mark_on(self, chart: ui.echart) -> None:
        """Mark the state that is shown on a chart over steps."""
        self.set(chart=chart.id)
        chart.on("chart:finished", js_handler=f"() => getElement({self.id}).mark()")

    def set(self, **props: Any) -> None:
        """Change props of map.js, such as `episode`, see `scene`."""
        self._props.update(props)


def scene(key: str, replay: Replay) -> dict[str, Any]:
    """Describe an episode to the canvas, which without positions is only its clock.

    Args:
        key: by which the server knows it.
        replay: the episode.
    """
    about, parts = {"key": key, "last": replay.last}, _parts(replay)
    if not parts:
        return about
    places = parts["positions"].reshape(-1, 2).astype(np.float64)
    low, high = np.nanmin(places, axis=0), np.nanmax(places, axis=0)
    cells = _in_cells(replay.trace["positions"])
    margin = 0.5 if cells else max(0.03 * float(max(high - low)), 1e-6)
    values = replay.trace["value"][np.isfinite(replay.trace["value"])]
    return about | {
        "length": replay.length,
        "agents": replay.agents,
        "parts": {name: array[0, 0].size for name, array in parts.items()},
        "cells": cells,
        "box": [*(low - margin).tolist(), *(high + margin).tolist()],
        "range": [float(values.min()), float(values.max())] if len(values) else [0.0, 0.0],
    }


def packed(replay: Replay) -> bytes:
    """Return what the canvas draws: one array [T, N, …] of float32 after the other."""
    return b"".join(array.tobytes() for array in _parts(replay).values())


def _parts(replay: Replay) -> dict[str, np.ndarray]:
    """Return the arrays of `packed` by name; none if it is not known where any agent was."""
    trace = replay.trace
    if "positions" not in trace:
        return {}
    with np.errstate(over="ignore"):  # beyond float32 is nowhere, too
        parts = {name: trace[name].astype("<f4") for name in _DRAWN}
    places = _on_canvas(parts["positions"], cells=_in_cells(trace["positions"]))
    # Padding of a task that had fewer agents is not drawn.
    padding = (trace["alive"] == 0).all(axis=0)
    places[~np.isfinite(places).all(axis=-1) | padding] = np.nan
    parts |= {"positions": places, "place": np.argsort(trace["order"], axis=1).astype("<f4")}
    return {} if np.isnan(places).all() else parts


_DRAWN = ("positions", "value", "log_prob", "reward", "alive", "action")


def _on_canvas(positions: np.ndarray, *, cells: bool) -> np.ndarray:
    """Return x to the right and y downwards of rows and columns, or of x and y upwards."""
    if positions.shape[-1] == 1:
        return np.pad(positions, [(0, 0), (0, 0), (0, 1)])
    first, second = positions[..., 0], positions[..., 1]
    return np.stack([second, first] if cells else [first, -second], axis=-1)


def _in_cells(positions: np.ndarray) -> bool:
    """Say whether positions are whole numbers, as the rows and columns of grids are."""
    known = positions[np.isfinite(positions)]
    return bool((known == np.round(known)).all())
