"""`mam play RUN`: one episode to look at."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mam.errors import UserError


@dataclass(frozen=True)
class Play:
    """Write a GIF of one episode played by a run's best weights, and every decision as JSON."""

    run: tyro.conf.Positional[Path]
    """Folder of the run or of an exported policy, or zoo:NAME (see `mam zoo`)."""
    env: str | None = None
    """Task to play in place of the run's own."""
    out: Path | None = None
    """The GIF; RUN/episode.gif if None. What was decided goes to the same name with .json."""
    seed: int = 0
    """Decides the episode."""
    policy_seed: int | None = None
    """Which of the run's seeds plays; the one with the best evaluation if None."""
    greedy: bool = False
    """Take the most likely actions instead of sampling them, as of runs with --eval.greedy."""
    picture: bool | None = None
    """Draw the GIF; if None, unless the task says where its agents are, and there are more than 64:
    they move on the dashboard's map."""
    log: tuple[str, ...] = ()
    """Trackers that get the GIF, too, in the run's own place there: wandb, mlflow, trackio."""
    trust: bool = False
    """Import the environment that the folder names, where that is code, without naming
    it as --env."""


def play(args: Play) -> None:
    """Play one episode and write it.

    Raises:
        UserError: if it is to go to a tracker that there is not, or of what is no run.
    """
    from mam.runs.folder import RunFolder
    from mam.runs.loggers import find_tracker

    trackers, folder = [find_tracker(name) for name in args.log], RunFolder(args.run)
    if trackers and not folder.metrics.is_file():
        raise UserError(f"--log goes on with a run: there is none in {args.run}")
    episode, _, _ = played(args)
    if trackers and not episode.undrawn:
        config, step_count = folder.load_config(), folder.records()[-1].step_count
        for tracker in trackers:
            sink = tracker(args.run, config, resumed=True)
            sink.show(_picture(args), step_count)
            sink.close()


def played(args: Play) -> tuple[Any, Any, str]:
    """Play one episode and write it; return it, the policy that played it, and what it is of."""
    from mam.envs.external.factories import agreed_task
    from mam.learning.train import make_train
    from mam.runs import play as episodes
    from mam.runs import process
    from mam.runs.load import load_weights, saved_config
    from mam.types import ExternalEnvironments

    process.configure()
    path = _picture(args)
    if path.suffix.lower() != ".gif":
        raise UserError(f"--out is a GIF, such as {path.with_suffix('.gif')}: got {path}")
    config = agreed_task(saved_config(args.run), args.env, trust=args.trust)
    env, greedy = config.env, args.greedy or config.eval.greedy
    trainer = make_train(config)
    try:
        weights = load_weights(args.run, greedy=greedy, named={"env": args.env}, trust=args.trust)
        policy_seed, policy = weights.of_seed(args.policy_seed)
        policy = weights.fitted(policy, trainer.spec)
        _make_parent(path)
        print(f"playing seed {policy_seed} into {path}…")
        how: dict[str, Any] = {"greedy": greedy, "max_steps": config.eval.max_episode_steps}
        how |= {"picture": args.picture}
        how |= {"algorithm": config.algorithm, "policy_seed": policy_seed}
        if isinstance(trainer.env, ExternalEnvironments):
            trainer.close()
            played = episodes.ExternalTask(env, config.agent_id)
        else:
            played = trainer.env
        episode = episodes.play(played, policy, args.seed, path, **how)
    finally:
        trainer.close()
    if episode.undrawn:
        print(f"{episode.undrawn}: no picture, only {episodes.trace_path(path)}")
    print(f"return {episode.episode_return:.3f}")
    return episode, policy, f"{config.algorithm} on {env}"


def _picture(args: Play) -> Path:
    from mam.runs.zoo import beside

    return args.out or beside(args.run, "episode.gif")


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {path.parent} cannot be made: {error.strerror}") from None
