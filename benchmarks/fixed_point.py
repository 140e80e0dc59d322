"""Fixed-point decoding against the loop: do they agree, in how many passes, and which is faster?

    python benchmarks/fixed_point.py
    python benchmarks/fixed_point.py --num-agents 256 --batch 1 --windows 32 64

Both ways get the same observations and noise. A decision may differ where the two best actions are
so close that rounding decides between them; agents after it then read another action. So the first
difference in every joint action is examined: `margin` is the largest distance between the two best,
logits and noise added, at which one occurred. Weights are those a policy starts with, or large
random ones, with which agents depend on each other strongly.
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from mam.config import NetworkConfig
from mam.networks.decoding.decide import DecodeInputs, Decoding, decide
from mam.networks.policy import make_policy
from mam.runs.process import configure
from mam.study.bench.inputs import random_observation, synthetic_task


@dataclass(frozen=True)
class Args:
    """What to compare."""

    policies: tuple[str, ...] = ("mam", "mam2", "mat")
    num_agents: int = 64
    batch: int = 256
    windows: tuple[int, ...] = (16,)
    """Besides one window of all agents."""
    decisions: int = 340_000
    """To compare, per policy and weights."""
    d_model: int = 64


def compare(policy, obs, args: Args) -> None:
    def ahead(policy, key):
        order = jnp.broadcast_to(jnp.arange(args.num_agents, dtype=jnp.int32), obs.alive.shape)
        memory, first = policy.init_memory(order.shape[:-1]), jnp.ones(order.shape[:-1], bool)
        _, obs_rep = policy.encode(memory.encoder, policy.embed(obs), obs, order, first)
        noise = jax.random.gumbel(key, obs.action_mask.shape)
        return DecodeInputs(policy.decoder.read(obs_rep), mask=obs.action_mask, noise=noise)

    def run(decoding):
        return jax.jit(
            lambda policy, ahead: decide(policy.decoder, policy.distribution, ahead, decoding)
        )

    ahead = jax.jit(ahead)
    loop, windows = run(Decoding()), (None, *args.windows)
    ways = {window: run(Decoding("fixed_point", window)) for window in windows}
    seconds = {way: [] for way in ("loop", *windows)}
    differing, margin, passes, total = dict.fromkeys(windows, 0), 0.0, {w: [] for w in windows}, 0

    def timed(name, function, *inputs):
        begun = time.perf_counter()
        result = jax.block_until_ready(function(*inputs))
        seconds[name].append(time.perf_counter() - begun)
        return result

    for call in range(-(-args.decisions // (args.batch * args.num_agents)) + 1):
        inputs = jax.block_until_ready(ahead(policy, jax.random.key(call)))
        expected = timed("loop", loop, policy, inputs)
        top = np.sort(
            np.where(inputs.mask, np.asarray(expected.out) + np.asarray(inputs.noise), -np.inf),
            axis=-1,
        )
        for window, way in ways.items():
            found = timed(window, way, policy, inputs)
            differs = np.asarray(found.action != expected.action)
            first = differs & (np.cumsum(differs, axis=-1) == 1)
            differing[window] += differs.sum()
            margin = max(margin, np.max((top[..., -1] - top[..., -2])[first], initial=0.0))
            passes[window].append(float(found.passes.mean()))
        total += args.batch * args.num_agents
    for window in windows:
        faster = np.median(seconds["loop"][1:]) / np.median(seconds[window][1:])
        print(
            f"    window {window or 'none'}: {differing[window]} of {total:,} decisions differ, "
            f"margin {margin:.1e}; "
            f"passes {np.mean(passes[window]):.1f} (at most {np.max(passes[window]):.0f}); "
            f"{1e3 * np.median(seconds[window][1:]):.1f} ms, {faster:.2f} times as fast as the loop"
        )


def main(args: Args) -> None:
    """Prints a line per policy, weights and window."""
    configure()
    spec, sizes = synthetic_task(args.num_agents), NetworkConfig(d_model=args.d_model)
    obs = random_observation(spec, args.batch)
    print(f"N = {args.num_agents}, batch {args.batch}, {jax.devices()[0].device_kind}")
    rng = np.random.default_rng(0)
    for name in args.policies:
        for weights in ("initial", "large random"):
            policy = make_policy(name, spec, sizes, key=jax.random.key(0))
            if weights == "large random":
                policy = jax.tree.map(
                    lambda v: v + jnp.asarray(0.3 * rng.normal(size=v.shape), v.dtype), policy
                )
            print(f"  {name}, {weights} weights", flush=True)
            compare(policy, obs, args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
