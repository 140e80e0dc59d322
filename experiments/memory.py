"""Memory over time on LBF, minutes to hours on a CPU: `rec_mam` and `mam`, sampled and greedy.

mam experiment experiments/memory.py --out runs/memory
mam report runs/memory --out report
"""

from mam.study.experiment.grid import grid

runs = grid(
    env=["lbf/2s-8x8-2p-2f-coop", "lbf/2s-10x10-3p-3f"],
    policy=["rec_mam", "mam"],
    num_seeds=5,
    total_timesteps=1_000_000,
    **{
        "network.d_model": 32,
        "network.d_state": 8,
        "ppo.lr": 1e-3,
        "ppo.max_grad_norm": 0.5,
        "eval.num_evaluations": 20,
    },
)
