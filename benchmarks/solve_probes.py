"""How many seeds of each policy solve each probe, and what they make of shuffled rewards.

    python benchmarks/solve_probes.py --num-seeds 20
    python benchmarks/solve_probes.py --policies mam --memory gru --probes memory

A probe has a known best score and a known score of random actions; it is solved by 90 % of the way
from one to the other. `shuffled` is `identity` in which environment i is paid what environment
i − 1 earned: nothing can be learned. All seeds of a run are trained side by side; the score is over
64 fresh episodes with the best weights.
"""

import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from mam.config import Config, EvalConfig, NetworkConfig, PPOConfig
from mam.envs.probes import PROBES
from mam.envs.wrappers import AutoReset
from mam.learning import experience, train
from mam.networks.policy import INDEPENDENT, has_memory, policies
from mam.runs.process import configure

SEQUENCE = tuple(name for name in policies() if name not in INDEPENDENT)
# Probes that a policy can only solve if it has what they probe for.
NEEDS = {
    "copy": lambda config: config.policy in SEQUENCE,
    "matrix": lambda config: config.policy in SEQUENCE,
    "memory": lambda config: has_memory(config.policy, config.network),
}
PPO = PPOConfig(
    lr=3e-3,
    num_envs=32,
    rollout_length=16,
    num_epochs=4,
    num_minibatches=4,
    gamma=0.95,
    ent_coef=0.02,
)
STEPS = {
    "identity": 15_000,
    "matrix": 15_000,
    "copy": 50_000,
    "memory": 40_000,
    "target": 80_000,
    "components": 30_000,
}


@dataclass(frozen=True)
class Args:
    """What to try."""

    policies: tuple[str, ...] = tuple(policies())
    probes: tuple[str, ...] = (*STEPS, "shuffled")
    num_seeds: int = 20
    memory: str | None = None


class Shuffled(AutoReset):
    """Pays every environment what its neighbour earned."""

    def step(self, state, action, key):
        state, timestep = super().step(state, action, key)
        return state, replace(timestep, reward=jnp.roll(timestep.reward, 1, axis=0))


def config_for(policy: str, probe: str, args: Args) -> Config:
    ppo = {
        "copy": replace(PPO, ent_coef=0.1, gamma=0.5),
        "matrix": replace(PPO, ent_coef=0.05),
        "target": replace(PPO, ent_coef=0.0),
    }.get(probe, PPO)
    return Config(
        policy=policy,
        env=f"probe/{probe}",
        num_seeds=args.num_seeds,
        total_timesteps=STEPS[probe],
        network=NetworkConfig(d_model=16, d_state=4, memory=args.memory),
        ppo=ppo,
        eval=EvalConfig(num_evaluations=10, num_absolute_episodes=64),
    )


def scores(config: Config) -> np.ndarray:
    """The absolute metric of every seed."""
    trainer = train.make_train(config)
    state = trainer.init(jnp.arange(config.num_seeds))
    trainer = trainer.compile(state)
    for update in range(1, config.num_updates + 1):
        state, _ = jax.block_until_ready(trainer.train_step(state))
        if config.evaluate_after(update):
            state, _ = trainer.evaluate_step(state)
    return jax.device_get(trainer.absolute_metric(state)["episode_return"]).mean(axis=1)


def main(args: Args) -> None:
    configure()
    print(
        f"{'policy':10} {'probe':9} {'random':>7} {'best':>7}   {'mean':>7} {'worst':>7}   solved"
    )
    for probe in args.probes:
        task = PROBES["identity" if probe == "shuffled" else probe]()
        for policy in args.policies:
            config = config_for(policy, task.spec.name.removeprefix("probe/"), args)
            started, make_batched = time.monotonic(), experience.make_batched
            try:
                if probe == "shuffled":
                    experience.make_batched = lambda *a, make=make_batched: Shuffled(
                        make(*a).env, a[1]
                    )
                score = scores(config)
            finally:
                experience.make_batched = make_batched
            solved = (
                score > task.random_return + 0.9 * (task.optimal_return - task.random_return)
            ).sum()
            expected = probe != "shuffled" and NEEDS.get(probe, lambda config: True)(config)
            print(
                f"{config.algorithm:10} {probe:9} "
                f"{task.random_return:7.3f} {task.optimal_return:7.3f}   "
                f"{score.mean():7.3f} {score.min():7.3f}   "
                f"{solved}/{len(score)}{'' if expected else '  (cannot)'}  "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Args))
