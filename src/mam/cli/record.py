"""`mam record`: episodes of a run's policy, or of a controller, as a dataset."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from mam.errors import UserError, import_function


@dataclass(frozen=True)
class Record:
    """Play episodes and keep them as a dataset to learn from.

    What plays is the policy of a run, or a controller. A dataset that there is is appended to.
    """

    run: tyro.conf.Positional[Path | None] = None
    """Folder of the run that plays, or zoo:NAME, unless a controller does."""
    controller: str | None = None
    """A function package.module:function that is given one environment's `observation` and, if it
    names them, `state` (of a task in JAX), `key` and `reset`, and returns the joint action. What
    jax.jit made is compiled with a task in JAX, which is much faster; others are called."""
    out: Path | None = None
    """Folder of the dataset; RUN/dataset if None."""
    env: str | None = None
    """Task to play; the run's own if None."""
    episodes: int = 1000
    """Episodes to play."""
    num_envs: int = 64
    """Environments side by side."""
    num_workers: int | None = None
    """Processes that step environments which are not JAX programs; one per CPU core if None."""
    max_episode_steps: int = 10_000
    """Steps after which an episode is taken for one that never ends."""
    greedy: bool = False
    """Take the policy's most likely actions instead of sampling them, as of runs with
    --eval.greedy."""
    which: Literal["best", "latest"] = "best"
    """The weights of the best evaluation, or the latest ones."""
    policy_seed: int | None = None
    """Which of the run's seeds plays; the one with the best evaluation if None."""
    seed: int = 0
    """Decides the episodes; choose another to append others."""
    trust: bool = False
    """Import the environment that the folder names, where that is code, without naming
    it as --env."""


def record(args: Record) -> None:
    """Play the episodes and write them.

    Raises:
        UserError: if nothing is to play, or the folder holds something else.
    """
    from mam.data.steps import spec_without_ids
    from mam.data.store import Writer
    from mam.envs.registry import is_external, make_batched, make_external
    from mam.errors import DISTRIBUTION, installed_version
    from mam.runs import process
    from mam.runs.record import Controller
    from mam.runs.record import record as play
    from mam.runs.zoo import beside

    _check(args)
    process.configure()
    function = import_function("controller", args.controller) if args.controller else None
    weights = None if args.run is None else _weights(args)
    env = args.env or (weights.config.env if weights else "")
    greedy = args.greedy or (weights is not None and weights.config.eval.greedy)
    agent_id = weights.config.agent_id if weights else "none"
    num_envs = min(args.num_envs, args.episodes)
    envs: Any = (
        make_external(env, num_envs, agent_id, args.num_workers)
        if is_external(env)
        else make_batched(env, num_envs, agent_id)
    )
    provenance: dict[str, Any] = {"recorded": f"mam record {installed_version(DISTRIBUTION)}"}
    try:
        if weights:
            policy_seed, policy = weights.of_seed(args.policy_seed)
            actor = weights.fitted(policy, envs.spec)
            provenance |= {"run": str(args.run), "policy": weights.config.algorithm}
            provenance |= {"policy_seed": policy_seed, "which": args.which, "greedy": greedy}
        else:
            assert function is not None
            actor = Controller(function, envs.spec)
            provenance |= {"controller": args.controller}
        optional = ("log_prob", "value", "order") if weights else ()
        out, spec = args.out or beside(args.run or Path(), "dataset"), spec_without_ids(envs.spec)
        provenance |= {"seed": args.seed}
        with Writer(out, spec, optional=optional, provenance=provenance) as writer:
            how: dict[str, Any] = {"greedy": greedy, "seed": args.seed}
            how |= {"max_steps": args.max_episode_steps, "tell": _Progress(args.episodes)}
            play(envs, actor, writer, args.episodes, **how)
            total = f"{writer.num_episodes:,} episodes, {writer.num_steps:,} steps"
        print(f"in {out}: {total}")
    finally:
        if hasattr(envs, "close"):
            envs.close()


def _check(args: Record) -> None:
    """Refuse arguments that do not say what plays, where, and how often."""
    if (args.run is None) == (args.controller is None):
        raise UserError(
            "record needs what plays: mam record RUN, "
            "or mam record --controller package.module:function --env NAME --out FOLDER"
        )
    if args.controller and not (args.env and args.out):
        raise UserError("a controller needs --env, the task to play, and --out, the dataset")
    for name in ("episodes", "num_envs", "max_episode_steps"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} must be positive, got {getattr(args, name)}")


def _weights(args: Record) -> Any:
    from mam.envs.external.factories import agreed_task
    from mam.runs.load import load_weights, saved_config

    assert args.run is not None
    config = agreed_task(saved_config(args.run), args.env, trust=args.trust)
    greedy = args.greedy or config.eval.greedy
    how: dict[str, Any] = {"named": {"env": args.env}, "trust": args.trust}
    return load_weights(args.run, greedy=greedy, which=args.which, **how)


class _Progress:
    """A line every few seconds: episodes, and steps per second since acting was compiled."""

    def __init__(self, num_episodes: int, seconds: float = 2.0):
        self._num_episodes, self._seconds = num_episodes, seconds
        self._first: tuple[int, float] | None = None
        self._told = 0.0

    def __call__(self, episodes: int, steps: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (steps, now)
        (before, begun), over = self._first, episodes >= self._num_episodes
        if over or now - self._told > self._seconds:
            self._told = now
            speed = f" · {(steps - before) / (now - begun):,.0f} steps/s" if now > begun else ""
            print(f"{episodes:,}/{self._num_episodes:,} episodes{speed}", flush=True)
