"""Policies by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Key

from mam.config import Config, NetworkConfig
from mam.errors import UserError, check_call, import_function, shown, unknown_name
from mam.networks.decoding.decide import Decoding
from mam.networks.independent import IndependentPolicy
from mam.networks.memory.registry import has_clock
from mam.networks.mixers.base import Roles
from mam.networks.mixers.registry import (
    MixerFamily,
    add_family,
    check_own_settings,
    mixer_families,
    sequence_policies,
)
from mam.networks.sequence import Layout, SequencePolicy
from mam.types import EnvSpec, Policy


@dataclass(frozen=True)
class PolicyKind:
    """A line of the list, and how the policy is built: `build(spec, config, decoding, key=key)`."""

    description: str  # with the critic that `critic` names
    build: Callable[..., Policy]
    memory: str = "none"  # unless the configuration names another
    critic: str = "shared"  # unless it names another
    # Whether its mixers remember, for a configuration
    remembers: Callable[[NetworkConfig], bool] = lambda config: False


def _sequence(
    letter: str, spec: EnvSpec, config: NetworkConfig, decoding: Decoding, *, key: Key[Array, ""]
) -> SequencePolicy:
    if config.plain:
        raise UserError(f"network.plain is for independent policies: {', '.join(INDEPENDENT)}")
    return SequencePolicy(spec, Layout.of(letter, config), config, decoding, key=key)


def _independent(
    spec: EnvSpec,
    config: NetworkConfig,
    decoding: Decoding,
    *,
    key: Key[Array, ""],
) -> IndependentPolicy:
    if config.layouts:
        raise UserError(
            "network.encoder.layout and network.decoder.layout are for sequence policies: "
            f"{sequence_policies()}"
        )
    if decoding != Decoding():
        raise UserError(
            f"decode is for sequence policies ({sequence_policies()}): "
            "independent agents need no decoding"
        )
    return IndependentPolicy(spec, config, key=key)


INDEPENDENT = {
    "mappo": PolicyKind(
        "agents decide by themselves, the critic sees the global state",
        _independent,
        critic="joint",
    ),
    "ippo": PolicyKind(
        "agents decide by themselves, the critic sees what the agent sees",
        _independent,
        critic="own",
    ),
}
# Policies that have a memory unless told otherwise: rec_… of these.
RECURRENT = {"mam": "mamba", "mam2": "mamba2", "mat": "gru", "mappo": "gru", "ippo": "gru"}


SEQUENTIAL = Decoding()


def policies() -> dict[str, PolicyKind]:
    """Return all policies by name.

    One per family of mixers, those of independent agents, and some of them with memory.
    """
    sequence = {}
    for name, f in mixer_families().items():
        _refuse_independent(name, f.policy)
        sequence[f.policy] = PolicyKind(
            f"{f.description} ({f.letter} in layouts)",
            partial(_sequence, f.letter),
            remembers=lambda config, letter=f.letter: Layout.of(letter, config).remembers,
        )
    plain = sequence | INDEPENDENT
    recurrent = {
        f"rec_{name}": replace(
            plain[name], description=f"{name} with memory {memory}", memory=memory
        )
        for name, memory in RECURRENT.items()
    }
    return plain | recurrent


def _refuse_independent(name: str, policy: str) -> None:
    """Refuse the name of a policy without mixers for that of a family's."""
    if policy in INDEPENDENT:
        raise UserError(f"the policy {shown(policy)} of {name} exists: choose another name")


def find_policy(name: str) -> PolicyKind:
    """Return the policy of a name: a key of `policies()`, or package.module:make of a user's own.

    A policy of one's own is made by `make(spec, config, *, key)`, with the sizes of the task and
    the settings of the network; see `mam.types.Policy`.

    Raises:
        UserError: if there is none.
    """
    if ":" in name:
        return PolicyKind("a policy of one's own", partial(_own_policy, name), critic="auto")
    known = policies()
    if name not in known:
        raise unknown_name("policy", name, known, see="mam list")
    return known[name]


def check_read(policy: str, config: NetworkConfig) -> None:
    """Refuse settings of sequences for agents that decide by themselves, which ignore them.

    Raises:
        UserError: naming the setting.
    """
    if policy.removeprefix("rec_") not in INDEPENDENT:
        return
    encoder = config.encoder
    for setting, given in (
        (f"network.order {config.order}", config.order != "index"),
        (f"network.encoder.order_scans {encoder.order_scans}", encoder.order_scans > 1),
        (f"network.encoder.local_branch {encoder.local_branch}", encoder.local_branch > 0),
    ):
        if given:
            raise UserError(
                f"{setting} is for sequence policies ({sequence_policies()}): the agents of "
                f"{policy} decide by themselves"
            )


def _own_policy(
    name: str, spec: EnvSpec, config: NetworkConfig, decoding: Decoding, *, key: Key[Array, ""]
) -> Policy:
    if decoding != SEQUENTIAL:
        raise UserError(f"decode is for sequence policies ({sequence_policies()}), not for {name}")
    make = import_function("policy", name)
    check_call(name, "expected make(spec, config, *, key)", make, spec, config, key=key)
    policy = make(spec, config, key=key)
    if not isinstance(policy, Policy):
        lacks = [method for method in _METHODS if not hasattr(policy, method)]
        raise UserError(
            f"{name} makes a {type(policy).__name__}, which lacks {', '.join(lacks)}: expected a "
            "policy (see mam.types.Policy)"
        )
    return policy


_METHODS = ("init_memory", "act", "evaluate", "successor_values")


def register_mixer(
    name: str,
    *,
    letter: str,
    policy: str,
    description: str,
    roles: Roles,
    options: Mapping[str, tuple[Any, ...]] | None = None,
    own: Mapping[str, Any] | None = None,
    remembers: bool = False,
) -> None:
    """Make a kind of mixer known: as a policy, in layouts, help, sweeps and benches.

    It is known to this process alone: a package makes one known to all of them, trials of sweeps
    and runs of experiments among them, by an entry point (see ARCHITECTURE.md). One of the same
    name is replaced.

    Args:
        name: of the kind, as in `mamba`.
        letter: its name in layouts.
        policy: the name of the policy whose blocks are all of this kind.
        description: of that policy, in a line.
        roles: how it is built as encoder, decoder and cross mixer: `role(config, key=key)`, with
            the settings in `own` by name.
        options: settings of `NetworkConfig` that it reads, and the values that a sweep tries.
        own: settings that no other mixer has, with their values unless `network.mixer_options` says
            otherwise: a bool, a number or a text each.
        remembers: whether it has a memory of earlier environment steps.

    Raises:
        UserError: the letter is no letter or digit, or it or the policy's name is taken.
    """
    mixer_families()  # those of installed packages come first
    _refuse_independent(name, policy)
    how = {"options": options or {}, "own": own or {}, "remembers": remembers}
    family = MixerFamily(letter, policy, description, load=lambda: roles, **how)
    add_family(name, family)


def make_policy(
    name: str,
    spec: EnvSpec,
    config: NetworkConfig,
    decoding: Decoding = SEQUENTIAL,
    *,
    key: Key[Array, ""],
) -> Policy:
    """Build a named policy for the sizes of a task.

    Args:
        name: as `find_policy` takes it.
        spec: of the task's observations and actions.
        config: of the networks.
        decoding: how a sequence policy acts.
        key: of the weights.

    Raises:
        UserError: if there is no policy of this name, or it cannot be laid out or decoded as asked.
    """
    check_own_settings(config)
    network = replace(config, memory=memory_of(name, config), critic=critic_of(name, config))
    return find_policy(name).build(spec, network, decoding, key=key)


def critic_of(name: str, config: NetworkConfig) -> str:
    """Name what values are read from: as `config` asks, or else as the policy `name` does.

    A policy of one's own is given what `config` says, and does as it likes.
    """
    return find_policy(name).critic if config.critic == "auto" else config.critic


def memory_of(name: str, config: NetworkConfig) -> str:
    """Name the memory of a policy: what `config` asks for, or else that of the policy `name`."""
    return config.memory or find_policy(name).memory


def has_memory(name: str, config: NetworkConfig) -> bool:
    """Say whether the policy `name` has memory, given the network's `config`."""
    return _remembers(name, config) or _counts(name, config)


def _remembers(name: str, config: NetworkConfig) -> bool:
    """Say whether there is more to its memory than a clock."""
    return (
        memory_of(name, config) != "none"
        or config.recurrence.last_action
        or find_policy(name).remembers(config)
    )


def _counts(name: str, config: NetworkConfig) -> bool:
    return has_clock(replace(config, memory=memory_of(name, config)))


def knows_the_time(name: str, config: NetworkConfig) -> bool:
    """Say whether the agents of the policy `name` read how many steps have passed."""
    return _counts(name, config) or find_policy(name).remembers(config)


def sequence_length(config: Config) -> int:
    """Return how many steps a policy with memory learns from in one piece.

    Those that `ppo.sequence_length` says, or a whole rollout. A clock needs no more than its step,
    but a teacher's memory is kept as often as the student's.
    """
    single = (
        config.network.recurrence.clock == "on"
        and config.teacher is None
        and ":" not in config.policy  # those of one's own remember what they like
        and not _remembers(config.policy, config.network)
    )
    return config.ppo.sequence_length or (1 if single else config.ppo.rollout_length)


def transfer_weights(
    policy: Policy, name: str, old: EnvSpec, new: EnvSpec, config: NetworkConfig
) -> Policy:
    """Return the policy with the same weights for another task, such as one with more agents.

    Args:
        policy: weights trained on `old`, with any leading axes.
        name: of the policy.
        old: the task it was made for.
        new: the task it is to play.
        config: of its networks.

    Raises:
        UserError: if the weights do not fit, naming the sizes that are to blame.
    """
    decoding = getattr(policy, "decoding", SEQUENTIAL)

    def shapes(spec: EnvSpec) -> Policy:
        return jax.eval_shape(
            lambda key: make_policy(name, spec, config, decoding, key=key), jax.random.key(0)
        )

    def weights(spec: EnvSpec) -> list[tuple[int, ...]]:
        return [leaf.shape for leaf in jax.tree.leaves(shapes(spec))]

    # Weights may fit other components of the same total, or ids and features, and would mean
    # something else.
    meaning = ["action_components"] + ["id_dim"] * (new.obs_dim == old.obs_dim)
    fields = (
        "id_dim",
        "action_components",
        "obs_dim",
        "grid_shape",
        "num_actions",
        "continuous",
        "state_dim",
        "num_agents",
    )
    blamed = [
        field
        for field in fields
        if getattr(new, field) != getattr(old, field)
        and (
            field in meaning
            or weights(replace(old, **{field: getattr(new, field)})) != weights(old)
        )
    ]
    if blamed:
        raise _misfit(name, old, new, config, blamed)
    return jax.tree.unflatten(jax.tree.structure(shapes(new)), jax.tree.leaves(policy))


def _misfit(
    name: str, old: EnvSpec, new: EnvSpec, config: NetworkConfig, blamed: list[str]
) -> UserError:
    """Say which sizes keep weights from another task, and what would have fitted any team."""
    sizes = [
        f"{field} is {getattr(new, field)} instead of {getattr(old, field)}" for field in blamed
    ]
    hints = []
    if new.obs_dim - old.obs_dim == new.num_agents - old.num_agents != 0:
        hints.append("--agent-id sinusoid, ids have")
    if critic_of(name, config) == "joint" and {"num_agents", "state_dim"} & set(blamed):
        hints.append("--network.critic pooled, the critic has")
    return UserError(
        f"this {name} was trained on {old.name} and cannot play {new.name}: {', '.join(sizes)}"
        + "".join(f"; trained with {what} one size for any number of agents" for what in hints)
    )
