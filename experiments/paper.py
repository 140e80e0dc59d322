"""The paper's comparison, for GPUs: RWARE, LBF and SMAX, 10 seeds, 20 million steps.

Runs are evaluated 122 times. Settings are each task's preset; those without one of their own take
their suite's.

    mam experiment experiments/paper.py --ray --ray-address auto
    mam report runs/paper --out report
"""

from dataclasses import replace

from mam.config import EvalConfig
from mam.envs.tasks import LBF_TASKS, RWARE_TASKS, SMAX_TASKS
from mam.study.experiment.grid import grid

TASKS = [
    f"{suite}/{task}"
    for suite, tasks in (("rware", RWARE_TASKS), ("lbf", LBF_TASKS), ("smax", SMAX_TASKS))
    for task in tasks
]

published = grid(
    env=TASKS, policy=["mam", "mat", "mappo", "ippo"], num_seeds=10, total_timesteps=20_000_000
)
runs = [(name, replace(config, eval=EvalConfig(num_evaluations=122))) for name, config in published]
