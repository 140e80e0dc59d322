"""Level-Based Foraging on CPU cores: the smallest tasks, five seeds, a million steps with small networks.

mam experiment experiments/lbf.py
mam report runs/lbf --out report
"""

from mam.experiment import grid
from mam.presets import preset

LEARNING_RATES = {"mam": 2e-3, "mat": 2e-3, "mappo": 1e-3}  # each one's best of experiments/lbf_lr.py

runs = [
    run
    for policy, lr in LEARNING_RATES.items()
    for run in grid(
        preset("lbf/2s-8x8-2p-2f-coop"),
        env=["lbf/2s-10x10-3p-3f", "lbf/2s-8x8-2p-2f-coop", "lbf/8x8-2p-2f-coop"],
        policy=policy,
        num_seeds=5,
        total_timesteps=1_000_000,
        **{"ppo.lr": lr},
    )
]
