"""Episodes of a dataset as experience, and how well a policy predicts those held out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mam.config import Config
from mam.data.steps import illegal, spec_with_ids, spec_without_ids, with_ids
from mam.data.summary import Trajectories, open_dataset
from mam.errors import UserError, import_function, shown
from mam.learning.normalise import as_normalised
from mam.learning.objective import living_mean
from mam.learning.rollout import Rollout
from mam.learning.sharding import Devices, Shard
from mam.learning.stopwatch import Part, Stopwatch
from mam.networks.actions import LARGEST
from mam.networks.clock import at_step
from mam.networks.order import decision_order, order_agents
from mam.networks.policy import sequence_length
from mam.types import EnvSpec, Observation, Policy, Transition

Values = dict[str, Any]
_SPLIT_SEED = 0  # of what is held out: the same in every run on the same dataset
_MOST_HELD_OUT = 8192  # steps
_SIZES = (
    "num_agents",
    "obs_dim",
    "num_actions",
    "continuous",
    "action_components",
    "grid_shape",
    "state_dim",
)


@dataclass(frozen=True)
class Recordings:
    """Episodes of a dataset, of which a rollout is windows drawn at random, with replacement.

    Each window is a sequence of its own, at whose start memory is empty. With memory it starts
    where an episode does, or where a window before it ended in the same episode; without,
    anywhere. Behind the last episode comes the first.
    """

    config: Config
    spec: Callable[[], EnvSpec]  # of the task that is learned, whose sizes the dataset has to have
    # Changes a seed's windows [L, B, …] before they are learned from, by a generator
    augment: Callable[[Transition, np.random.Generator], Transition] | None = None
    compiled: ClassVar[bool] = False

    @classmethod
    def of(cls, config: Config, spec: Callable[[], EnvSpec]) -> "Recordings":
        """Return the dataset of a configuration, with the augmentation that it names.

        Args:
            config: of the run.
            spec: returns the sizes of its task, when they are first needed.

        Raises:
            UserError: if there is no such function.
        """
        name = config.cloning.augment
        return cls(config, spec, import_function("augmentation", name) if name else None)

    @cached_property
    def _data(self) -> Trajectories:
        data = open_dataset(Path(cast(str, self.config.data)))
        seen, task = spec_without_ids(self.spec()), data.spec
        if unlike := [
            f"{name} is {shown(getattr(task, name))} instead of {shown(getattr(seen, name))}"
            for name in _SIZES
            if getattr(task, name) != getattr(seen, name)
        ]:
            raise UserError(
                f"the dataset {data.path} is of {task.name}, "
                f"not of {seen.name}: {', '.join(unlike)}"
            )
        return data

    @cached_property
    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        """Episodes to learn from, and those held out: of the highest returns, as many as asked."""
        returns, cloning = self._data.returns, self.config.cloning
        most = math.ceil(cloning.top_fraction * len(returns))
        best = np.argsort(-returns, kind="stable")[:most]
        drawn = np.random.default_rng(_SPLIT_SEED).permutation(np.sort(best))
        size = round(cloning.held_out * len(drawn))
        if cloning.held_out and len(drawn) > 1:
            size = min(max(size, 1), len(drawn) - 1)
        return np.sort(drawn[size:]), np.sort(drawn[:size])

    def _read(self, episodes: np.ndarray) -> Transition:
        """Read episodes as a policy sees them."""
        steps, _ = with_ids(self._data.read(episodes), self._data.spec, self.config.agent_id)
        seen = steps.observation
        if self._data.spec.continuous:
            action = np.clip(steps.action, -LARGEST, LARGEST)
            used = seen.action_mask & seen.alive[..., None]
            steps = replace(steps, action=np.where(used, action, np.float32(0)))
        if (wrong := illegal(steps.observation, steps.action, self._data.spec).sum()) > 0:
            raise UserError(
                f"the dataset {self._data.path} has {wrong:,} illegal actions: "
                "no policy can imitate what its masks do not allow"
            )
        order = self._order(seen, np.random.default_rng(_SPLIT_SEED))
        return replace(steps, order=order, log_prob=None, value=None)

    def _order(self, seen: Observation, generator: np.random.Generator) -> np.ndarray:
        """Return the order in which agents are taken to have decided."""
        if self.config.network.order == "random":
            keys: Any = generator.random(seen.alive.shape)
            return np.asarray(decision_order(seen.alive, keys))
        return np.asarray(order_agents(self.config.network.order, seen))

    @cached_property
    def _learned(self) -> tuple[Transition, np.ndarray, np.ndarray]:
        """Steps to learn from, one episode after another.

        And where windows with memory start, and how many steps of its episode precede each step.
        """
        episodes, _ = self._split
        steps, lengths = self._read(episodes), self._data.lengths[episodes]
        firsts = np.cumsum(lengths) - lengths
        starts = [np.arange(a, a + n, self._length) for a, n in zip(firsts, lengths, strict=True)]
        return steps, np.concatenate(starts), np.concatenate([np.arange(n) for n in lengths])

    @cached_property
    def _held_out(self) -> Transition | None:
        _, episodes = self._split
        few = episodes[np.cumsum(self._data.lengths[episodes]) <= _MOST_HELD_OUT]
        return self._read(few if len(few) else episodes[:1]) if len(episodes) else None

    @property
    def _length(self) -> int:
        """Steps of a window, L."""
        return sequence_length(self.config)

    @property
    def fingerprint(self) -> str:
        """Return what tells the dataset from one of other contents."""
        return self._data.fingerprint

    def init(self, policy: Policy, key: Key[Array, ""], shard: Shard) -> tuple[()]:
        """Return nothing: a rollout is drawn anew from all episodes.

        Args:
            policy: not read.
            key: not read.
            shard: not read.

        Raises:
            UserError: if there is no such dataset, or it is of another task.
        """
        _ = self._data
        return ()

    def collect(
        self, policy: Policy, carry: tuple[()], key: Key[Array, "seeds"], shard: Shard
    ) -> tuple[tuple[()], Rollout, Values]:
        """Draw as many steps as a rollout has, for all seeds at once.

        Args:
            policy: [seeds]; says what memory is before a window's first step, and no more: empty,
                but for the count of steps.
            carry: empty.
            key: decides where windows start, [seeds].
            shard: not read: a dataset is read by one device.

        Returns:
            The empty carry; windows [seeds, L, M, …] without log-probabilities, values and metrics;
            and no metrics.
        """
        ppo, (steps, starts, before) = self.config.ppo, self._learned
        num_steps, num_windows = len(steps.reset), ppo.num_envs * ppo.rollout_length // self._length
        memory = jax.vmap(lambda policy: policy.init_memory((1, num_windows)))(policy)
        remembers = bool(jax.tree.leaves(memory))
        windows, counts = [], []
        for data in np.asarray(jax.random.key_data(key)):
            generator = np.random.default_rng(data)
            drawn = generator.integers(len(starts) if remembers else num_steps, size=num_windows)
            first = starts[drawn] if remembers else drawn
            rows = (first + np.arange(self._length)[:, None]) % num_steps
            window = jax.tree.map(lambda x, rows=rows: x[rows], steps)
            counts.append(before[first])
            if self.config.network.order == "random":  # as in acting: drawn anew
                window = replace(window, order=self._order(window.observation, generator))
            windows.append(self.augment(window, generator) if self.augment else window)
        window = jax.tree.map(lambda *x: np.stack(x), *windows)
        memory = at_step(memory, jnp.stack(counts, dtype=jnp.float32)[:, None])
        return carry, Rollout(window, memory, window.final_observation.alive[:, -1]), {}

    def held_out(self, policy: Policy) -> Values:
        """Return how well policies predict what is held out, [seeds]; nothing if nothing is.

        `held_out_nll` is −log π of an agent's action, given those of the agents before it;
        `held_out_accuracy` how often that is the most likely one; of real components,
        `held_out_error` is how far they are from the policy's.

        Args:
            policy: [seeds].
        """
        if self._held_out is None:
            return {}
        found = _predict(policy, jax.tree.map(lambda x: x[:, None], self._held_out))
        error = "held_out_error" if self._data.spec.continuous else "held_out_accuracy"
        return dict(zip(("held_out_nll", error), np.asarray(found), strict=True))


@dataclass(frozen=True)
class Unplayed:
    """The task of a dataset, where nothing can be played: what is held out judges a policy.

    In the place of returns stands log π of the actions held out.
    """

    config: Config
    devices: Devices = field(default_factory=Devices)
    clock: Stopwatch = field(default_factory=Stopwatch)
    compiled: ClassVar[bool] = False
    step_part: ClassVar[Part] = "update"

    @cached_property
    def recordings(self) -> Recordings:
        """The dataset."""
        data = open_dataset(Path(cast(str, self.config.data)))
        return Recordings.of(self.config, lambda: spec_with_ids(data.spec, self.config.agent_id))

    @property
    def spec(self) -> EnvSpec:
        """Sizes of the recorded task."""
        return self.recordings.spec()

    @property
    def env(self) -> Any:
        """Return None: there is none."""
        return None

    def play_modes(
        self, policies: Sequence[Policy], key: Key[Array, "seeds"], num_episodes: int, modes: Any
    ) -> Values:
        """Judge a policy by the episodes held out, whose actions are as likely in every mode.

        Args:
            policies: one per mode, each [seeds].
            key: not read.
            num_episodes: not read.
            modes: how many results there are to be.

        Returns:
            `episode_return`, [modes, seeds, 1].
        """
        found = [self.play(policy, key, num_episodes, False) for policy in policies]
        return {name: np.stack([one[name] for one in found]) for name in found[0]}

    def play(
        self, policy: Policy, key: Key[Array, "seeds"], num_episodes: int, greedy: bool
    ) -> Values:
        """Judge a policy by the episodes held out.

        Args:
            policy: [seeds].
            key: not read.
            num_episodes: not read.
            greedy: not read.

        Raises:
            UserError: if none are held out.
        """
        values = self.recordings.held_out(policy)
        if not values:
            raise UserError("--env dataset plays nothing: --cloning.held-out must not be 0")
        return {"episode_return": -values["held_out_nll"][:, None]}

    def close(self) -> None:
        """Do nothing: there is nothing to end."""


@jax.jit
@partial(jax.vmap, in_axes=(0, None))
def _predict(policy: Policy, steps: Transition) -> tuple[Array, Array]:
    """Return −log π of the actions, and their accuracy or, if continuous, their distance."""
    seen, whole = steps.observation, as_normalised(policy)
    memory = policy.init_memory((1,))
    found = policy.evaluate(memory, seen, steps.action, steps.order, steps.reset)
    mean, distribution = living_mean(seen.alive), cast(Any, whole.network).distribution
    mode = distribution.mode(found.distribution, seen.action_mask)
    if jnp.issubdtype(mode.dtype, jnp.floating):
        used = jnp.maximum(seen.action_mask.sum(axis=-1), 1)
        hit = jnp.abs(mode - steps.action).sum(axis=-1) / used
    else:
        hit = distribution.equal(mode, steps.action)
    return -mean(found.log_prob), mean(hit)
