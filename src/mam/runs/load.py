"""What a run has learned, read from its folder: no environment is made, and no process started."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from mam.config import Config, from_json
from mam.envs.external.factories import check_agreed
from mam.envs.wrappers import agent_ids
from mam.errors import UserError
from mam.learning.normalise import transfer_policy
from mam.learning.train import init_policy, make_train
from mam.runs.checkpoint import CheckpointError, Save
from mam.runs.folder import RunFolder, restore, seeds_of
from mam.types import EnvSpec, Memory, Observation, Policy, PolicyOutput

Which = Literal["best", "latest"]


@dataclass(frozen=True)
class Weights:
    """The policies of a run's seeds, and what they were made for."""

    config: Config
    spec: EnvSpec
    policies: Policy  # [seeds]
    best_return: Float[np.ndarray, "seeds"]  # of the best weights, in the mode that was asked for

    def of_seed(self, seed: int | None) -> tuple[int, Policy]:
        """Return one of the run's seeds, that with the best return if None, and its policy.

        Raises:
            UserError: if the run has no such seed.
        """
        seeds = seeds_of(self.config)
        seed = seeds[int(np.argmax(self.best_return))] if seed is None else seed
        if seed not in seeds:
            raise UserError(
                f"--policy-seed must be one of the run's seeds {seeds[0]}…{seeds[-1]}, got {seed}"
            )
        return seed, jax.tree.map(lambda x: x[seeds.index(seed)], self.policies)

    def fitted(self, policy: Policy, spec: EnvSpec) -> Policy:
        """Return a policy of these, or several, with the sizes of a task.

        Raises:
            UserError: if the weights do not fit it, naming the sizes that are to blame.
        """
        if spec == self.spec:
            return policy
        return transfer_policy(policy, self.config.policy, self.spec, spec, self.config.network)


def load_weights(
    path: Path,
    *,
    greedy: bool | None = None,
    which: Which = "best",
    named: str | None = None,
    trust: bool = False,
) -> Weights:
    """Read the weights of all seeds of a run.

    Args:
        path: folder of the run.
        greedy: the mode in which the best weights were best; the one that counts in the run if
            None.
        which: the weights of the best evaluation, or the latest ones.
        named: task that the user named.
        trust: import the environment that the folder names, where that is code.

    Raises:
        UserError: if there is no run, or it is of the first versions, which did not write the sizes
            of their tasks down, and its environment is code that may not be imported.
        CheckpointError: if nothing was saved yet, or what was saved is damaged.
    """
    folder = RunFolder(path)
    config = folder.load_config()
    save, beside = folder.newest_save(config), greedy is not None and greedy != config.eval.greedy
    if "spec" in save.meta:
        return _read(config, save, which, beside=beside)
    check_agreed(config.env, named=named, trust=trust)
    return _read_by_environment(config, save, which, beside=beside)


def _read(config: Config, save: Save, which: Which, *, beside: bool) -> Weights:
    """Read the weights, and nothing else of the state."""
    spec, seeds = _read_spec(save), np.asarray(seeds_of(config))

    def init(seed: Array) -> Policy:
        return init_policy(config, spec, key=jax.random.key(seed))

    like = jax.eval_shape(jax.vmap(init), seeds)
    best, best_return = ".best_policy", ".best_return"
    if beside and any(name.startswith("state.best_beside.") for name in save.leaves):
        best, best_return = ".best_beside.policy", ".best_beside.mean_return"
    policies = save.restore(like, best if which == "best" else ".policy")
    return Weights(
        config, spec, policies, save.restore(np.zeros(len(seeds), np.float32), best_return)
    )


def _read_by_environment(config: Config, save: Save, which: Which, *, beside: bool) -> Weights:
    """Read the weights of a save without the sizes of its task, which is made to know them."""
    trainer = make_train(config)
    try:
        state, spec = restore(save, trainer.shapes(np.asarray(seeds_of(config)))), trainer.spec
    finally:
        trainer.close()
    best = state.best(beside=beside)
    policies = best.policy if which == "best" else state.policy
    return Weights(config, spec, policies, np.asarray(best.mean_return))


def _read_spec(save: Save) -> EnvSpec:
    try:
        return from_json(EnvSpec, save.meta["spec"])
    except (UserError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint {save.path} is damaged, or of a later version: {error}"
        ) from error


class LoadedPolicy:
    """A policy that plays in any number of environments: observations in, actions out.

    Attributes:
        config: of the run.
        spec: sizes of the task it was trained on.
        policy: the weights as pure functions, for `jax.jit` and `jax.vmap`; see `mam.types.Policy`.
        policy_seed: which of the run's seeds they are of.
        greedy: whether it takes the most likely actions instead of sampling them.
    """

    def __init__(
        self,
        config: Config,
        spec: EnvSpec,
        policy: Policy,
        *,
        policy_seed: int,
        greedy: bool,
        seed: int = 0,
    ):
        self.config, self.spec, self.policy = config, spec, policy
        self.policy_seed, self.greedy = policy_seed, greedy
        self._key, self._num_steps = jax.random.key(seed), 0
        self._memory: Memory | None = None  # None before the first step
        self._batch: tuple[int, ...] = ()

    def act(self, observation: Observation | Any, *, reset: Any = False) -> Array | np.ndarray:
        """Choose a joint action per environment, and remember the step.

        Args:
            observation: NumPy or JAX arrays with any leading axes [*batch], see `complete`.
            reset: which observations [*batch] are the first of their episodes; one bool stands for
                all of them. At the very first step all are.

        Returns:
            Actions [*batch, N], or [*batch, N, A] where they are continuous: a NumPy array for
            NumPy's views, JAX's for JAX's.

        Raises:
            UserError: if the observation has other sizes than those that the policy reads, or
                another batch than at the step before while episodes go on.
        """
        obs = self.complete(observation)
        batch = obs.alive.shape[:-1]
        reset = np.broadcast_to(np.asarray(reset, bool) | (self._memory is None), batch)
        if batch != self._batch or self._memory is None:
            if not reset.all():
                raise UserError(
                    f"the batch was {self._batch} and is {batch}: "
                    "begin all its episodes with reset=True"
                )
            self._memory, self._batch = self.policy.init_memory(batch), batch
        key = jax.random.fold_in(self._key, self._num_steps)
        self._memory, output = self.apply(self._memory, obs, reset, key)
        self._num_steps += 1
        view = observation.agents_view if isinstance(observation, Observation) else observation
        return output.action if isinstance(view, jax.Array) else np.asarray(output.action)

    def apply(
        self,
        memory: Memory,
        observation: Observation | Any,
        reset: Bool[Array | np.ndarray, "*batch"],
        key: Key[Array, ""],
    ) -> tuple[Memory, PolicyOutput]:
        """Choose joint actions as a pure function, which remembers nothing; compiled.

        Args:
            memory: after the step before; `policy.init_memory(batch)` at first.
            observation: as for `act`.
            reset: which observations are the first of their episodes, in which `memory` is not
                read.
            key: decides what is sampled.

        Returns:
            The memory after the step; the actions and their values, log-probabilities and order.
        """
        return _apply(
            self.policy, memory, self.complete(observation), reset, key, greedy=self.greedy
        )

    def complete(self, observation: Observation | Any) -> Observation:
        """Return what the policy reads: agents' ids in front of their views, where these lack them.

        Args:
            observation: an `Observation`, or the agents' views [*batch, N, O] alone where every
                action is legal and every agent alive. Views are those of the run's environment,
                with or without its ids.

        Raises:
            UserError: if the views have other sizes.
        """
        spec = self.spec
        if not isinstance(observation, Observation):
            view = jnp.asarray(observation, jnp.float32)
            legal = jnp.ones((*view.shape[:-1], spec.num_actions), bool)
            observation = Observation(view, legal, jnp.ones(view.shape[:-1], bool))
        view = observation.agents_view
        if (
            view.ndim < 2
            or view.shape[-2] != spec.num_agents
            or view.shape[-1] not in self._view_sizes
        ):
            sizes = " or ".join(f"[…, {spec.num_agents}, {size}]" for size in self._view_sizes)
            raise UserError(f"agents' views are {sizes} in {spec.name}, got {list(view.shape)}")
        if view.shape[-1] == spec.obs_dim:
            return observation
        ids = agent_ids(spec.num_agents, self.config.agent_id)
        ids = jnp.broadcast_to(ids, (*view.shape[:-1], spec.id_dim))
        return replace(observation, agents_view=jnp.concatenate([ids, view], axis=-1))

    @property
    def _view_sizes(self) -> list[int]:
        """Return the features of one agent, with ids and without."""
        return sorted({self.spec.obs_dim, self.spec.obs_dim - self.spec.id_dim}, reverse=True)


@partial(jax.jit, static_argnames="greedy")
def _apply(
    policy: Policy,
    memory: Memory,
    obs: Observation,
    reset: Any,
    key: Key[Array, ""],
    *,
    greedy: bool,
) -> tuple[Memory, PolicyOutput]:
    batch = obs.alive.shape[:-1]
    return policy.act(
        memory, obs, reset, jax.random.split(key, batch) if batch else key, greedy=greedy
    )


def load(
    run: str | Path,
    *,
    which: Which = "best",
    greedy: bool | None = None,
    policy_seed: int | None = None,
    seed: int = 0,
    trust: bool = False,
) -> LoadedPolicy:
    """Load the policy of a run without its environment, whose sizes are saved with the weights.

    Runs of versions that did not save this make the environment, once, to see its sizes; where it
    is code that the folder names, that needs `trust`.

    Args:
        run: folder of the run.
        which: the weights of the best evaluation, or the latest ones.
        greedy: take the most likely actions instead of sampling them, and the weights that were
            best so; as the run's evaluations did if None.
        policy_seed: which of the run's seeds; the one with the best evaluation if None.
        seed: decides what is sampled.
        trust: import the environment that the folder of an early version names, where that is code.

    Raises:
        UserError: if there is no run or no such seed, or an early version's environment may not be
            imported.
        CheckpointError: if nothing was saved yet, or what was saved is damaged.
    """
    weights = load_weights(Path(run), greedy=greedy, which=which, trust=trust)
    policy_seed, policy = weights.of_seed(policy_seed)
    greedy = weights.config.eval.greedy if greedy is None else greedy
    how = {"policy_seed": policy_seed, "greedy": greedy, "seed": seed}
    return LoadedPolicy(weights.config, weights.spec, policy, **how)
