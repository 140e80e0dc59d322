"""`mam sweep`: a search for good settings of one policy on one task."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mam.config import Config
from mam.errors import UserError


@dataclass(frozen=True)
class Sweep:
    """Search for the settings with the best return, over the paper's ranges.

    The search is a tree-structured Parzen estimator. Starts from the preset of the task, as `mam
    train`; settings that are not searched stay as they are. Trials that fall behind the median of
    the earlier ones are ended early. Every trial is a `mam train` in a process of its own. Ctrl-C
    saves the trials under way, and the same command goes on. Leaves best.json and the best run's
    command.
    """

    preset: str | None = None
    """Settings to start from, in place of the task's own preset."""
    start: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """Settings to start from: the folder of a run or of an exported policy, zoo:NAME, or a JSON
    file such as a run's config.json."""
    out: Path | None = None
    """Folder of the sweep and its runs; sweeps/<task>/<policy> if None."""
    trials: int = 50
    """Trials in all, those of earlier calls included."""
    jobs: int = 1
    """Trials at the same time."""
    search: tuple[str, ...] = ()
    """Settings to search, such as ppo.lr network.d_model, or with values of your own, such as
    ppo.gamma=0.9,0.99; all that the policy reads of the paper's if none."""
    objective: Literal["iqm", "mean"] = "iqm"
    """What counts over seeds: the interquartile mean of the absolute metric, or the mean."""
    prune: bool = True
    """End trials early whose evaluations are below the median of the others' at the same step."""
    startup_trials: int = 10
    """Trials at random before the search, and before any is ended early."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def __post_init__(self):
        for name in ("trials", "jobs"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be positive, got {getattr(self, name)}")


def run_sweep(options: Sweep) -> int:
    """Search until there are enough trials; return the exit code: 1 if every trial failed.

    Raises:
        UserError: if Optuna is missing, a setting cannot be searched, or the folder holds a sweep
            of something else.
        RunError: if there is no space left.
    """
    from mam.runs.files import writing
    from mam.runs.signals import INTERRUPTED
    from mam.study.experiment.pools import LocalPool
    from mam.study.experiment.screen import Screen
    from mam.study.sweep.search import Search

    out = (
        options.out
        or Path("sweeps") / options.config.env.replace(":", "_") / options.config.algorithm
    )
    try:
        with LocalPool(options.jobs) as pool, Screen() as screen, writing(out):
            search = Search(options, out, pool, screen)
            search.run()
            return search.conclude()
    except KeyboardInterrupt:
        return INTERRUPTED
