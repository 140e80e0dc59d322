"""Environment steps as named rows, which is how they lie on disk, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from mam.envs.wrappers import IdEncoding, agent_ids
from mam.errors import UserError
from mam.networks.order import decision_order
from mam.types import EnvSpec, Observation, Transition

OPTIONAL = ("log_prob", "value", "order")  # what only a policy that acted knows
SUCCESSOR = "successor."  # rows of those steps whose `has_successor` is True
Rows = dict[str, np.ndarray]


def layout(spec: EnvSpec, optional: Sequence[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return shape and type of one row of every field.

    Args:
        spec: of the task, without agents' ids.
        optional: which of `OPTIONAL` there are.
    """
    n, action = spec.num_agents, spec.joint_action
    view: dict[str, Any] = {
        "agents_view": ((n, spec.obs_dim), np.float32),
        "action_mask": ((n, spec.num_actions), np.bool_),
        "alive": ((n,), np.bool_),
    }
    if spec.grid_shape is not None:
        view["grid"] = ((n, *spec.grid_shape), spec.grid_dtype)
    if spec.state_dim is not None:
        view["state"] = ((spec.state_dim,), np.float32)
    if spec.position_dim is not None:
        view["positions"] = ((n, spec.position_dim), np.float32)
    fields = {f"observation.{name}": field for name, field in view.items()} | {
        "action": (action.shape, action.dtype),
        "reward": ((n,), np.float32),
        "terminated": ((), np.bool_),
        "truncated": ((), np.bool_),
        "has_successor": ((), np.bool_),
    }
    of_policy = {name: ((n,), np.int32 if name == "order" else np.float32) for name in OPTIONAL}
    fields |= {name: of_policy[name] for name in optional}
    fields |= {f"{SUCCESSOR}{name}": field for name, field in view.items()}
    return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in fields.items()}


def to_rows(steps: Transition, spec: EnvSpec, optional: Sequence[str]) -> Rows:
    """Return whole episodes as rows.

    The successor of a step is the next step's observation; rows of its own has one that is not: at
    the end of an episode, and where an agent was truncated alone.

    Args:
        steps: of one episode or several, [T, …], without agents' ids.
        spec: of the task.
        optional: which of `OPTIONAL` to take.

    Raises:
        UserError: if they are not whole episodes of this task.
    """
    ended = np.asarray(steps.terminated) | np.asarray(steps.truncated)
    begun = np.concatenate([[True], ended[:-1]]) if ended.size else ended
    if not ended.size or not ended[-1] or (np.asarray(steps.reset) != begun).any():
        raise UserError(
            f"{spec.name}: only whole episodes are recorded, which end terminated or truncated"
        )
    seen, final = _leaves(steps.observation), _leaves(steps.final_observation)
    own = ended.copy()
    for name, x in seen.items():
        own[:-1] |= _differs(x[1:], final[name][:-1])
    rows = {f"observation.{name}": x for name, x in seen.items()}
    rows |= {f"{SUCCESSOR}{name}": x[own] for name, x in final.items()} | {"has_successor": own}
    for name in ("action", "reward", "terminated", "truncated", *optional):
        rows[name] = np.asarray(getattr(steps, name))
    return _checked(rows, spec, optional)


def _checked(rows: Rows, spec: EnvSpec, optional: Sequence[str]) -> Rows:
    """Refuse rows of another task, and return the others as they are stored."""
    expected = layout(spec, optional)
    if unlike := rows.keys() ^ expected.keys():
        raise UserError(f"{spec.name} has other fields than what is recorded: {sorted(unlike)}")
    for name, (shape, dtype) in expected.items():
        x = rows[name]
        if x.shape[1:] != shape or not np.can_cast(x.dtype, dtype, "same_kind"):
            raise UserError(
                f"{spec.name}: {name} is {dtype}{[*shape]} at a step, got {x.dtype}{[*x.shape[1:]]}"
            )
        rows[name] = np.ascontiguousarray(x, dtype)
    return rows


def to_steps(rows: Mapping[str, Any]) -> Transition:
    """Return rows of whole episodes as steps; what only a policy knows is None where it is not.

    Where no order was recorded it is by index, the living first.
    """
    seen: dict[str, Any] = {
        name.partition(".")[2]: x for name, x in rows.items() if name.startswith("observation")
    }
    own, final = rows["has_successor"], {}
    for name, x in seen.items():
        final[name] = np.concatenate([x[1:], x[:1]])
        final[name][own] = rows[f"{SUCCESSOR}{name}"]
    ended = rows["terminated"] | rows["truncated"]
    alive = seen["alive"]
    order: Any = rows.get("order")
    if order is None:
        order = decision_order(alive)
    reset: Any = np.concatenate([[True], ended[:-1]])
    return Transition(
        observation=Observation(**seen),
        reset=reset,
        action=rows["action"],
        log_prob=rows.get("log_prob"),
        value=rows.get("value"),
        order=order,
        reward=rows["reward"],
        terminated=rows["terminated"],
        truncated=rows["truncated"],
        final_observation=Observation(**final),
        metrics={},
    )


def _leaves(obs: Observation) -> Rows:
    return {name: np.asarray(x) for name, x in vars(obs).items() if x is not None}


def _differs(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Say which rows differ in a bit."""
    if not one.size:
        return np.zeros(len(one), bool)
    a, b = (np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8) for x in (one, other))
    return (a != b).any(axis=1)


def without_ids(steps: Transition, spec: EnvSpec) -> tuple[Transition, EnvSpec]:
    """Return steps and their task as the environment itself has them.

    Args:
        steps: [*batch], with the agents' ids in front of their views.
        spec: of the task, with the ids.
    """

    def cut(obs: Observation) -> Observation:
        return replace(obs, agents_view=obs.agents_view[..., spec.id_dim :])

    return _with_views(steps, cut), spec_without_ids(spec)


def with_ids(steps: Transition, spec: EnvSpec, encoding: IdEncoding) -> tuple[Transition, EnvSpec]:
    """Return steps and their task with the agents' ids in front of their views.

    Args:
        steps: [*batch], without ids.
        spec: of the task, without ids.
        encoding: how agents are told apart; see `agent_ids`.
    """
    ids = agent_ids(spec.num_agents, encoding)

    def put(obs: Observation) -> Observation:
        view = np.asarray(obs.agents_view)
        front = np.broadcast_to(ids, (*view.shape[:-1], ids.shape[1]))
        return replace(obs, agents_view=np.concatenate([front, view], axis=-1))

    return _with_views(steps, put), spec_with_ids(spec, encoding)


def spec_without_ids(spec: EnvSpec) -> EnvSpec:
    """Return a task as the environment itself has it."""
    return replace(spec, obs_dim=spec.obs_dim - spec.id_dim, id_dim=0)


def spec_with_ids(spec: EnvSpec, encoding: IdEncoding) -> EnvSpec:
    """Return a task without ids as policies see it."""
    id_dim = agent_ids(spec.num_agents, encoding).shape[1]
    return replace(spec, obs_dim=id_dim + spec.obs_dim, id_dim=id_dim)


def _with_views(steps: Transition, change: Any) -> Transition:
    return replace(
        steps,
        observation=change(steps.observation),
        final_observation=change(steps.final_observation),
    )


def illegal(obs: Observation, action: Any, spec: EnvSpec) -> Bool[np.ndarray, "*batch N"]:
    """Say which living agents' actions are none of their task's, or not allowed by its masks.

    Args:
        obs: what the agents saw, [*batch, N, …].
        action: what they did, likewise.
        spec: of the task.
    """
    action, mask = np.asarray(action), np.asarray(obs.action_mask)
    if spec.continuous:
        wrong = ~np.isfinite(action) | ((action != 0) & ~mask)
    else:
        sizes = np.array(spec.action_components or (spec.num_actions,))
        choice = action.reshape(*mask.shape[:-1], len(sizes))
        columns = np.clip(choice, 0, sizes - 1) + np.cumsum(sizes) - sizes
        wrong = (choice < 0) | (choice >= sizes) | ~np.take_along_axis(mask, columns, axis=-1)
    return wrong.any(axis=-1) & np.asarray(obs.alive)


def concatenate(parts: Sequence[Transition]) -> Transition:
    """Return the steps of several, one after another."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)
