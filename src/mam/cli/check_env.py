"""`mam check-env NAME`: what is wrong with an environment."""

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class CheckEnv:
    """Play an environment for half a minute and say what is wrong with it."""

    env: tyro.conf.Positional[str]
    """Task as suite/task, pettingzoo/module:env, or your own as package.module:factory."""
    seed: int = 0
    """Decides the episodes."""
    seconds: float = 25.0
    """How long to play it; more for a slow simulator."""


def check_env(args: CheckEnv) -> int:
    """Print what is found; return 1 if anything is an error."""
    from mam.envs.check.check import check_environment
    from mam.envs.check.parallel import check_parallel
    from mam.envs.external.factories import find_factory
    from mam.envs.registry import is_external, make_plain
    from mam.runs import process as runtime

    runtime.configure()
    if is_external(args.env):
        report = check_parallel(
            args.env, find_factory(args.env), seed=args.seed, time_budget=args.seconds
        )
    else:
        report = check_environment(make_plain(args.env), seed=args.seed, time_budget=args.seconds)
    print(*report.lines(), sep="\n")
    return 0 if report.passed else 1
