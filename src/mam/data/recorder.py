"""Recording a loop of one's own: a PettingZoo environment that writes down what happens in it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from mam.data.steps import concatenate, illegal
from mam.data.store import Writer
from mam.errors import UserError
from mam.networks.order import decision_order
from mam.types import Observation, Transition


class Recorder:
    """A ParallelEnv whose episodes go to a dataset; a context manager.

    Use it as::

        with mam.Recorder("data/mine", env) as recorded:
            for seed in range(100):
                observations, infos = recorded.reset(seed=seed)
                while recorded.agents:
                    actions = {agent: act(observations[agent]) for agent in recorded.agents}
                    observations, *_ = recorded.step(actions)

    `reset` and `step` return what those of the environment do. An episode that was not played to
    its end is not recorded; one that is cut off is, with `truncate`.

    Args:
        path: folder of the dataset; one that there is is appended to.
        env: a PettingZoo ParallelEnv.
        name: of the task, in the dataset.
        provenance: what else is to be known of the data, as JSON.

    Raises:
        UserError: if the environment or the folder is none that can be recorded.
    """

    def __init__(
        self,
        path: str | Path,
        env: Any,
        *,
        name: str = "",
        provenance: Mapping[str, Any] | None = None,
    ):
        from mam.envs.external.pettingzoo import PettingZooEnv
        from mam.envs.external.pool import spec_of

        name = name or type(env).__name__
        self._tap = _Tap(env)
        self._env, self._steps = PettingZooEnv(self._tap, name), list[Transition]()
        self.spec = spec_of(name, self._env.layout)
        self._seen: dict[str, np.ndarray] | None = None
        self._writer = Writer(
            Path(path), self.spec, provenance={"recorded": "mam.Recorder", **(provenance or {})}
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_tap"].env, name)

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        """Begin an episode, as the environment's `reset` does."""
        self._steps, self._tap.options = [], options
        self._seen = self._env.reset(seed)  # type: ignore[arg-type]
        return self._tap.result

    def step(self, actions: Mapping[Any, Any]) -> Any:
        """Take a step, as the environment's `step` does.

        Raises:
            UserError: before `reset`, or for actions that are none of their agents', not allowed by
                their masks, or missing.
        """
        if self._seen is None:
            raise UserError(f"{self.spec.name}: step() before reset(), or after the episode's end")
        rows, self._tap.actions = self._env.write_actions(actions), actions
        self._check(actions, rows)
        alive: Any = self._seen["alive"]
        outcome = self._env.step(rows)
        over = outcome.terminated or outcome.truncated
        successor = outcome.final_observation or outcome.observation
        fields: dict[str, Any] = {
            "reset": np.array([not self._steps]),
            "action": rows[None],
            "order": decision_order(alive)[None],
            "reward": outcome.reward[None],
            "terminated": np.array([outcome.terminated]),
            "truncated": np.array([outcome.truncated]),
        }
        self._steps.append(
            Transition(
                observation=_batched(self._seen),
                final_observation=_batched(successor),
                log_prob=None,
                value=None,
                metrics={},
                **fields,
            )
        )
        self._seen = None if over else outcome.observation
        if over:
            self._write()
        return self._tap.result

    def _check(self, actions: Mapping[Any, Any], rows: np.ndarray) -> None:
        names, seen = self._tap.env.possible_agents, Observation(**cast(Any, self._seen))
        given = np.array([name in actions for name in names])
        for wrong, why in (
            (np.asarray(seen.alive) & ~given, "has no action"),
            (illegal(seen, rows, self.spec), "may not do what it did"),
        ):
            if wrong.any():
                raise UserError(f"{self.spec.name}: agent '{names[np.argmax(wrong)]}' {why}")

    def truncate(self) -> None:
        """End the episode here, as by a time limit: what was seen last is what it led to."""
        if self._steps and self._seen is not None:
            last = self._steps[-1]
            self._steps[-1] = replace(last, truncated=np.array([True]))
            self._seen = None
            self._write()

    def _write(self) -> None:
        self._writer.append(concatenate(self._steps))
        self._steps = []

    def close(self) -> None:
        """Write what was held back; the environment stays open."""
        self._writer.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Tap:
    """An environment whose steps take the actions that were given, and are remembered."""

    def __init__(self, env: Any):
        self.env: Any = env
        self.actions: Mapping[Any, Any] = {}
        self.options: Any = None
        self.result: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["env"], name)

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        given: dict[str, Any] = {} if self.options is None else {"options": self.options}
        self.result = self.env.reset(seed=seed, **given)
        return self.result

    def step(self, _: Any) -> Any:
        self.result = self.env.step(self.actions)
        return self.result


def _batched(arrays: Mapping[str, Any]) -> Observation:
    return Observation(**{name: x[None] for name, x in arrays.items()})
