"""Policies by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from jaxtyping import Array, Key

from mam.config import NetworkConfig
from mam.errors import unknown_name
from mam.networks.embed import ObservationEmbedding
from mam.networks.independent import GRU, GlobalView, IndependentPolicy, NoMemory
from mam.networks.mixers import MIXERS
from mam.networks.sequence import SequencePolicy
from mam.types import EnvSpec, Policy


@dataclass(frozen=True)
class PolicyKind:
    """A line of the list, and how the policy is built: `build(spec, sizes, key=key)`."""

    description: str
    build: Callable[..., Policy]


def _sequence(mixer: str, spec: EnvSpec, sizes: NetworkConfig, *, key: Key[Array, ""]) -> SequencePolicy:
    return SequencePolicy(spec, [MIXERS[mixer]] * sizes.num_blocks, sizes, key=key)


_own, _global = ObservationEmbedding, GlobalView

POLICIES = {
    "mam": PolicyKind("Multi-Agent Mamba: state-space blocks along the agents", partial(_sequence, "mamba")),
    "mat": PolicyKind("Multi-Agent Transformer: attention along the agents", partial(_sequence, "attention")),
    "mappo": PolicyKind(
        "agents decide by themselves, the critic sees the global state",
        partial(IndependentPolicy, critic_view=_global, memory=NoMemory),
    ),
    "ippo": PolicyKind(
        "agents decide by themselves, the critic sees what the agent sees",
        partial(IndependentPolicy, critic_view=_own, memory=NoMemory),
    ),
    "rec_mappo": PolicyKind(
        "mappo with a GRU in actor and critic", partial(IndependentPolicy, critic_view=_global, memory=GRU)
    ),
    "rec_ippo": PolicyKind(
        "ippo with a GRU in actor and critic", partial(IndependentPolicy, critic_view=_own, memory=GRU)
    ),
}


def make_policy(name: str, spec: EnvSpec, sizes: NetworkConfig, *, key: Key[Array, ""]) -> Policy:
    """Builds a named policy for the sizes of a task.

    Raises:
        UserError: if there is no policy of this name.
    """
    if name not in POLICIES:
        raise unknown_name("policy", name, POLICIES, see="mam list")
    return POLICIES[name].build(spec, sizes, key=key)
