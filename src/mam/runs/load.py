"""What a run has learned, read from its folder: no environment is made, and no process started."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key

from mam.config import CURVES, Config, from_json
from mam.envs.external.factories import check_agreed
from mam.envs.wrappers import agent_ids
from mam.errors import UserError, shown
from mam.learning.normalise import transfer_policy
from mam.learning.train import init_policy, make_train
from mam.runs.checkpoint import CheckpointError, Save
from mam.runs.files import read_config, read_object
from mam.runs.folder import RunFolder, restore, seeds_of
from mam.runs.sinks import read_records
from mam.runs.summary import absolute_returns, evaluation_returns
from mam.runs.zoo import policy_folder
from mam.types import EnvSpec, Memory, Observation, Policy, PolicyOutput

Which = Literal["best", "latest"]
METADATA = ("task", "algorithm", "policy_seed", "scores", "versions")
CARD, WEIGHTS = "card.json", "weights.safetensors"  # of an exported policy
_BOOLS = {
    "action_mask": "1 for legal, 0 for illegal",
    "alive": "1 for the living, 0 for the dead",
    "reset": "1 at the first step of an episode, 0 later",
}


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
    path: str | Path,
    *,
    greedy: bool | None = None,
    which: Which = "best",
    named: Mapping[str, str | None] | None = None,
    trust: bool = False,
) -> Weights:
    """Read the weights of all seeds of a run, or of the one policy that was exported.

    Args:
        path: folder of the run or the policy, or a name of the zoo.
        greedy: the mode in which the best weights were best; the one that counts in the run if
            None.
        which: the weights of the best evaluation, or the latest ones.
        named: what the user named, by setting; see `check_agreed`.
        trust: import what the folder names, where it is code.

    Raises:
        UserError: if there is no run; if its policy or its order is code that may not be imported,
            or it is of the first versions, which did not write the sizes of their tasks down, and
            its environment is.
        CheckpointError: if nothing was saved yet, or what was saved is damaged.
    """
    path = policy_folder(path)
    if (path / CARD).is_file():
        return _exported_weights(path, named=named or {}, trust=trust)
    folder = RunFolder(path)
    config = folder.load_config()
    save, beside = folder.newest_save(config), greedy is not None and greedy != config.eval.greedy
    no_env = "spec" in save.meta
    unread = {"cloning.augment": config.cloning.augment} | ({"env": config.env} if no_env else {})
    check_agreed(config, named={**(named or {}), **unread}, trust=trust)
    if no_env:
        return _read(config, save, which, beside=beside)
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
        run: its folder, or None.
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
        run: Path | None = None,
    ):
        self.config, self.spec, self.policy = config, spec, policy
        self.policy_seed, self.greedy, self.run = policy_seed, greedy, run
        self._key, self._num_steps = jax.random.key(seed), 0
        self._fitted = {spec.num_agents: (spec, policy)}
        self._memory: Memory | None = None  # None before the first step
        self._shape: tuple[int, ...] = ()  # [*batch, N]

    def act(
        self,
        observation: Observation | Any,
        *,
        mask: Any = None,
        alive: Any = None,
        reset: Any = False,
        greedy: bool | None = None,
    ) -> Array | np.ndarray:
        """Choose a joint action per environment, and remember the step.

        Args:
            observation: NumPy or JAX arrays with any leading axes [*batch], see `complete`.
            mask: legal actions [*batch, N, A], beside views alone; all if None.
            alive: agents that are alive [*batch, N], beside views alone; all if None.
            reset: which observations [*batch] are the first of their episodes; one bool stands for
                all of them. At the very first step, and after `reset()`, all are.
            greedy: take the most likely actions, or sample; as the policy was loaded if None.

        Returns:
            Actions [*batch, N], or [*batch, N, A] where they are continuous: a NumPy array for
            NumPy's views, JAX's for JAX's.

        Raises:
            UserError: if the observation has other sizes than those that the policy reads, or
                another batch than at the step before while episodes go on, if bools are something
                else than 0 and 1, or what the living see, in NumPy's views, is not finite.
        """
        obs = self.complete(observation, mask=mask, alive=alive)
        view = observation.agents_view if isinstance(observation, Observation) else observation
        if not isinstance(view, jax.Array):
            _check_finite(obs, self.spec, self.config.network.order)
        *batch, num_agents = shape = obs.alive.shape
        if (given := np.shape(reset)) not in ((), tuple(batch)):
            raise UserError(f"reset is one bool or {batch} of them, got {[*given]}")
        reset = np.asarray(_read_bools("reset", reset)) | (self._memory is None)
        reset = np.broadcast_to(reset, batch)
        if shape != self._shape or self._memory is None:
            if not reset.all():
                raise UserError(
                    f"batch and agents were {list(self._shape)} and are {list(shape)}: "
                    "begin all episodes with reset=True"
                )
            policy = self.fitted(num_agents)[1]
            self._memory, self._shape = policy.init_memory(tuple(batch)), shape
        key = jax.random.fold_in(self._key, self._num_steps)
        self._memory, output = self.apply(self._memory, obs, reset, key, greedy=greedy)
        self._num_steps += 1
        return output.action if isinstance(view, jax.Array) else np.asarray(output.action)

    @property
    def metadata(self) -> dict[str, Any]:
        """Return `task`, `algorithm`, `policy_seed`, `scores` and `versions`, as far as known.

        Scores are the absolute metric and the best mean return of an evaluation of its seed, as far
        as the run has them; versions are what it was trained with.
        """
        if self.run is not None and (self.run / CARD).is_file():
            card = read_object(self.run / CARD)
            return {name: card.get(name) for name in METADATA}
        index, scores, versions = seeds_of(self.config).index(self.policy_seed), {}, {}
        if self.run is not None:
            records = read_records(self.run / "metrics.jsonl")
            returns, absolute = evaluation_returns(records)[1], absolute_returns(records)
            if len(returns):
                scores["best_return"] = float(returns[:, index].max())
            if absolute is not None:
                scores["absolute_metric"] = float(absolute[index])
            if (path := self.run / "versions.json").is_file():  # the first runs have none
                versions = read_object(path)
        return {
            "task": self.config.env,
            "algorithm": self.config.algorithm,
            "policy_seed": self.policy_seed,
            "scores": scores,
            "versions": versions,
        }

    def reset(self) -> None:
        """Forget everything: the next observations are the first of their episodes."""
        self._memory, self._shape = None, ()

    def apply(
        self,
        memory: Memory,
        observation: Observation | Any,
        reset: Bool[Array | np.ndarray, "*batch"],
        key: Key[Array, ""],
        *,
        greedy: bool | None = None,
    ) -> tuple[Memory, PolicyOutput]:
        """Choose joint actions as a pure function, which remembers nothing; compiled.

        Args:
            memory: after the step before; `policy.init_memory(batch)` at first.
            observation: as for `act`.
            reset: which observations are the first of their episodes, in which `memory` is not
                read.
            key: decides what is sampled.
            greedy: take the most likely actions, or sample; as the policy was loaded if None.

        Returns:
            The memory after the step; the actions and their values, log-probabilities and order.
        """
        obs = self.complete(observation)
        policy = self.fitted(obs.alive.shape[-1])[1]
        greedy = self.greedy if greedy is None else greedy
        return _apply(policy, memory, obs, reset, key, greedy=greedy)

    def fitted(self, num_agents: int) -> tuple[EnvSpec, Policy]:
        """Return sizes and policy for a number of agents, with the same weights.

        Raises:
            UserError: if the weights do not fit it.
        """
        if num_agents not in self._fitted:
            spec, ids = self.spec, agent_ids(num_agents, self.config.agent_id).shape[1]
            ids = ids if spec.id_dim else 0
            spec = replace(
                spec,
                name=f"{spec.name} with {num_agents} agents",
                num_agents=num_agents,
                obs_dim=spec.obs_dim - spec.id_dim + ids,
                id_dim=ids,
                agent_names=None,
            )
            fitted = transfer_policy(
                self.policy, self.config.policy, self.spec, spec, self.config.network
            )
            self._fitted[num_agents] = spec, fitted
        return self._fitted[num_agents]

    def complete(
        self, observation: Observation | Any, *, mask: Any = None, alive: Any = None
    ) -> Observation:
        """Return what the policy reads: agents' ids in front of their views, where these lack them.

        A state that is not given is zeros: the library's own policies read it for values alone.

        Args:
            observation: an `Observation`, or the agents' views [*batch, N, O] alone, those of the
                run's environment with or without its ids. Any N that the weights fit.
            mask: legal actions [*batch, N, A], beside views alone; all if None.
            alive: agents that are alive [*batch, N], beside views alone; all if None.

        Raises:
            UserError: if an array has other sizes, or one of bools holds something else than 0 and
                1; of arrays that are traced the latter is not seen.
        """
        if isinstance(observation, Observation):
            if mask is not None or alive is not None:
                raise UserError("an Observation has its own action_mask and alive: drop the others")
            arrays = {f.name: getattr(observation, f.name) for f in fields(observation)}
        elif isinstance(observation, Mapping):
            raise UserError(
                "agents' views are one array [*batch, N, features], not a dictionary: stack them "
                "in the order of spec.agent_names"
            )
        else:
            view = jnp.asarray(observation, jnp.float32)
            shape = view.shape[:-1]
            legal = jnp.ones((*shape, self.spec.num_actions), bool)
            arrays = {
                "agents_view": view,
                "action_mask": legal if mask is None else mask,
                "alive": jnp.ones(shape, bool) if alive is None else alive,
            }
        arrays |= {name: _read_bools(name, arrays[name]) for name in ("action_mask", "alive")}
        view = arrays["agents_view"]
        if view.ndim < 2 or not view.shape[-2]:
            raise UserError(f"agents' views are [*batch, N, features], got {list(view.shape)}")
        spec, _ = self.fitted(view.shape[-2])
        order = self.config.network.order
        own = ":" in self.config.policy or ":" in order  # may read the state to decide
        if spec.state_dim is not None and arrays.get("state") is None and not own:
            arrays["state"] = np.zeros((*view.shape[:-2], spec.state_dim), np.float32)
        _check_shapes(spec, arrays, placed=reads_positions(order, spec))
        if view.shape[-1] != spec.obs_dim:
            ids = agent_ids(spec.num_agents, self.config.agent_id)
            ids = jnp.broadcast_to(ids, (*view.shape[:-1], spec.id_dim))
            arrays["agents_view"] = jnp.concatenate([ids, view], axis=-1)
        return Observation(**arrays)


def reads_positions(order: str, spec: EnvSpec) -> bool:
    """Say whether a policy reads where agents are, for all that is known.

    Args:
        order: as in `network.order`; one's own may read what the task gives.
        spec: of the task.
    """
    return spec.position_dim is not None and (order in CURVES or ":" in order)


def _read_bools(name: str, array: Any) -> Bool[Array | np.ndarray, "..."]:
    """Return an array as bools.

    Args:
        name: what it is, of `_BOOLS`.
        array: zeros and ones of any type; what is traced is not looked at.

    Raises:
        UserError: if it holds something else.
    """
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if array.dtype == bool:
        return array
    if not isinstance(array, Tracer):
        known = np.asarray(array)
        if (odd := known[(known != 0) & (known != 1)]).size:
            raise UserError(f"{name} holds {shown(odd.tolist()[0])}: expected {_BOOLS[name]}")
    return array.astype(bool)


def _check_finite(obs: Observation, spec: EnvSpec, order: str) -> None:
    """Refuse numbers that are not finite in what a policy reads; the dead may see anything.

    Args:
        obs: of the shapes that the policy reads.
        spec: of the task.
        order: as in `network.order`.
    """
    read: dict[str, Any] = {"agents_view": obs.agents_view}
    if spec.grid_shape is not None:
        read["grid"] = obs.grid
    if reads_positions(order, spec):
        read["positions"] = obs.positions
    for name, array in read.items():
        if not np.isfinite(np.asarray(array)[np.asarray(obs.alive)]).all():
            raise UserError(f"{name} holds numbers that are not finite")


def _check_shapes(spec: EnvSpec, arrays: dict[str, Any], *, placed: bool) -> None:
    """Refuse an observation's arrays of other shapes than a policy for `spec` reads.

    Args:
        spec: of the task.
        arrays: by the names of the observation's fields.
        placed: whether the policy reads where agents are.
    """
    *batch, n, size = arrays["agents_view"].shape
    sizes = sorted({spec.obs_dim, spec.obs_dim - spec.id_dim}, reverse=True)
    if size not in sizes:
        known = " or ".join(f"[…, {n}, {size}]" for size in sizes)
        raise UserError(
            f"agents' views are {known} in {spec.name}, got {list(arrays['agents_view'].shape)}"
        )
    expected = {"action_mask": (*batch, n, spec.num_actions), "alive": (*batch, n)}
    if spec.grid_shape is not None:
        expected["grid"] = (*batch, n, *spec.grid_shape)
    if placed:
        expected["positions"] = (*batch, n, spec.position_dim)
    if arrays.get("state") is not None and spec.state_dim is not None:
        expected["state"] = (*batch, spec.state_dim)
    for name, shape in expected.items():
        array = arrays.get(name)
        if array is None or array.shape != shape:
            found = "there is none" if array is None else f"got {list(array.shape)}"
            raise UserError(f"{name} is {list(shape)} beside these views: {found}")


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

    No process is started, and nothing is compiled before the first action.

    Runs of versions that did not save this make the environment, once, to see its sizes; where it
    is code that the folder names, that needs `trust`.

    Args:
        run: folder of the run, or one that `mam export` made, which holds one policy, or the name
            of a policy of the zoo, `zoo:task/policy`.
        which: the weights of the best evaluation, or the latest ones.
        greedy: take the most likely actions instead of sampling them, and the weights that were
            best so; as the run's evaluations did if None.
        policy_seed: which of the run's seeds; the one with the best evaluation if None.
        seed: decides what is sampled.
        trust: import the policy or the order that the folder names, where that is code, and the
            environment that the folder of an early version names.

    Raises:
        UserError: if there is no run or no such seed, or what it names may not be imported.
        CheckpointError: if nothing was saved yet, or what was saved is damaged.
    """
    if which not in get_args(Which):
        raise UserError(f"which is one of {', '.join(get_args(Which))}, got {shown(which)}")
    run = policy_folder(run)
    weights = load_weights(run, greedy=greedy, which=which, trust=trust)
    policy_seed, policy = weights.of_seed(policy_seed)
    greedy = weights.config.eval.greedy if greedy is None else greedy
    how = {"policy_seed": policy_seed, "greedy": greedy, "seed": seed}
    return LoadedPolicy(weights.config, weights.spec, policy, **how, run=run)


def write_weights(policy: Policy, folder: Path) -> None:
    """Write a policy's weights, each under its path in the policy, such as `encoder.blocks[0]…`."""
    from safetensors.numpy import save_file

    save_file({name: np.array(x) for name, x in _named(policy).items()}, folder / WEIGHTS)


def _named(policy: Policy) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(policy)
    return {jax.tree_util.keystr(path).removeprefix("."): leaf for path, leaf in leaves}


def _exported_weights(folder: Path, *, named: Mapping[str, str | None], trust: bool) -> Weights:
    """Read the policy that `mam export` wrote to a folder; see `load_weights`."""
    try:
        card = read_object(folder / CARD)
        config, spec = from_json(Config, card["config"]), from_json(EnvSpec, card["spec"])
        score = float(card["scores"].get("absolute_metric", float("nan")))
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise _damaged(folder, error) from error
    check_agreed(config, named={**named, "env": config.env}, trust=trust)
    policy = read_weights(folder / WEIGHTS, config, spec)
    policies = jax.tree.map(lambda x: x[None], policy)
    return Weights(config, spec, policies, np.array([score], np.float32))


def read_weights(file: Path, config: Config, spec: EnvSpec) -> Policy:
    """Read the weights of a policy by name.

    Args:
        file: as `write_weights` wrote it, or others did with the same names and shapes.
        config: of the policy.
        spec: of its task.

    Raises:
        UserError: if the file cannot be read, or its arrays are not those of such a policy.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    like = jax.eval_shape(lambda: init_policy(config, spec, key=jax.random.key(0)))
    try:
        saved, named = load_file(file), _named(like)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error
    wrong = [f"{name} is missing" for name in named.keys() - saved.keys()]
    wrong += [f"{name} is unknown" for name in saved.keys() - named.keys()]
    wrong += [
        f"{name} is {list(saved[name].shape)} instead of {list(leaf.shape)}"
        for name, leaf in named.items()
        if name in saved and saved[name].shape != leaf.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{file} holds no {config.algorithm} for {spec.name}: "
            f"{', '.join(sorted(wrong)[:3])}{more}"
        )
    leaves = [jnp.asarray(saved[name], leaf.dtype) for name, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def teacher_of(config: Config, path: Path | None = None) -> Config | None:
    """Read the configuration of the policy that a run is taught by; None if there is none.

    Args:
        config: of the run.
        path: of a file with it, if not from the teacher itself.

    Raises:
        UserError: if there is none.
    """
    if config.teacher is None:
        return None
    return saved_config(config.teacher) if path is None else read_config(path)


def saved_config(run: str | Path) -> Config:
    """Read the configuration of a run, or of the policy that was exported or is in the zoo.

    Raises:
        UserError: if there is neither.
    """
    folder = policy_folder(run)
    if not (folder / CARD).is_file():
        return read_config(folder / "config.json")
    try:
        return from_json(Config, read_object(folder / CARD)["config"])
    except (KeyError, TypeError, UserError) as error:
        raise _damaged(folder, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"the export {path} is damaged, or of a later version: {error}")
