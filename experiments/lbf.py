"""Level-Based Foraging on CPU cores: the smallest tasks, small networks, two learning rates.

Five seeds, 10⁶ steps.

    mam experiment experiments/lbf.py
    mam report runs/lbf --by ppo.lr --out report
"""

from mam.presets import preset
from mam.study.experiment.grid import grid

runs = grid(
    preset("lbf/2s-8x8-2p-2f-coop"),
    env=["lbf/2s-10x10-3p-3f", "lbf/2s-8x8-2p-2f-coop", "lbf/8x8-2p-2f-coop"],
    policy=["mam", "mat", "mappo"],
    num_seeds=5,
    total_timesteps=1_000_000,
    **{"ppo.lr": [1e-3, 2e-3]},
)
