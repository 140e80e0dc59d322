"""A Transformer taught to Mamba-2 and Mamba in 4 % of its steps, on LBF: an hour on a CPU.

Arms at equal steps: actions alone (kd), after hidden states (23), after matrices and hidden states
(123), and PPO from scratch. The teacher is the first of the runs, and has to be finished before the
others start: one at a time, as is the default.

mam experiment experiments/distill.py
mam report runs/distill --by distill.matrix_updates distill.hidden_updates --out report
"""

from mam.study.experiment.grid import grid

TASK = "lbf/2s-8x8-2p-2f-coop"
STAGES = {"kd": (0, 0), "23": (0, 8), "123": (8, 8)}  # updates of 40
STUDENTS = {
    "env": TASK,
    "policy": ["mam2", "mam"],
    "num_seeds": 5,
    "total_timesteps": 40_960,
    "ppo.rollout_length": 16,  # of 64 environments
    "eval.num_evaluations": 20,
}

runs = grid(env=TASK, policy="mat", num_seeds=5, total_timesteps=1_000_000)
for arm, (matrix_updates, hidden_updates) in STAGES.items():
    distilled = grid(
        **STUDENTS,
        learn="distill",
        teacher=f"runs/distill/{TASK}/mat",
        **{
            "ppo.num_epochs": 8,
            "distill.matrix_updates": matrix_updates,
            "distill.hidden_updates": hidden_updates,
        },
    )
    runs += [(f"{name},arm={arm}", config) for name, config in distilled]
runs += grid(**STUDENTS)
