"""Runs from Python: what `import mam` gives of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mam.config import Config
from mam.envs.external.factories import agreed_task, check_agreed, code_of
from mam.envs.objects import add_object
from mam.errors import UserError, shown
from mam.learning.evaluate import UNFINISHED
from mam.learning.train import make_train
from mam.presets import preset_for
from mam.runs import loop
from mam.runs.callbacks import Callback
from mam.runs.files import read_config
from mam.runs.load import LoadedPolicy, Weights, load, load_weights, saved_config
from mam.runs.sinks import Record, read_records
from mam.runs.summary import absolute_returns, evaluation_returns
from mam.types import Environment, EnvSpec


@dataclass(frozen=True)
class Result:
    """A run that ended."""

    folder: Path
    config: Config
    outcome: loop.Outcome  # stopped and preempted runs can go on: `train(resume=folder)`

    @property
    def records(self) -> list[Record]:
        """Everything the run has reported, from its first update on."""
        return read_records(self.folder / "metrics.jsonl")

    @property
    def returns(self) -> np.ndarray:
        """Mean return of each evaluation, [evaluations, num_seeds]."""
        return evaluation_returns(self.records)[1]

    @property
    def absolute_metric(self) -> np.ndarray | None:
        """Mean return of the best weights in fresh episodes, [num_seeds]; None if not finished."""
        return absolute_returns(self.records)

    def policy(self) -> LoadedPolicy:
        """Load the best weights of the best seed; `mam.load` has others."""
        return load(self.folder, trust=True)


def train(
    config: Config | None = None,
    *,
    env: str | Environment | Callable[[], Any] | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    signals: bool = False,
    trust: bool = False,
) -> Result:
    """Train a run to its end or to a stop, as `mam train` does, in this process.

    Unlike the command it keeps compiled programs and freed memory only as this process is set to do
    (`mam.runs.process.configure` sets it as the command does).

    Args:
        config: what to run. On a resume the run's own if None; otherwise it may differ in the
            settings that a resumed run may change. Of a new run on `env` the settings of its
            preset if None.
        env: task in place of the configuration's: a name, an environment, or what makes one. What
            another process can import is saved by that name; anything else has to be given again
            to whatever plays or resumes the run (see `mam.envs.objects.add_object`).
        out: folder of a new run; runs/<task>/<policy>/<time> if None.
        resume: folder of a run to go on with.
        callbacks: hear of every update and every evaluation, and may end the run.
        signals: end the run, saved, on Ctrl-C, SIGTERM and the like, whose handlers are replaced
            for as long as it takes; in the main thread only. Without, Ctrl-C raises
            KeyboardInterrupt, and what was saved before stays.
        trust: import the environment and the policy that the resumed folder names, where they are
            code.

    Raises:
        UserError: for a configuration that cannot be run, or a folder that is in use or holds
            another run.
        RunError: if the run could not go on; what it had saved is as it was.
    """
    _check_arguments(config, callbacks)
    name = _name(env)
    if resume is not None:
        if out is not None:
            raise UserError("a resumed run goes on in its own folder: drop out")
        saved = read_config(Path(resume) / "config.json")
        named = code_of(config) if config else {}
        check_agreed(saved, named=named | ({"env": name} if name else {}), trust=trust)
        config = replace(config or saved, env=name) if name else config or saved
        folder, trainer = loop.resume(Path(resume), config)
    elif config is None and name is None:
        raise UserError(
            "there is nothing to train: give a configuration, an environment, or resume=, the "
            "folder of a run"
        )
    else:
        config = config or preset_for(str(name))[0]
        config = replace(config, env=name) if name else config
        folder, trainer = loop.start(config, None if out is None else Path(out))
    outcome = loop.run(config, folder, trainer, callbacks=callbacks, signals=signals)
    return Result(folder.path, config, outcome)


def _check_arguments(config: Any, callbacks: Any) -> None:
    """Refuse what would fail much later, or in words of the library's inside."""
    if not isinstance(config, Config | None):
        raise UserError(f"train takes a mam.Config, got {shown(config)}: tasks are named as env=…")
    listed = isinstance(callbacks, Sequence) and all(isinstance(c, Callback) for c in callbacks)
    if not listed:
        raise UserError(f"callbacks are a list of mam.Callback, got {shown(callbacks)}")


def _name(env: str | Environment | Callable[[], Any] | None) -> str | None:
    """Return the name of a task that may be an object."""
    return env if env is None or isinstance(env, str) else add_object(env)


def evaluate(
    run: str | Path | LoadedPolicy,
    *,
    episodes: int = 320,
    env: str | Environment | Callable[[], Any] | None = None,
    greedy: bool | None = None,
    seed: int = 0,
    trust: bool = False,
) -> dict[str, np.ndarray]:
    """Play fresh episodes with the best weights of a run, or with a policy that was loaded.

    Args:
        run: folder of the run, all of whose seeds play, or of an exported policy, or a name of the
            zoo, or a policy.
        episodes: per seed.
        env: task to play in place of the run's own, by name or as for `train`: with another number
            of agents, say.
        greedy: take the most likely actions instead of sampling them; as the run's evaluations, or
            the policy, if None.
        seed: decides the episodes.
        trust: import the environment and the policy that the folder names, where they are code,
            without naming them.

    Returns:
        Metrics of each episode by name, `episode_return` and `episode_length` among them:
        [num_seeds, episodes] of a run, [episodes] of a policy.

    Raises:
        UserError: if there is no run or no such task, the weights do not fit it, or it is code that
            only the folder names.
        CheckpointError: if nothing was saved yet, or what was saved is damaged.
    """
    how = {"episodes": episodes, "env": _name(env), "greedy": greedy, "seed": seed, "trust": trust}
    _, metrics = play_episodes(run, **how)
    return (
        {name: value[0] for name, value in metrics.items()}
        if isinstance(run, LoadedPolicy)
        else metrics
    )


def play_episodes(
    run: str | Path | LoadedPolicy,
    *,
    episodes: int,
    env: str | None,
    greedy: bool | None,
    seed: int,
    trust: bool,
) -> tuple[EnvSpec, dict[str, np.ndarray]]:
    """Return the task that was played, and `evaluate`'s metrics, always [num_seeds, episodes].

    See `evaluate` for the arguments.
    """
    if episodes < 1:
        raise UserError(f"--episodes must be positive, got {episodes}")
    if isinstance(run, LoadedPolicy):
        config = replace(run.config, env=env or run.config.env, seed=run.policy_seed, num_seeds=1)
        # The rest was agreed to when it was loaded.
        check_agreed(config, named=code_of(run.config) | {"env": env}, trust=trust)
        greedy = run.greedy if greedy is None else greedy
        policies = jax.tree.map(lambda x: jnp.asarray(x)[None], run.policy)
        read = partial(Weights, config, run.spec, policies, np.zeros(1, np.float32))
    else:
        path = Path(run)
        config = agreed_task(saved_config(path), env, trust=trust)
        greedy = config.eval.greedy if greedy is None else greedy
        read = partial(load_weights, path, greedy=greedy, named={"env": env}, trust=trust)
    trainer = make_train(config)
    try:
        weights = read()
        spec = trainer.spec
        policies = weights.fitted(weights.policies, spec)
        keys = jax.random.split(jax.random.key(seed), config.num_seeds)
        metrics = jax.device_get(trainer.evaluate(policies, keys, episodes, greedy))
    finally:
        trainer.close()
    return spec, {
        name: value for name, value in metrics.items() if name != UNFINISHED or value.any()
    }
