"""External environments in worker processes, stepped side by side.

Actions, observations and rewards are in memory that all processes share; on pipes there is one
short command and one shorter answer per worker and step. Workers are spawned, never forked (JAX has
threads), and import no JAX.
"""

import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from mam.config import WorkerConfig
from mam.envs.external import worker as child
from mam.envs.external.process import (
    Answer,
    Deadline,
    WorkerProcess,
    end_all,
    pickle_factory,
    wait_for_answers,
)
from mam.envs.external.shared import RESETTING, Layout, SharedMemory, Slab, map_slab, slab_size
from mam.envs.wrappers import IdEncoding, agent_ids
from mam.errors import RunError, UserError
from mam.types import EnvSpec, Observation, TimeStep

MAX_INFOS = 32  # metrics that are made of infos
MAX_FAILURES = 3  # how often in a row a worker is started again
RECOVERED = 1_000  # steps after which a worker whose episodes are longer is taken to work again

_log = logging.getLogger("mam")


class ExternalPool:
    """Environments in worker processes: a `ExternalEnvironments`, and a context manager.

    What happens in an environment depends on the seed, its place and the actions, not on the number
    of workers.

    A worker that dies, does not answer in time, or whose environment raises something is started
    again, with a warning: its episodes are reported as truncated where they were last seen, without
    reward for the action that is lost, and new ones begin. What happens too often is a `RunError`,
    and so is what happens again and again with no episode ended in between. After an exception the
    pool is closed.
    """

    def __init__(
        self,
        name: str,
        factory: Callable[..., Any],
        num_envs: int,
        num_workers: int | None = None,
        agent_id: IdEncoding = "one_hot",
        limits: WorkerConfig = WorkerConfig(),  # noqa: B008 (frozen)
    ):
        """Start the workers and wait until they have made their environments.

        Args:
            name: of the task, for the spec and for messages.
            factory: makes one ParallelEnv, given its place if it takes an `index`; workers must be
                able to import it.
            num_envs: B.
            num_workers: processes; by default one per CPU core, and never more than environments.
            agent_id: how agents are told apart; see `mam.envs.wrappers.agent_ids`.
            limits: how long an environment may take, and how often a worker is started again.

        Raises:
            UserError: an environment cannot be made, or has spaces that are not supported.
        """
        num_workers = _num_cores() if num_workers is None else num_workers
        if num_envs < 1 or num_workers < 1:
            raise UserError(
                f"{name}: num_envs and num_workers must be positive, "
                f"got {num_envs} and {num_workers}"
            )
        self._name, self._num_envs, self._limits = name, num_envs, limits
        self._restarts = self._num_lost = 0
        self._infos: dict[str, np.ndarray] = {}  # by name, as of the last step
        self._agent_id: IdEncoding = agent_id
        self._workers = _share_out(
            name, pickle_factory(name, factory), num_envs, min(num_envs, num_workers)
        )
        self._memory = SharedMemory()
        self._end = weakref.finalize(self, end_all, self._workers, self._memory)
        self._layout: Layout | None = None
        self._slab: Slab
        self._seed = 0
        self._last: dict[str, Any] = {}  # observations, as given out
        self._over = np.zeros(num_envs, bool)
        self._lost = np.zeros(num_envs, bool)
        self._episode_return = self._episode_length = np.zeros(num_envs, np.float32)
        with self._closed_by_exceptions():
            self._start(self._workers)

    @property
    def spec(self) -> EnvSpec:
        """Sizes and limits; a view begins with the agent's id."""
        assert self._layout is not None
        return spec_of(self._name, self._layout, id_dim=self._ids.shape[1])

    @property
    def num_envs(self) -> int:
        return self._num_envs

    @property
    def lost(self) -> Bool[np.ndarray, "B"]:
        """Say whose episodes the last step cut short because their worker was lost."""
        return self._lost

    @property
    def notes(self) -> list[str]:
        """Lines on all that was done to make agents' arrays alike; to be shown once."""
        return [] if self._layout is None else list(self._layout.notes)

    def reset(self, seed: int) -> TimeStep:
        """Start an episode everywhere; environment i draws on (seed, i) alone from here on."""
        self._check_open()
        self._seed = seed
        for worker in self._workers:
            worker.generation = worker.failures = 0
        with self._closed_by_exceptions():
            self._reset(self._workers)
        self._slab.reward[:] = 0.0
        self._slab.terminated[:] = self._slab.truncated[:] = self._slab.parted[:] = False
        self._lost = np.zeros(self._num_envs, bool)
        self._episode_return = self._episode_length = np.zeros(self._num_envs, np.float32)
        return self._timestep()

    def step(self, action: np.ndarray) -> TimeStep:
        """Apply one joint action per environment.

        Args:
            action: [B, N], [B, N, K] of components or, where actions are continuous, [B, N, A].
        """
        self._check_open()
        if np.shape(action) != self._slab.action.shape:
            raise ValueError(
                f"actions have shape {np.shape(action)}, expected {self._slab.action.shape}"
            )
        self._slab.action[:] = action
        with self._closed_by_exceptions():
            for worker in self._workers:
                worker.send(child.STEP)
            answered, lost = self._answers(self._workers, self._deadline)
            self._read_infos(list(answered.values()))
            ended = self._slab.terminated | self._slab.truncated
            for worker in answered:
                worker.steps += 1
                if ended[worker.rows].any() or worker.steps >= RECOVERED:
                    worker.failures = 0
            self._lost = np.zeros(self._num_envs, bool)
            for worker in lost:
                self._cut_short(worker)
            self._start(lost)
            self._reset(lost)
        began = [
            np.where(self._over, np.float32(0.0), sums)
            for sums in (self._episode_return, self._episode_length)
        ]
        self._episode_return = began[0] + self._slab.reward.mean(axis=1)
        self._episode_length = began[1] + np.float32(1.0)
        return self._timestep()

    def close(self) -> None:
        """Close the environments and end their processes; safe to call twice."""
        if self._num_lost and self._end.alive:
            _log.warning(
                "%s: episodes cut short because their worker had to be started again: %d",
                self._name,
                self._num_lost,
            )
        self._close()

    def _close(self) -> None:
        self._end()
        vars(self).pop("_slab", None)  # the last that refers to the memory

    def __enter__(self) -> "ExternalPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._end.alive:
            raise RuntimeError(f"{self._name}: the pool is closed")

    @contextmanager
    def _closed_by_exceptions(self) -> Iterator[None]:
        """Close after an exception, Ctrl-C included: commands and answers no longer match."""
        try:
            yield
        except BaseException:
            self._close()
            raise

    def _start(self, workers: list[WorkerProcess]) -> None:
        """Start the processes and give them memory; those lost on the way are started again."""
        while workers:
            for worker in workers:
                worker.start()
            layouts, workers = self._answers(workers, self._start_deadline)
            for worker, layout in layouts.items():
                assert isinstance(layout, Layout)
                self._share(worker, layout)

    def _reset(self, workers: list[WorkerProcess]) -> None:
        """Start new episodes; workers lost on the way are started again."""
        while workers:
            for worker in workers:
                worker.send(b"%b %d %d" % (child.RESET, self._seed, worker.generation))
            _, workers = self._answers(workers, self._deadline)
            self._start(workers)

    def _answers(
        self, workers: list[WorkerProcess], deadline: Callable[[WorkerProcess], Deadline]
    ) -> tuple[dict[WorkerProcess, Answer], list[WorkerProcess]]:
        """Wait for all workers' answers; return them, and the workers lost."""
        most = self._limits.max_restarts
        answers, lost = wait_for_answers(workers, deadline)
        for worker, fate in lost.items():
            worker.failures += 1
            worker.generation += 1
            worker.steps = 0
            self._restarts += 1
            what, *traceback = str(
                fate if isinstance(fate, RunError) else f"{self._name}: {worker} {fate}"
            ).split("\n")
            if worker.failures <= MAX_FAILURES and self._restarts <= most:
                who = worker if isinstance(fate, RunError) else "it"
                shown = traceback if self._restarts == 1 else []
                _log.warning("%s", "\n".join([f"{what}; starting {who} again", *shown]))
                continue
            if most:
                in_a_row = (
                    f"{worker.failures} times in a row" if worker.failures > MAX_FAILURES else ""
                )
                what += f", {in_a_row or f'after {most} restarts (--worker.max-restarts)'}"
            raise RunError("\n".join([what, *traceback]))
        return answers, list(lost)

    def _read_infos(self, finished: list[Any]) -> None:
        """Read the numbers in infos of episodes that this step ended; NaN elsewhere.

        Names come up one by one.
        """
        episodes = {
            place: metrics for answer in finished if answer for place, metrics in answer.items()
        }
        names = dict.fromkeys(name for metrics in episodes.values() for name in metrics)
        if new := [name for name in names if name not in self._infos][
            : MAX_INFOS - len(self._infos)
        ]:
            _log.warning(
                "%s: numbers in infos are recorded as metrics: %s", self._name, ", ".join(new)
            )
        self._infos = {
            name: np.full(self._num_envs, np.nan, np.float32) for name in (*self._infos, *new)
        }
        for place, metrics in episodes.items():
            for name in metrics.keys() & self._infos.keys():
                self._infos[name][place] = metrics[name]

    def _deadline(self, worker: WorkerProcess) -> Deadline:
        doing = self._slab.doing[worker.rows]
        limits = self._limits
        return Deadline(
            limits.reset_timeout if (doing == RESETTING).any() else limits.step_timeout,
            doing.tobytes(),
        )

    def _start_deadline(self, worker: WorkerProcess) -> Deadline:
        return Deadline(self._limits.reset_timeout * (worker.share.stop - worker.share.first))

    def _share(self, worker: WorkerProcess, layout: Layout) -> None:
        """Give a worker the memory, whose size the first worker's environments decide."""
        if self._layout is None:
            self._layout = layout
            self._ids = agent_ids(layout.num_agents, self._agent_id)
            seen = replace(layout, obs_dim=self._ids.shape[1] + layout.obs_dim)
            self._memory.resize(slab_size(seen, self._num_envs))
            self._slab = map_slab(self._memory.fd, seen, self._num_envs)
            for arrays in (self._slab.observation, self._slab.final_observation):
                # Workers write behind them.
                arrays["agents_view"][..., : self._ids.shape[1]] = self._ids
        if layout != self._layout:
            raise UserError(
                f"{self._name}: {worker} has environments with "
                "other agents or spaces than the first"
            )
        worker.give(self._memory, self._num_envs, self._ids.shape[1])

    def _cut_short(self, worker: WorkerProcess) -> None:
        """Write the last time steps of a lost worker's environments."""
        rows, slab = worker.rows, self._slab
        for name, last in self._last.items():
            slab.final_observation[name][rows] = last[rows]
        slab.reward[rows] = 0.0
        slab.terminated[rows] = False
        slab.truncated[rows] = self._lost[rows] = True
        self._num_lost += rows.stop - rows.start
        slab.parted[rows] = False

    def _timestep(self) -> TimeStep:
        """Copy what is in shared memory."""
        slab = self._slab
        self._over = slab.terminated | slab.truncated
        self._last = {name: rows.copy() for name, rows in slab.observation.items()}
        observation = final = Observation(**self._last)
        if (other := self._over | slab.parted).any():
            last = {name: rows.copy() for name, rows in self._last.items()}
            for name, rows in slab.final_observation.items():
                last[name][other] = rows[other]
            final = Observation(**last)
        fields: dict[str, Any] = {
            "reward": slab.reward.copy(),
            "terminated": slab.terminated.copy(),
            "truncated": slab.truncated.copy(),
            "metrics": {
                "episode_return": self._episode_return,
                "episode_length": self._episode_length,
            }
            | self._infos,
        }
        return TimeStep(observation=observation, final_observation=final, **fields)


def spec_of(name: str, layout: Layout, *, id_dim: int = 0) -> EnvSpec:
    """Return the sizes and limits of a task, from the sizes of its arrays.

    Args:
        name: of the task.
        layout: of one environment.
        id_dim: features of an agent's id, in front of its view.
    """
    return EnvSpec(
        name=name,
        num_agents=layout.num_agents,
        obs_dim=id_dim + layout.obs_dim,
        num_actions=layout.num_actions,
        time_limit=layout.time_limit,
        continuous=layout.continuous,
        action_components=layout.action_components,
        grid_shape=layout.grid_shape,
        grid_dtype=layout.grid_dtype,
        state_dim=layout.state_dim,
        position_dim=layout.position_dim,
        team_reward=False,
        agent_names=layout.agents,
        id_dim=id_dim,
    )


def _share_out(name: str, factory: bytes, num_envs: int, num_workers: int) -> list[WorkerProcess]:
    """Return workers, each with environments that stand side by side."""
    first = [num_envs * k // num_workers for k in range(num_workers + 1)]
    shares = [
        child.Share(name, factory, first[k], first[k + 1], quiet=k > 0) for k in range(num_workers)
    ]
    return [WorkerProcess(k, share) for k, share in enumerate(shares)]


def _num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
