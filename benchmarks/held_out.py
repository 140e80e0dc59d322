"""How much of what an update gains is there on play that it did not learn from.

    python benchmarks/held_out.py runs/mam runs/mat
    python benchmarks/held_out.py runs/mam --num-epochs 2

PPO raises E[r Â], with r the ratio of the probabilities after and before an update, and Â the
normalised advantages; before it this is 0. The newest weights of each run learn from a rollout, as
the run would go on, again and again from the same weights. `own` is E[r Â] on the rollout that was
learned from, `held out` on other rollouts of the weights before the update, with its standard error
over seeds and updates; `kl` is how far the update moved the policy, on the others. What is own only
was fitted to chance.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Key

from mam.config import Config
from mam.learning.estimates import estimate
from mam.learning.experience import OnDevice, environments
from mam.learning.normalise import as_normalised
from mam.learning.ppo import PPO
from mam.learning.rollout import Rollout, RolloutState
from mam.learning.sharding import WHOLE
from mam.learning.train import Learner, TrainState, make_train
from mam.networks.mixers.base import required
from mam.runs.files import read_config
from mam.runs.folder import RunFolder, seeds_of
from mam.runs.process import configure
from mam.types import Policy

WARM_UP = 2  # rollouts that are played and dropped: environments that begin together drift apart


@dataclass(frozen=True)
class Args:
    """What to measure."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of PPO with environments in JAX."""
    updates: int = 4
    """Updates of each seed, all from its newest weights."""
    held_out: int = 16
    """Rollouts of each seed that nothing learns from."""
    num_epochs: int | None = None
    """Epochs of an update, in place of the run's."""
    num_minibatches: int | None = None
    """Minibatches of an epoch, in place of the run's."""


class Gains:
    """Compiled parts: play of one seed's weights, an update, and what became of E[r Â]."""

    def __init__(self, config: Config):
        envs = environments(config)
        if not isinstance(envs, OnDevice) or config.learn != "ppo":
            raise SystemExit(f"{config.env}: only PPO with environments in JAX is measured")
        self.config, self.envs = config, envs
        self.start, self.play = jax.jit(self._start), jax.jit(self._play)
        self.learn, self.gain = jax.jit(self._learn), jax.jit(self._gain)

    def _start(self, policy: Policy, key: Key[Array, ""]) -> RolloutState:
        """Begin episodes."""
        return self.envs.init(policy, key, WHOLE)

    def _play(
        self, policy: Policy, actors: RolloutState, key: Key[Array, ""]
    ) -> tuple[RolloutState, Rollout]:
        """Play the next rollout."""
        return self.envs.collect(policy, actors, key, WHOLE)[:2]

    def _learn(self, state: TrainState, rollout: Rollout, key: Key[Array, ""]) -> Policy:
        """Return the policy after an update."""
        learner = Learner(self.config, self.envs.spec, PPO(self.config.ppo))
        return learner.learn(state, state.actors, rollout, key)[0].policy

    def _gain(self, before: Policy, after: Policy, rollout: Rollout) -> Float[Array, "2"]:
        """Return E[r Â] and the divergence, means over living agents of a rollout of `before`."""
        steps, estimates = estimate(
            as_normalised(before), rollout, self.envs.spec, self.config.ppo, WHOLE
        )
        memory = jax.tree.map(lambda x: x[0], rollout.memory)
        seen = (steps.observation, steps.action, steps.order, steps.reset)
        alive = steps.observation.alive
        log_prob = as_normalised(after).evaluate(memory, *seen).log_prob
        log_ratio = jnp.where(alive, log_prob - required(steps.log_prob), 0.0)
        ratio = jnp.exp(log_ratio)

        def mean(x: Array) -> Array:
            return jnp.mean(x, where=alive)

        centred = estimates.advantage - mean(estimates.advantage)
        advantage = centred / (jnp.sqrt(mean(centred**2)) + 1e-8)
        return jnp.stack([mean(ratio * advantage), mean(ratio - 1 - log_ratio)])


def rollouts(gains: Gains, policy: Policy, key: Key[Array, ""]) -> Iterator[Rollout]:
    """Play on and on."""
    actors = gains.start(policy, key)
    for number in itertools.count():
        actors, rollout = gains.play(policy, actors, jax.random.fold_in(key, number))
        if number >= WARM_UP:
            yield rollout


def measure(gains: Gains, state: TrainState, args: Args, seed: int) -> np.ndarray:
    """Return own gain, held-out gain and divergence of every update of one seed, [updates, 3]."""
    play = rollouts(gains, state.policy, jax.random.key(seed))
    learned, own = [], []
    for number in range(args.updates):
        rollout = next(play)
        learned.append(gains.learn(state, rollout, jax.random.key(number)))
        own.append(gains.gain(state.policy, learned[-1], rollout)[0])
    held_out = [
        [gains.gain(state.policy, after, rollout) for after in learned]
        for _, rollout in zip(range(args.held_out), play, strict=False)
    ]
    return np.column_stack([own, np.mean(np.array(held_out), axis=0)])


def main(args: Args) -> None:
    """Measure every run and print a line for each."""
    configure()
    print(f"{'run':32}{'epochs':>8}{'own':>9}{'held out':>19}{'kl':>9}")
    for run in args.runs:
        config = read_config(run / "config.json")
        state = RunFolder(run).load_state(config, make_train(config))
        for name in ("num_epochs", "num_minibatches"):
            if (value := getattr(args, name)) is not None:
                config = replace(config, ppo=replace(config.ppo, **{name: value}))
        gains = Gains(config)
        found = np.concatenate(
            [
                measure(gains, jax.tree.map(lambda x, k=k: x[k], state), args, seed)
                for k, seed in enumerate(seeds_of(config))
            ]
        )
        own, held_out, kl = found.mean(axis=0)
        error = found[:, 1].std(ddof=1) / len(found) ** 0.5
        print(
            f"{run!s:32}{config.ppo.num_epochs:8}{own:9.4f}{held_out:10.5f} ±{error:.5f}{kl:9.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
