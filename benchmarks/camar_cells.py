"""CAMAR by cells beside the suite's own step: how far apart they are, and how much faster.

    python benchmarks/camar_cells.py --agents 8 32 128

Batches that reset themselves are stepped in turn within one process, and CPU time is counted: the
machine may have other things to do. Then every step is taken twice from the same state while agents
push towards their goals, with noise. The largest difference in each number is printed, if any. Of
two objects that are equally far from an agent, up to rounding, either may be seen first: views are
compared as sets of what is seen, and those in another order are counted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from mam.envs import registry
from mam.envs.wrappers import AutoReset
from mam.runs.process import configure
from mam.study.bench.timing import interleave, warm_up
from mam.types import Action, Environment, EnvState

CHUNK = 20  # environment steps of one call


@dataclass(frozen=True)
class Args:
    """What to compare."""

    agents: tuple[int, ...] = (8, 32, 128)
    task: str = "camar/auto:"
    """Task, to which the number of agents is added."""
    num_envs: int = 16
    steps: int = 100_000
    """Environment steps that are compared, those of all environments together."""
    rounds: int = 7
    """Timings of 20 steps of all environments."""


def play(
    env: Environment, num_envs: int, look: Callable[[EnvState, Action, Any], Any]
) -> Callable[[EnvState, jax.Array], Any]:
    """Return some steps of a batch that resets itself, with what `look` finds at each."""
    batch = AutoReset(env, num_envs)

    def step(state: EnvState, key: jax.Array) -> Any:
        way = state.goal_pos - state.physical_state.agent_pos
        action = jnp.clip(4 * way + jax.random.normal(key, way.shape), -1, 1)
        found = look(state, action, key)
        return batch.step(state, action, key)[0], found

    return jax.jit(lambda state, key: jax.lax.scan(step, state, jax.random.split(key, CHUNK)))


def without_views(timestep: Any) -> Any:
    """Leave views out of an environment step."""
    unseen = replace(timestep.observation, agents_view=None)
    return replace(timestep, observation=unseen, final_observation=None)


def views_apart(mine: jax.Array, theirs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return how far views, [..., 2 K], are apart as sets, and the share in another order."""
    a, b = (x.reshape(*x.shape[:-1], -1, 2) for x in (mine, theirs))
    apart = jnp.abs(a[..., :, None, :] - b[..., None, :, :]).max(-1)
    furthest = jnp.maximum(apart.min(-1).max(), apart.min(-2).max())
    return furthest, (jnp.abs(mine - theirs).max(-1) > 1e-4).mean()


def compare(env: Any, num_envs: int, steps: int) -> None:
    """Print the largest differences after one step from the same state."""
    suite = replace(env, env=env.env.suite)
    empty = jax.eval_shape(suite.reset, jax.random.key(0))[0].sizes

    def apart(state: Any, action: Action, key: jax.Array) -> Any:
        keys = jax.random.split(key, num_envs)
        mine = jax.vmap(env.step)(state, action, keys)
        theirs = jax.vmap(suite.step)(replace(state, sizes=empty), action, keys)
        seen, share = views_apart(*(x[1].observation.agents_view for x in (mine, theirs)))
        mine, theirs = (
            (replace(found, sizes=None, goal_keys=None), without_views(timestep))
            for found, timestep in (mine, theirs)
        )
        gaps = jax.tree.map(
            lambda a, b: jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max(), mine, theirs
        )
        return (*gaps, {"views, as sets,": seen}), share, mine[0].is_collision.mean()

    run = play(env, num_envs, apart)
    state, _ = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), num_envs))
    worst, touched, turned = None, [], []
    for chunk in range(-(-steps // (num_envs * CHUNK))):
        state, (gaps, share, touching) = run(state, jax.random.key(1 + chunk))
        gaps = jax.tree.map(lambda x: float(x.max()), gaps)
        worst = gaps if worst is None else jax.tree.map(max, worst, gaps)
        touched.append(float(touching.mean()))
        turned.append(float(share.mean()))
    for path, gap in jax.tree_util.tree_leaves_with_path(worst):
        if gap:
            print(f"  {jax.tree_util.keystr(path)} differs by {gap:.2g} at most")
    print(
        f"  {steps:,} steps compared, agents touched something in {np.mean(touched):.1%} of theirs,"
        f" {np.mean(turned):.2g} of views have another order"
    )


def main(args: Args) -> None:
    """Print differences and speeds for each number of agents."""
    configure()
    for agents in args.agents:
        env: Any = registry.make_plain(f"{args.task}agents={agents}")
        print(f"{env.spec.name}, {agents} agents, {args.num_envs} environments:", flush=True)
        runs = {}
        for name, one in {"cells": env, "suite": replace(env, env=env.env.suite)}.items():
            state, _ = jax.vmap(one.reset)(jax.random.split(jax.random.key(0), args.num_envs))
            run = play(one, args.num_envs, lambda *_: None)
            runs[name] = lambda run=run, state=state: jax.block_until_ready(
                run(state, jax.random.key(0))
            )
        estimates = {name: warm_up(run, time.process_time) for name, run in runs.items()}
        timings = interleave(runs, estimates, args.rounds, time.process_time)
        ratios = np.divide(timings["suite"].samples, timings["cells"].samples)
        speeds = ", ".join(
            f"{name} {args.num_envs * CHUNK / timing.median:,.0f} steps per second of CPU time"
            for name, timing in timings.items()
        )
        low, middle, high = np.quantile(ratios, [0, 0.5, 1])
        print(f"  {speeds}: {middle:.1f} times as fast ({low:.1f} to {high:.1f})", flush=True)
        if args.steps:
            compare(env, args.num_envs, args.steps)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
