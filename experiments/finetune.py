"""What eases PPO in after imitation, on LBF: ten minutes per arm on a CPU core.

The start has imitated 5 episodes, too few to play well. Arms of as many steps: PPO from scratch
and from that start (plain), holding the actor still at first (warmup), staying close to the start
(kl), both, and PPO from scratch that imitates the episodes beside (data). The start is the first of
the runs, and has to be finished before the others begin: one at a time, as is the default.

mam record zoo:lbf/2s-8x8-2p-2f-coop/mam --episodes 5 --num-envs 5 --out data/lbf-5
mam experiment experiments/finetune.py
mam report runs/finetune --by finetune.critic_warmup finetune.kl_coef init --out report
"""

from mam.study.experiment.grid import grid

TASK = "lbf/2s-8x8-2p-2f-coop"
DATA = {"data": "data/lbf-5"}
START = {"init": f"runs/finetune/{TASK}/mam-bc"}
WARMUP, KL = {"finetune.critic_warmup": 5}, {"finetune.kl_coef": 0.5}
ARMS = {
    "scratch": {},
    "plain": START,
    "warmup": START | WARMUP,
    "kl": START | KL,
    "both": START | WARMUP | KL,
    "data": DATA,
}
SETTINGS = {
    "env": TASK,
    "policy": "mam",
    "num_seeds": 5,
    "ppo.rollout_length": 32,  # of 64 environments: 100 updates
    "eval.num_episodes": 64,
    "eval.both_modes": False,
}

runs = grid(learn="bc", **DATA, **SETTINGS, total_timesteps=20_480)
for arm, how in ARMS.items():
    arms = grid(**SETTINGS, **how, total_timesteps=204_800)
    runs += [(f"{name},arm={arm}", config) for name, config in arms]
