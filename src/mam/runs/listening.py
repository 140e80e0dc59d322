"""Who listens to whom: the mixers of a policy as matrices, over an episode, as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mam.learning.normalise import as_normalised
from mam.networks.inside import activations, mixing_matrices
from mam.networks.sequence import SequencePolicy
from mam.runs.files import writing
from mam.runs.play import Episode
from mam.runs.sinks import write_atomically
from mam.types import Policy

MOST_AGENTS = 32  # whose names are written along a matrix
START = "start"  # what the first agent reads in the place of an action


def shares(policy: Policy, episode: Episode) -> dict[str, Float[np.ndarray, "T N _"]]:
    """Return how much every agent takes of every other at each step, by mixer.

    A row of a mixer is Σ_h |M_h| over its heads, divided by its sum. Rows are agents; columns are
    agents, in the decoder after the start token those whose actions are read. Rows and columns of
    the dead are 0.

    Args:
        policy: that played.
        episode: what it saw and did.

    Raises:
        UserError: if it has no mixers, or they remember earlier steps.
    """
    trace, whole = episode.trace, as_normalised(policy)

    @jax.jit
    def look(whole, obs, action, order):
        memory, seen = whole.init_memory(), whole.statistics.normalise(obs)
        reset = jnp.arange(len(order)) == 0
        read = activations(whole.network, memory, seen, action, order, reset)
        matrices = mixing_matrices(cast(SequencePolicy, whole.network), read)
        return {
            name: _by_agent(matrix, order, read.alive, of_actions=not name.startswith("encoder"))
            for name, matrix in matrices.items()
        }

    found = jax.device_get(look(whole, episode.observation, trace.action, trace.order))
    return {name: found[name] for name in sorted(found, key=_place)}


def _place(name: str) -> tuple[bool, int, bool]:
    """Return what mixers are sorted by to be in the order in which they run."""
    part, number = name.split()
    return part != "encoder", int(number), part == "cross"


def _by_agent(
    matrix: Float[Array, "T H N N"], order: Int[Array, "T N"], alive: Array, *, of_actions: bool
) -> Float[Array, "T N _"]:
    """Return the shares of a mixer, rows and columns by agent instead of in the order of deciding.

    Args:
        matrix: of every head.
        order: of deciding.
        alive: in that order.
        of_actions: column k is the action of the agent before the k-th, the start token at first.
    """
    taken = jnp.where(alive[..., None], jnp.abs(matrix).sum(axis=-3), 0.0)
    taken = taken / jnp.maximum(taken.sum(axis=-1, keepdims=True), 1e-12)
    rows = jnp.argsort(order, axis=-1)
    columns = rows
    if of_actions:
        taken = jnp.pad(taken, [(0, 0), (0, 0), (0, 1)])
        columns = jnp.concatenate([jnp.zeros_like(rows[..., :1]), rows + 1], axis=-1)
    taken = jnp.take_along_axis(taken, rows[..., None], axis=-2)
    return jnp.take_along_axis(taken, columns[..., None, :], axis=-1)


def note_shares(trace: Path, found: dict[str, Float[np.ndarray, "T N _"]]) -> None:
    """Add shares to the trace of an episode, as `mixing`, if there are not too many agents.

    Args:
        trace: the file that `mam.runs.play.write_trace` wrote.
        found: what `shares` returned.
    """
    if any(share.shape[-2] > MOST_AGENTS for share in found.values()):
        return
    rounded = {name: share.astype(np.float64).round(3).tolist() for name, share in found.items()}
    with writing(trace):
        write_atomically(trace, json.dumps(json.loads(trace.read_bytes()) | {"mixing": rounded}))


def plot_shares(
    path: Path,
    found: dict[str, Float[np.ndarray, "T N _"]],
    episode: Episode,
    picture: Path,
    *,
    num_steps: int,
    title: str,
) -> None:
    """Draw the shares of an episode: their means, and those of some steps under the environment.

    Args:
        path: the PNG.
        found: what `shares` returned.
        episode: what was played.
        picture: its GIF, if it could be drawn.
        num_steps: steps that are drawn, evenly spaced.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    length, num_agents = episode.trace.reward.shape
    steps = np.unique(np.linspace(0, length - 1, min(num_steps, length)).astype(int))
    frames = [] if episode.undrawn else frames_at(picture, steps, episode.num_frames)
    num_rows, num_columns = len(found) + bool(frames), 1 + len(steps)
    figure = Figure(figsize=(2.6 * num_columns, 2.6 * num_rows + 0.6), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    figure.suptitle(f"{title}: who (row) takes how much of whom (column)")
    if frames:
        for axis in axes[0]:
            axis.axis("off")
        for axis, frame in zip(axes[0, 1:], frames, strict=True):
            axis.imshow(frame)
    names = episode.agents or tuple(map(str, range(num_agents)))
    living = np.maximum(episode.trace.alive.sum(axis=0), 1)[:, None]  # steps, of every agent
    image = None
    for axis, (name, share) in zip(axes[bool(frames) :], found.items(), strict=True):
        heard = [START, *names] if share.shape[-1] > num_agents else names
        pictures = [share.sum(axis=0) / living, *share[steps]]
        for index, (one, values) in enumerate(zip(axis, pictures, strict=True)):
            image = one.imshow(values, vmin=0, vmax=1, cmap="viridis")
            one.set_title(f"step {steps[index - 1]}" if index else f"{name}, all steps", fontsize=9)
            _name_agents(one, heard, names)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.6, label="share of the row")
    with writing(path):
        figure.savefig(path, dpi=110)


def _name_agents(axis: Any, heard: Sequence[str], names: Sequence[str]) -> None:
    """Write agents along the sides of a matrix, unless there are too many."""
    few = len(names) <= MOST_AGENTS
    long = max(map(len, heard)) > 2
    axis.set_xticks(range(len(heard)) if few else [], heard if few else [], fontsize=7)
    axis.set_yticks(range(len(names)) if few else [], names if few else [], fontsize=7)
    axis.tick_params(axis="x", labelrotation=90 if long else 0)


def frames_at(picture: Path, steps: Int[np.ndarray, "M"], num_frames: int) -> list[np.ndarray]:
    """Return the frames of a GIF at some steps; equal ones in a row are one, shown for longer.

    Args:
        picture: the GIF.
        steps: whose frames are returned.
        num_frames: how many were drawn.
    """
    from PIL import Image, ImageSequence

    with Image.open(picture) as gif:
        seconds, frames = [], []
        for frame in ImageSequence.Iterator(gif):
            seconds.append(frame.info.get("duration") or 1)
            frames.append(np.asarray(frame.convert("RGB")))
    ends = np.cumsum(seconds)
    at = np.searchsorted(ends, (steps + 0.5) * ends[-1] / num_frames)
    return [frames[min(index, len(frames) - 1)] for index in at]
