"""Mava's contender: whole train steps of one of its Anakin systems.

    python benchmarks/peers/mava_peer.py 20 CHECKOUT ppo.anakin.ff_mappo env=lbf

In an environment with Mava's packages, given a checkout of it, a system and overrides of its
configuration. What Mava imports for other suites and loggers may be missing: nothing else stands
there, and no time depends on it.
"""

import importlib
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock

import clock

UNUSED = (
    "brax",
    "gigastep",
    "gymnax",
    "jaxmarl",
    "jraph",
    "marl_eval",
    "neptune",
    "pandas",
    "tensorboard_logger",
)
SIZES = (
    "arch.num_envs=64",
    "system.update_batch_size=1",
    "system.rollout_length=128",
    "system.ppo_epochs=4",
    "system.num_minibatches=4",
    "+system.num_updates_per_eval=1",
)


class StandIns(MetaPathFinder, Loader):
    """Makes up those of the unused packages that are missing; asked last, so never in their way."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        unused = fullname.partition(".")[0] in UNUSED
        return ModuleSpec(fullname, self, is_package=True) if unused else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(name=spec.name)

    def exec_module(self, module: Any) -> None:
        """Leave it as it is."""


def main(seconds: str, checkout: str, system: str, *overrides: str) -> None:
    """Time a system's `learn`, which is one update here."""
    os.chdir(checkout)  # its configuration is looked for from there
    sys.path.insert(0, checkout)
    sys.meta_path.append(StandIns())
    import jax
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    learner = importlib.import_module(f"mava.systems.{system}")
    from mava.utils import make_env

    name = system.rpartition(".")[2]
    with initialize_config_dir(os.path.abspath("mava/configs/default"), version_base="1.2"):
        config = compose(name, [*SIZES, *overrides])
    OmegaConf.set_struct(config, False)
    critic = "mappo" in name  # which has a network and a key of its own, and reads the state
    env, _ = make_env.make(config, add_global_state=critic)
    keys = jax.random.split(jax.random.PRNGKey(0), 2 + critic)
    learn, _, state = learner.learner_setup(env, tuple(keys), config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def step() -> None:
        nonlocal state
        output = jax.block_until_ready(learn(state))
        state = output.learner_state

    readings = clock.sample(step, float(seconds))
    env_steps = config.arch.num_envs * config.system.rollout_length
    clock.report(readings, env_steps, parameters, ("jax", "flax", "jumanji"))


if __name__ == "__main__":
    main(*sys.argv[1:])
