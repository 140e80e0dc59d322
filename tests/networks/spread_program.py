"""Run by test_spread.py: policies whose agents are spread over devices, against one device.

python spread_program.py POLICY COUNT …                    several devices of this process
python spread_program.py POLICY COUNT ADDRESS PROCESS      those of two processes
"""

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from mam.config import EncoderConfig, NetworkConfig
from mam.networks.decoding.decide import Decoding
from mam.networks.mixers.spread import agent_mesh, spread_agents
from mam.networks.policy import make_policy
from mam.runs.process import enable_compilation_cache
from mam.types import EnvSpec, Observation

N, BATCH, SPEC = 32, 3, EnvSpec("test/spread", 32, obs_dim=4, num_actions=3, time_limit=None)
SIZES = NetworkConfig(d_model=8, d_state=4, head_dim=8, encoder=EncoderConfig(local_branch=3))


def make(name):
    """A policy with large random weights and slow decay, so that agents far apart interact."""
    rng = np.random.default_rng(0)
    sizes = replace(SIZES, critic="pooled") if name == "mam2" else SIZES
    empty = jax.eval_shape(
        lambda key: make_policy(name, SPEC, sizes, Decoding("fixed_point"), key=key),
        jax.random.key(0),
    )

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        centre = 1.0 if name.endswith("scale") else -3.0 if name.endswith("dt_proj.bias") else 0.0
        return rng.normal(centre, 0.4, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, empty)


def data():
    """What agents see, some of them dead, and who decides when."""
    rng = np.random.default_rng(1)
    alive = np.ones((BATCH, N), bool)
    alive[1, 5], alive[2, 20:] = False, False
    view = rng.normal(size=(BATCH, N, SPEC.obs_dim)).astype(np.float32)
    order = np.argsort(~alive, axis=-1, stable=True).astype(np.int32)
    mask = np.ones((BATCH, N, SPEC.num_actions), bool)
    return Observation(view, mask, alive), rng.integers(3, size=(BATCH, N)).astype(np.int32), order


def run(policy, obs, action, order, keys):
    """A joint action, the evaluation of another, and the gradient of a function of it."""
    memory, first = policy.init_memory(order.shape[:1]), jnp.ones(order.shape[:1], bool)

    def loss(policy):
        found = policy.evaluate(memory, obs, action, order, first)
        found = (found.log_prob, found.entropy, found.value)
        return sum(jnp.mean(jnp.where(obs.alive, jnp.sin(v), 0)) for v in found), found

    chosen = policy.act(memory, obs, first, keys)[1]
    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(policy)
    acted = (chosen.action, chosen.log_prob, chosen.value)
    living = jax.tree.map(lambda v: jnp.where(obs.alive, v, 0), (found, acted))
    return living, gradient, chosen.metrics["decode_passes"]


def difference(one, other):
    """The largest deviation, relative to an array's largest number if above 1."""
    return max(
        float(np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(a))))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def values(policy, obs):
    """What agents expect, in the order of their indices but for the dead."""
    batch = obs.alive.shape[:1]
    order = jnp.argsort(~obs.alive, axis=-1, stable=True).astype(jnp.int32)
    memory, first = policy.init_memory(batch), jnp.ones(batch, bool)
    return policy.evaluate(memory, obs, jnp.zeros_like(order), order, first).value


def main():
    name, *counts = sys.argv[1:]
    if together := ":" in counts[-2:][0]:
        *counts, address, process = counts
        jax.distributed.initialize(address, 2, int(process))
    enable_compilation_cache()
    policy, (obs, action, order) = make(name), data()
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), BATCH)))

    def wrapped(policy, obs, action, order):
        return run(policy, obs, action, order, jax.random.wrap_key_data(jnp.asarray(keys)))

    expected = jax.device_get(jax.jit(wrapped)(policy, obs, action, order))
    found = {"passes": float(expected[2].max())}
    for count in counts:
        with jax.set_mesh(agent_mesh(int(count))):
            spread = spread_agents((obs, action, order), axis=1)
            program = jax.jit(wrapped, out_shardings=jax.P()).lower(policy, *spread).compile()
            if together:  # what is slower to compile is not waited for longer than 30 s
                print("compiled", flush=True)
                input()
            results = program(policy, *spread)
            results = jax.tree.map(lambda v: np.asarray(v.addressable_data(0)), results)
        found[count] = difference(expected, results)
    # As if each half of the agents were alone: what the comparison would notice.
    halves = jax.tree.map(lambda v: v.reshape(-1, N // 2, *v.shape[2:]), obs)
    value = jax.jit(values)(policy, halves)
    apart = np.where(obs.alive, np.asarray(value).reshape(BATCH, N), 0)
    found["apart"] = difference(expected[0][0][2], apart)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
