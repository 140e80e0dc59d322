"""Minutes on a CPU, to see that everything works: three policies on two probes, three seeds each.

mam experiment experiments/smoke.py
mam report runs/smoke --out report
"""

from mam.study.experiment.grid import grid

runs = grid(
    env=["probe/matrix", "probe/copy"],
    policy=["mam", "mat", "mappo"],
    num_seeds=3,
    total_timesteps=30_000,
    **{"eval.num_evaluations": 10},
)
