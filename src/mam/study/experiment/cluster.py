"""Runs as tasks of a Ray cluster, one process each; all machines see the same folders."""

import os
import signal
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mam.errors import RunError, UserError, needs_extra
from mam.study.experiment.jobs import Job
from mam.study.experiment.pools import KILLED, End, launch


class RayPool:
    """Tasks of a cluster, as many at once as it has the resources for.

    Args:
        address: of the cluster; one of this machine, which ends with the pool, if None.
        cpus: cores set aside for a run.
        gpus: GPUs set aside for a run; one where there are any if None.

    Raises:
        UserError: if Ray is not installed, cannot be reached, or has not what a run asks for.
    """

    def __init__(self, address: str | None, *, cpus: float, gpus: float | None):
        with needs_extra("--ray", "Ray", "experiment"):
            ray: Any = import_module("ray")
        self._ray = ray
        # A run without a GPU keeps its environment.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        local = {"include_dashboard": False} if address is None else {}
        try:
            ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **local)
        except Exception as error:
            # Ray's are of every kind, also where a slow machine does not start in time.
            ray.shutdown()
            where = "cannot start Ray here" if address is None else f"no Ray cluster at {address}"
            raise UserError(f"{where}: {' '.join(str(error).split())}") from error
        self._needs = {"CPU": cpus, "GPU": min(1.0, self._has("GPU")) if gpus is None else gpus}
        if lacking := [name for name, amount in self._needs.items() if amount > self._has(name)]:
            have = ", ".join(f"{self._has(name):g} {name}" for name in lacking)
            ray.shutdown()
            raise UserError(f"a run asks for more than the cluster has: {have}")
        self._work = ray.remote(num_cpus=cpus, num_gpus=self._needs["GPU"], max_retries=0)(_work)
        self._running: dict[Any, Job] = {}

    def _has(self, resource: str) -> float:
        return self._ray.cluster_resources().get(resource, 0.0)

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def has_capacity(self) -> bool:
        at_once = min(
            int(self._has(name) / amount + 1e-9) for name, amount in self._needs.items() if amount
        )
        return len(self._running) < max(at_once, 1)

    def start(self, job: Job, command: Sequence[str]) -> None:
        self._running[self._work.remote(list(command), job.log.absolute(), os.getcwd())] = job

    def ended(self) -> list[End]:
        if not self._running:
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        if not ready and not self._alive():
            raise RunError(
                "Ray's process on this machine (raylet) is gone, and its runs with it: "
                "the same command goes on from their last saves"
            )
        return [self._end(self._running.pop(task), task) for task in ready]

    def _alive(self) -> bool:
        """Say whether the cluster hears of this machine; no task ends any more if not."""
        here = self._ray.get_runtime_context().get_node_id()
        return any(node["Alive"] for node in self._ray.nodes() if node["NodeID"] == here)

    def _end(self, job: Job, task: Any) -> End:
        try:
            return End(job, self._ray.get(task))
        except UserError as error:  # Ray's own error is of the kind that the task raised, too
            return End(job, 2, str(getattr(error, "cause", error)))
        except self._ray.exceptions.RayError:
            return End(job, KILLED)  # its machine or its worker is gone

    def stop(self, job: Job) -> None:
        for task, running in self._running.items():
            if running == job:
                self._ray.cancel(task)


def _work(command: list[str], log: Path, cwd: str) -> int:
    """Run one process as a task, and return its exit code.

    A cancelled task is interrupted, and passes the first interruption on as SIGTERM.
    """
    # A shell's background processes ignore SIGINT, and so would this: Ray could not interrupt it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = launch(command, log, cwd)
    told = False
    while True:
        try:
            while (code := process.poll()) is None:
                time.sleep(0.2)
            return code
        except KeyboardInterrupt:
            if not told:
                process.terminate()
            told = True
