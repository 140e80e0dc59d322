"""The paper's comparison, for GPUs: RWARE, LBF and SMAX, 10 seeds, 20 million steps.

Runs are evaluated 122 times. Settings are each task's preset; those without one of their own take
their suite's.

    mam experiment experiments/paper.py --ray --ray-address auto
    mam report runs/paper --out report
"""

from dataclasses import replace

from mam.config import EvalConfig
from mam.study.experiment.grid import grid

RWARE = (
    *("tiny-2ag", "tiny-2ag-hard", "tiny-4ag", "tiny-4ag-hard", "small-4ag", "small-4ag-hard"),
    *(
        "medium-4ag",
        "medium-4ag-hard",
        "medium-6ag",
        "large-4ag",
        "large-4ag-hard",
        "large-8ag",
        "large-8ag-hard",
    ),
    *("xlarge-4ag", "xlarge-4ag-hard"),
)
LBF = (
    *("2s-8x8-2p-2f-coop", "8x8-2p-2f-coop", "2s-10x10-3p-3f", "10x10-3p-3f"),
    *("15x15-3p-5f", "15x15-4p-3f", "15x15-4p-5f"),
)
SMAX = (
    *(
        "2s3z",
        "3s5z",
        "5m_vs_6m",
        "10m_vs_11m",
        "27m_vs_30m",
        "3s5z_vs_3s6z",
        "3s_vs_5z",
        "6h_vs_8z",
    ),
    *("smacv2_5_units", "smacv2_10_units", "smacv2_20_units"),
)
TASKS = [
    f"{suite}/{task}"
    for suite, tasks in (("rware", RWARE), ("lbf", LBF), ("smax", SMAX))
    for task in tasks
]

published = grid(
    env=TASKS, policy=["mam", "mat", "mappo", "ippo"], num_seeds=10, total_timesteps=20_000_000
)
runs = [(name, replace(config, eval=EvalConfig(num_evaluations=122))) for name, config in published]
