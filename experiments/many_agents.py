"""32 agents that forage: sequence policies beside independent ones, by steps and by wall-clock.

Independent policies take three to four steps in the time of one, and so get as many more: the
report draws returns against both. An hour and a half on two CPU cores.

mam experiment experiments/many_agents.py
mam report runs/many_agents --out report
"""

from mam.study.experiment.grid import grid

SETTINGS = {
    "env": "lbf/auto:agents=32,grid=32",
    "agent_id": "none",
    "num_seeds": 3,
    "network.d_model": 32,
    "network.d_state": 8,
    "ppo.num_envs": 16,
    "ppo.lr": 1e-3,
    "ppo.num_epochs": 4,
    "ppo.num_minibatches": 4,
    "eval.num_evaluations": 10,
    "eval.num_episodes": 16,
    "eval.num_absolute_episodes": 64,
}

runs = grid(**SETTINGS, policy=["mam", "mam2", "mat"], total_timesteps=204_800)
runs += grid(**SETTINGS, policy=["mappo", "ippo"], total_timesteps=720_896)
