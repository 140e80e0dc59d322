"""Where what is learned from comes from: environments in JAX, external ones, or a recording."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Key, Shaped

from mam.config import Config
from mam.envs.check.static import first_fault
from mam.envs.external.factories import names_code
from mam.envs.objects import OBJECT
from mam.envs.registry import is_external, make_batched, make_external, make_plain
from mam.envs.wrappers import AutoReset
from mam.errors import UserError
from mam.learning.evaluate import evaluate, with_kinds
from mam.learning.external import (
    Timed,
    aligned,
    blank_state,
    external_evaluate,
    external_rollout,
    seed_of,
    start_episodes,
    take_infos,
)
from mam.learning.rollout import Rollout, RolloutState, init_rollout_state, rollout
from mam.learning.sharding import Devices, Shard
from mam.learning.stopwatch import Part, Stopwatch
from mam.networks.policy import sequence_length
from mam.types import Environment, EnvSpec, ExternalEnvironments, Policy

Values = Mapping[str, Shaped[Array | np.ndarray, "..."]]  # metric → [seeds] or [seeds, episodes]


@runtime_checkable
class Experience(Protocol):
    """A source of rollouts.

    Where it is compiled, `collect` is traced for one seed, on every device for its share; elsewhere
    it is called for all seeds at once, with arrays [seeds, …].
    """

    compiled: ClassVar[bool]

    def init(self, policy: Policy, key: Key[Array, ""], shard: Shard) -> Any:
        """Return the carry before the first rollout.

        Args:
            policy: of one seed.
            key: decides how episodes start.
            shard: this device's share of the environments.
        """
        ...

    def collect(
        self, policy: Policy, carry: Any, key: Key[Array, "*seeds"], shard: Shard
    ) -> tuple[Any, Rollout, Values]:
        """Collect the next rollout.

        Args:
            policy: acts, or says what memory is.
            carry: as `init` or the last rollout left it.
            key: decides everything random in it.
            shard: this device's share of the environments.

        Returns:
            The carry after it, the rollout [T, B, …], and metrics that came beside it.
        """
        ...


@dataclass(frozen=True)
class OnDevice:
    """Environments in JAX: rollouts and episodes are parts of compiled programs."""

    config: Config
    devices: Devices
    batched: AutoReset  # of all devices together
    clock: Stopwatch = field(default_factory=Stopwatch)
    compiled: ClassVar[bool] = True
    step_part: ClassVar[Part] = "train step"

    @property
    def spec(self) -> EnvSpec:
        """Sizes and limits of the task."""
        return self.batched.spec

    @property
    def env(self) -> Environment:
        """One environment, as it is evaluated: it does not reset itself."""
        return self.batched.env

    def _share(self, shard: Shard) -> AutoReset:
        share = self.config.ppo.num_envs // shard.num_shards
        return replace(self.batched, num_envs=share, first=shard.index * share)

    def init(self, policy: Policy, key: Key[Array, ""], shard: Shard) -> RolloutState:
        """Start an episode in every environment of this device.

        Args:
            policy: of one seed; says what memory is before the first step.
            key: decides how episodes start; each environment draws its own from it.
            shard: this device's share of the environments.

        Returns:
            The carry, [B, …], of B = num_envs / number of devices.
        """
        return init_rollout_state(self._share(shard), policy, key)

    def collect(
        self, policy: Policy, carry: RolloutState, key: Key[Array, ""], shard: Shard
    ) -> tuple[RolloutState, Rollout, Values]:
        """Act for `rollout_length` steps, as part of a compiled program; see `rollout`.

        Args:
            policy: acts with the same weights in all steps.
            carry: of this device's environments, [B, …].
            key: the same on every device, which takes the keys of its environments.
            shard: this device's share of the environments.

        Returns:
            The carry after the last step, the rollout [T, B, …], and no metrics beside it.
        """
        length, sequence = self.config.ppo.rollout_length, sequence_length(self.config)
        return *rollout(self._share(shard), policy, carry, key, length, shard, sequence), {}

    def play(
        self,
        policy: Policy,
        key: Key[Array, ""],
        num_episodes: int,
        greedy: bool | Bool[Array, ""],
    ) -> Values:
        """Play episodes to their ends, each device its share of them; see `evaluate`.

        Args:
            policy: of one seed.
            key: decides everything random.
            num_episodes: M, on all devices together.
            greedy: take the most likely actions; may be traced, so that one program plays both
                modes.

        Returns:
            Metrics, [M], and AGENT_RETURN [M, N] where rewards are not a team's.
        """
        limit, shard = self.config.eval.max_episode_steps, self.devices.shard
        return evaluate(
            self.env, policy, key, num_episodes, greedy=greedy, max_steps=limit, shard=shard
        )

    def play_modes(
        self,
        policies: Sequence[Policy],
        key: Key[Array, ""],
        num_episodes: int,
        modes: Sequence[bool],
    ) -> Values:
        """Play each mode with its policy, in one program.

        Args:
            policies: one per mode.
            key: the same for all modes.
            num_episodes: in each mode.
            modes: whether to take the most likely actions.

        Returns:
            Metrics, [modes, episodes].
        """
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *policies), jnp.array(modes)
        values = lax.map(lambda mode: self.play(mode[0], key, num_episodes, mode[1]), stacked)
        return with_kinds(values, self.spec)

    def close(self) -> None:
        """Do nothing: there is nothing to end."""


@dataclass(frozen=True)
class External:
    """Environments in worker processes of this machine, started when they are first needed.

    A resumed run begins new episodes: the old ones cannot be saved.
    """

    config: Config
    devices: Devices = field(default_factory=Devices)
    clock: Stopwatch = field(default_factory=Stopwatch)
    compiled: ClassVar[bool] = False
    step_part: ClassVar[Part] = "update"  # besides what the clock tells apart

    @property
    def _per_round(self) -> int:
        return min(self.config.eval.num_episodes, self.config.ppo.num_envs)

    @cached_property
    def env(self) -> ExternalEnvironments:
        """Environments in which policies are evaluated."""
        return self._start(self._per_round)

    @cached_property
    def _learning(self) -> ExternalEnvironments:
        """Environments that rollouts come from."""
        first = self.config.num_seeds * self._per_round
        with self.clock.part("environment"):
            return Timed(self._start(self.config.ppo.num_envs, first=first), self.clock)

    def _start(self, num_envs: int, first: int = 0) -> ExternalEnvironments:
        config = self.config
        total = config.num_seeds * num_envs
        return make_external(
            config.env, total, config.agent_id, config.num_workers, config.worker, first
        )

    @property
    def spec(self) -> EnvSpec:
        """Sizes and limits of the task."""
        return self.env.spec

    def init(self, policy: Policy, key: Key[Array, ""], shard: Shard) -> RolloutState:
        """Return a state of the right shapes: episodes start with the first rollout.

        Args:
            policy: of one seed; says what memory is before the first step.
            key: not read, for nothing is drawn yet.
            shard: not read: external environments are those of one device.
        """
        return blank_state(policy, self.spec, self.config.ppo.num_envs)

    def collect(
        self, policy: Policy, carry: RolloutState, key: Key[Array, "seeds"], shard: Shard
    ) -> tuple[RolloutState, Rollout, Values]:
        """Act for `rollout_length` steps, for all seeds at once; see `external_rollout`.

        The first call starts an episode everywhere, after a resumption as well.

        Args:
            policy: [seeds].
            carry: where the last rollout ended, [seeds, B, …].
            key: decides what is sampled, [seeds].
            shard: not read: external environments are those of one device.

        Returns:
            The carry after the last step, the rollout [seeds, T, B, …] in NumPy, and means of the
            environments' own infos, [seeds].
        """
        ppo, num_seeds = self.config.ppo, self.config.num_seeds
        if "_learning" not in self.__dict__:
            carry, _ = start_episodes(self._learning, carry.memory, num_seeds, seed_of(key))
        with self.clock.part("acting"):
            carry, found = external_rollout(
                self._learning, policy, carry, key, ppo.rollout_length, sequence_length(self.config)
            )
        transitions, infos = take_infos(found.transitions)
        return carry, replace(found, transitions=transitions), infos

    def play(
        self, policy: Policy, key: Key[Array, "seeds"], num_episodes: int, greedy: bool
    ) -> Values:
        """Play episodes to their ends, for all seeds at once; see `external_evaluate`.

        Args:
            policy: [seeds].
            key: decides everything random, [seeds].
            num_episodes: M, per seed.
            greedy: take the most likely actions instead of sampling.

        Returns:
            Metrics, [seeds, M], and AGENT_RETURN [seeds, M, N] where rewards are not a team's.
        """
        memory = jax.vmap(lambda policy: policy.init_memory((self._per_round,)))(policy)
        limit = self.config.eval.max_episode_steps
        return external_evaluate(
            self.env, policy, memory, key, num_episodes, greedy=greedy, max_steps=limit
        )

    def play_modes(
        self,
        policies: Sequence[Policy],
        key: Key[Array, "seeds"],
        num_episodes: int,
        modes: Sequence[bool],
    ) -> Values:
        """Play each mode with its policy, one after another.

        Args:
            policies: one per mode, each [seeds].
            key: the same for all modes.
            num_episodes: per seed, in each mode.
            modes: whether to take the most likely actions.

        Returns:
            Metrics, [modes, seeds, episodes].
        """
        key = jax.vmap(jax.random.split)(key)[:, 0]
        values = [
            self.play(policy, key, num_episodes, greedy)
            for policy, greedy in zip(policies, modes, strict=True)
        ]
        stacked = jax.tree.map(lambda *values: np.stack(values), *aligned(values))
        return with_kinds(stacked, self.spec)

    def close(self) -> None:
        """End the worker processes; safe to call twice."""
        for name in ("env", "_learning"):
            if name in self.__dict__:
                self.__dict__[name].close()


Environments = OnDevice | External


def environments(config: Config) -> Environments:
    """Return the environments that a configuration names; nothing is started.

    Raises:
        UserError: for a task that does not exist or returns what its spec does not say, or devices
            that it cannot be dealt to.
    """
    if is_external(config.env):
        if jax.process_count() > 1:
            raise UserError(
                f"{config.env} lives in processes of one host: "
                "only environments in JAX run on several"
            )
        if (config.num_devices or 1) > 1:
            raise UserError(
                f"{config.env} lives in processes, and its policy on one device: drop num_devices"
            )
        return External(config)
    num_envs, num_devices = config.ppo.num_envs, config.num_devices or jax.device_count()
    if num_devices > jax.device_count():
        raise UserError(f"num_devices = {num_devices}, but there are {jax.device_count()}")
    if num_envs % num_devices:
        raise UserError(
            f"ppo.num_envs must be a multiple of the {num_devices} devices, got {num_envs}; "
            "num_devices takes fewer of them"
        )
    if names_code(config.env) or config.env.startswith(OBJECT):
        _check_arrays(config.env)
    batched = make_batched(config.env, num_envs, config.agent_id)
    return OnDevice(config, Devices(num_devices), batched)


def _check_arrays(name: str) -> None:
    """Refuse an environment of one's own whose arrays are not what its spec says."""
    if finding := first_fault(make_plain(name)):
        hint = "" if name.startswith(OBJECT) else f"; `mam check-env {name}` says all of it"
        raise UserError(f"{name}: {finding}{hint}")
