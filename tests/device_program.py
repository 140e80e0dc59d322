"""Run by test_devices.py with eight virtual devices: the same short training on one and several."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from mam.config import Config, EvalConfig, NetworkConfig, PPOConfig
from mam.learning.train import make_train
from mam.runs.checkpoint import Writer, newest
from mam.runs.process import enable_compilation_cache

SEEDS = np.arange(2)


def numbers(tree):
    """Leaves by name, keys as their bits."""
    named = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        named[jax.tree_util.keystr(path)] = np.asarray(leaf)
    return named


def difference(tree, other):
    """The largest deviation of any leaf, relative to its largest number if above 1, and where."""
    one, two = numbers(tree), numbers(other)
    assert one.keys() == two.keys()
    largest = {}
    for name, x in one.items():
        np.testing.assert_array_equal(np.isnan(x.astype(float)), np.isnan(two[name].astype(float)))
        apart = float(np.nanmax(np.abs(x.astype(float) - two[name].astype(float)), initial=0.0))
        largest[name] = apart / float(np.nanmax(np.abs(x.astype(float)), initial=1.0))
    return max(largest.items(), key=lambda item: item[1])


def train(trainer, state, script):
    """The state and all values after a script of training (t) and evaluating (e)."""
    values = []
    for letter in script:
        state, new = {"t": trainer.train_step, "e": trainer.evaluate_step}[letter](state)
        values.append(jax.device_get(new))
    return state, values


def main():
    enable_compilation_cache()
    config = Config(
        env="probe/identity",
        policy=sys.argv[1],
        num_seeds=len(SEEDS),
        network=NetworkConfig(d_model=8, d_state=2),
        ppo=PPOConfig(num_envs=8, rollout_length=12, num_epochs=2, num_minibatches=1),
        eval=EvalConfig(num_episodes=6, num_absolute_episodes=5),
    )
    counts = [int(count) for count in sys.argv[2:]]
    trainers = {count: make_train(replace(config, num_devices=count)) for count in (1, *counts)}
    expected = train(trainers[1], trainers[1].init(SEEDS), "tte")
    found = {}
    for count in counts:
        script = "tte" if count == counts[-1] else "tt"
        state, values = train(trainers[count], trainers[count].init(SEEDS), script)
        sharding = jax.tree.leaves(state.actors.observation)[0].sharding
        assert len(sharding.device_set) == count
        assert not sharding.is_fully_replicated
        found[count] = difference(
            (state.policy, values), (expected[0].policy, expected[1][: len(script)])
        )
    # A checkpoint knows nothing of where its arrays lay: from the most devices to the fewest.
    with tempfile.TemporaryDirectory() as folder:
        with Writer(Path(folder)) as writer:
            writer.save(state, {})
        restored = newest(Path(folder)).restore(trainers[counts[0]].shapes(SEEDS))
    found["resumed"] = difference(
        train(trainers[counts[0]], restored, "t"), train(trainers[1], expected[0], "t")
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
