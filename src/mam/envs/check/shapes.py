"""Shapes and types: of one time step against the specification, and of a step against a reset."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from mam.envs.check.report import Finding
from mam.types import EnvSpec, Observation, TimeStep


def is_fatal(finding: Finding) -> bool:
    """Say whether episodes cannot be played or recorded before this is mended."""
    return finding.check in ("protocol", "spec", "shape", "structure") and finding.field not in (
        "animate",
        "close",
    )


def check_fields(
    timestep: TimeStep, spec: EnvSpec, batch: tuple[int, ...] = ()
) -> Iterator[Finding]:
    """Check shapes and types of a time step, abstract or not, with leading axes `batch`."""
    for name, kind in (
        ("observation", Observation),
        ("final_observation", Observation),
        ("metrics", dict),
    ):
        if not isinstance(value := getattr(timestep, name), kind):
            yield Finding(
                "protocol", "error", name, f"an instance of {kind.__name__}", type(value).__name__
            )
            return
    per_agent = [
        timestep.observation.agents_view,
        timestep.observation.action_mask,
        timestep.observation.alive,
    ]
    shapes = [np.shape(x)[len(batch) :] for x in (*per_agent, timestep.reward)]
    found = {shape[0] if shape else None for shape in shapes}
    if len(found) == 1 and (number := found.pop()) is not None and number != spec.num_agents:
        yield Finding(
            "shape",
            "error",
            "num_agents",
            f"{spec.num_agents} agents (spec)",
            f"arrays of {number}",
        )
        spec = replace(spec, num_agents=number)
    yield from _check_observation(timestep.observation, spec, batch, "")
    if _avals(timestep.final_observation) != _avals(timestep.observation):
        yield from _check_observation(timestep.final_observation, spec, batch, "final_observation.")
    yield from _check_array("reward", timestep.reward, (*batch, spec.num_agents), "float32")
    yield from _check_array("terminated", timestep.terminated, batch, "bool")
    yield from _check_array("truncated", timestep.truncated, batch, "bool")
    for name, value in timestep.metrics.items():
        for finding in _check_array(f"metrics.{name}", value, batch, "float32"):
            yield replace(finding, check="metrics")


def check_metric_names(first: TimeStep, later: TimeStep, step: int) -> Iterator[Finding]:
    """Check that metrics have the same names at every step."""
    if first.metrics.keys() != later.metrics.keys():
        expected, got = (
            ", ".join(sorted(timestep.metrics)) or "none" for timestep in (first, later)
        )
        yield Finding(
            "metrics", "error", "metrics", f"the names that reset gave ({expected})", got, step=step
        )


def _check_observation(
    obs: Observation, spec: EnvSpec, batch: tuple[int, ...], prefix: str
) -> Iterator[Finding]:
    agents = (*batch, spec.num_agents)
    yield from _check_array(
        f"{prefix}agents_view", obs.agents_view, (*agents, spec.obs_dim), "float32"
    )
    yield from _check_array(
        f"{prefix}action_mask", obs.action_mask, (*agents, spec.num_actions), "bool"
    )
    yield from _check_array(f"{prefix}alive", obs.alive, agents, "bool")
    grid = None if spec.grid_shape is None else (*agents, *spec.grid_shape)
    yield from _check_optional(f"{prefix}grid", obs.grid, grid, spec.grid_dtype, "grid_shape")
    state = None if spec.state_dim is None else (*batch, spec.state_dim)
    yield from _check_optional(f"{prefix}state", obs.state, state, "float32", "state_dim")
    places = None if spec.position_dim is None else (*agents, spec.position_dim)
    yield from _check_optional(
        f"{prefix}positions", obs.positions, places, "float32", "position_dim"
    )


def _check_optional(
    field: str, value: Any, shape: tuple[int, ...] | None, dtype: str | None, size: str
) -> Iterator[Finding]:
    if shape is None and value is not None:
        yield Finding("shape", "error", field, f"None, as spec.{size} is", _aval(value))
    elif shape is not None and value is None:
        yield Finding("shape", "error", field, f"{list(shape)}, from spec.{size}", "None")
    elif shape is not None:
        yield from _check_array(field, value, shape, dtype)


def _check_array(
    field: str, value: Any, shape: tuple[int, ...], dtype: str | None
) -> Iterator[Finding]:
    """Check for an array of this shape and type; `dtype` None accepts any but complex numbers."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        got = f"{type(value).__name__} {value!r}"
        yield Finding("shape", "error", field, f"an array, {dtype or 'numbers'}{list(shape)}", got)
        return
    if tuple(value.shape) != shape:
        yield Finding("shape", "error", field, str(list(shape)), str(list(value.shape)))
    fits = value.dtype == dtype if dtype else value.dtype.kind in "biuf"
    if not fits:
        yield Finding("dtype", "error", field, dtype or "numbers", str(value.dtype))


def check_agreement(name: str, first: Any, later: Any) -> Iterator[Finding]:
    """Check that a step returns the layout of a reset: else loops compile twice or not at all."""
    ours, theirs = (
        {_path(name, path): leaf for path, leaf in _leaves(tree)} for tree in (first, later)
    )
    for path in [path for path in (*ours, *theirs) if (path in ours) != (path in theirs)]:
        got, expected = (
            ("missing", _aval(ours[path])) if path in ours else (_aval(theirs[path]), "nothing")
        )
        yield Finding("structure", "error", path, f"{expected}, as from reset", got, step=1)
    if ours.keys() == theirs.keys() and jax.tree.structure(first) != jax.tree.structure(later):
        expected, got = (str(jax.tree.structure(tree))[:80] for tree in (first, later))
        yield Finding(
            "structure", "error", name or "timestep", f"{expected}, as from reset", got, step=1
        )
    for path in ours.keys() & theirs.keys():
        one, other = ours[path], theirs[path]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            yield Finding(
                "structure", "error", path, f"{_aval(one)}, as from reset", _aval(other), step=1
            )
        elif one.weak_type != other.weak_type:
            expected, got = ("a weakly" if x.weak_type else "a strongly" for x in (one, other))
            text = f"{expected} typed {one.dtype}, as from reset (or loops compile twice)"
            yield Finding("weak_type", "error", path, text, f"{got} typed one", step=1)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _path(name: str, path: Any) -> str:
    text = name + jax.tree_util.keystr(path)
    return text.removeprefix(".").removeprefix("observation.")


def _avals(tree: Any) -> list[str]:
    return [_aval(leaf) for leaf in jax.tree.leaves(tree)]


def _aval(value: Any) -> str:
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__
