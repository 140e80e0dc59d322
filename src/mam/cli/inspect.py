"""`mam inspect RUN`: which agents listen to which, in an episode."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from mam.cli.play import Play, played
from mam.errors import UserError


@dataclass(frozen=True)
class Inspect:
    """Plot how much agents take of each other in an episode played by a run's best weights.

    Every mixer of a sequence policy, in encoder and decoder, is a matrix at each step: row i says
    how much agent i takes of every agent. The episode is kept beside it, as `mam play` does; the
    dashboard shows it with the matrices of every step.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run, or zoo:NAME."""
    env: str | None = None
    """Task to play in place of the run's own."""
    out: Path | None = None
    """The PNG; RUN/mixing.png if None, or here for a policy of the zoo. The episode goes to the
    same name with .gif and .json."""
    steps: int = 4
    """Steps that are drawn besides the mean over the episode."""
    seed: int = 0
    """Decides the episode."""
    policy_seed: int | None = None
    """Which of the run's seeds plays; the one with the best evaluation if None."""
    greedy: bool = False
    """Take the most likely actions instead of sampling them, as of runs with --eval.greedy."""
    trust: bool = False
    """Import the environment that the folder names, where that is code, without naming
    it as --env."""


def inspect(args: Inspect) -> None:
    """Play one episode and plot what its mixers were.

    Raises:
        UserError: if the policy has no mixers, or they remember earlier steps.
    """
    from mam.runs.zoo import beside

    path = args.out or beside(args.run, "mixing.png")
    if path.suffix.lower() != ".png":
        raise UserError(f"--out is a PNG, such as {path.with_suffix('.png')}: got {path}")
    if args.steps < 1:
        raise UserError(f"--steps must be positive, got {args.steps}")
    picture = path.with_suffix(".gif")
    episode, policy, title = played(
        Play(
            run=args.run,
            env=args.env,
            out=picture,
            seed=args.seed,
            policy_seed=args.policy_seed,
            greedy=args.greedy,
            trust=args.trust,
        )
    )
    from mam.runs.listening import note_shares, plot_shares, shares
    from mam.runs.play import trace_path

    found = shares(policy, episode)
    note_shares(trace_path(picture), found)
    plot_shares(path, found, episode, picture, num_steps=args.steps, title=title)
    print(f"in {path}: {', '.join(found)}, of {len(episode.trace.reward)} steps")
