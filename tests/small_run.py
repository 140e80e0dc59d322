"""A run of six updates on a probe, small enough for tests of what happens around training."""

from dataclasses import replace

from mam.config import Config, EvalConfig, NetworkConfig, PPOConfig

CONFIG = Config(
    env="probe/matrix",
    total_timesteps=96,
    num_seeds=2,
    network=NetworkConfig(d_model=8, d_state=2),
    ppo=PPOConfig(num_envs=4, rollout_length=4, num_epochs=1, num_minibatches=1),
    eval=EvalConfig(num_evaluations=3, num_episodes=3, num_absolute_episodes=5),
)

# Every run is traced anew, which takes a third of the time where agents are independent.
INDEPENDENT = replace(CONFIG, policy="ippo")
