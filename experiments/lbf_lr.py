"""The learning rate of every algorithm in experiments/lbf.py, chosen on seeds that the comparison does not use.

mam experiment experiments/lbf_lr.py
"""

from mam.experiment import grid
from mam.presets import preset

runs = grid(
    preset("lbf/2s-8x8-2p-2f-coop"),
    env=["lbf/2s-10x10-3p-3f", "lbf/2s-8x8-2p-2f-coop"],
    policy=["mam", "mat", "mappo"],
    seed=100,
    num_seeds=3,
    total_timesteps=250_000,
    **{"ppo.lr": [1e-3, 2e-3, 4e-3]},
)
