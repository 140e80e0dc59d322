"""RWARE at 5 million steps with and without memory: minutes on a GPU, hours on a CPU.

Policies with memory learn from sequences of 4 steps, as the preset has it, Sable from whole
rollouts, which is best for it.

mam experiment experiments/rware.py --out runs/rware
mam report runs/rware --out report
"""

from mam.study.experiment.grid import grid

how = {
    "env": "rware/tiny-4ag",
    "num_seeds": 4,
    "total_timesteps": 5_000_000,
    "network.d_model": 64,
    "network.num_blocks": 1,
    "ppo.num_epochs": 4,
    "ppo.num_minibatches": 4,
    "ppo.clip_eps": 0.2,
    "ppo.max_grad_norm": 5.0,
    "ppo.lr": 7e-4,
    "eval.num_evaluations": 20,
    "eval.num_absolute_episodes": 64,
    "eval.both_modes": False,
}
runs = grid(policy=["rec_mam", "mam", "mat", "rec_mappo"], **how)
runs += grid(policy="sable", **how, **{"ppo.sequence_length": 128})
