"""`mam experiment FILE`: a matrix of runs, to its end.

FILE is Python and defines `runs`, a list of configurations, or of names and configurations:

    from mam import grid

    runs = grid(env=["lbf/8x8-2p-2f-coop", "rware/tiny-2ag"], policy=["mam", "mat"], num_seeds=5)
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from mam.errors import UserError


@dataclass(frozen=True)
class Experiment:
    """Run a list of configurations to the end: finished runs are skipped, interrupted ones resumed.

    Every run is a `mam train` in a process of its own; one that fails does not stop the others.
    Ctrl-C saves them all, and the same command goes on. Exit codes: 0 all finished, or stopped by
    Ctrl-C; 1 some failed; 2 wrongly asked for.
    """

    file: tyro.conf.Positional[Path]
    """Python file that defines `runs`: a list of Config or (name, Config), such
    as `mam.grid` makes."""
    out: Path | None = None
    """Folder of the runs; runs/<name of the file> if None. With --ray every
    machine has to see it."""
    dry_run: bool = False
    """Only list the runs, with their commands."""
    jobs: int = 1
    """Runs at the same time, without Ray."""
    retries: int = 2
    """How often a run that was killed, or preempted, is resumed at once; errors of its own are not
    tried again."""
    ray: bool = False
    """Distribute the runs with Ray, one task each."""
    ray_address: str | None = None
    """Ray cluster to run on, such as auto; one of this machine alone if None."""
    cpus_per_run: float = 1.0
    """CPU cores Ray sets aside for a run."""
    gpus_per_run: float | None = None
    """GPUs Ray sets aside for a run; one where the cluster has any if None."""

    def __post_init__(self):
        if self.jobs < 1:
            raise UserError(f"--jobs must be positive, got {self.jobs}")
        if not self.cpus_per_run > 0:
            raise UserError(f"--cpus-per-run must be positive, got {self.cpus_per_run}")
        if self.ray_address and not self.ray:
            raise UserError("--ray-address needs --ray")


def run_experiment(options: Experiment) -> int:
    """Run what is not finished; return the exit code.

    Raises:
        UserError: if the file does not define runs, or Ray is asked for and missing.
    """
    from mam.runs.signals import INTERRUPTED
    from mam.study.experiment.jobs import jobs_of, load_runs
    from mam.study.experiment.matrix import run_matrix
    from mam.study.experiment.pools import LocalPool
    from mam.study.experiment.screen import Screen

    out = options.out or Path("runs") / options.file.stem
    jobs = jobs_of(load_runs(options.file), out)
    if options.dry_run:
        finished = [job for job in jobs if job.finished()]
        for job in jobs:
            print(f"{job.name}\n    {'finished' if job in finished else job.command_line()}")
        print(f"{len(jobs)} runs, {len(finished)} of them finished, in {out}")
        return 0
    if options.ray:
        from mam.study.experiment.cluster import RayPool

        pool = RayPool(options.ray_address, cpus=options.cpus_per_run, gpus=options.gpus_per_run)
    else:
        pool = LocalPool(options.jobs)
    try:
        with pool, Screen() as screen:
            return run_matrix(jobs, pool, screen, retries=options.retries)
    except KeyboardInterrupt:
        return INTERRUPTED
