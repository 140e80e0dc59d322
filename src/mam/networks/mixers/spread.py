"""Agents spread over devices: a joint action, or a gradient step, by all of them together.

    with jax.set_mesh(agent_mesh()):
        obs = spread_agents(obs, axis=1)
        act = jax.jit(lambda policy, *seen: policy.act(*seen)[1])
        output = act(policy, memory, obs, reset, key)

XLA partitions what a policy does to one agent at a time. State-space mixers are scans along the
agents, of which each device reads its share. Over a share the state goes from h to a ⊙ h + b: all
devices find a and b at once and tell each other, so that each knows the state before its share, and
then reads it from there.

Source: Blelloch 1990, "Prefix sums and their applications", §1.4: blocks of a linear recurrence.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from mam.errors import UserError
from mam.networks.mixers.base import MixerInputs, MixerState

AGENTS = "agents"  # the mesh axis over which agents are spread


def agent_mesh(num_devices: int | None = None) -> jax.sharding.Mesh:
    """Return the mesh for `jax.set_mesh` under which agents are spread over devices.

    Args:
        num_devices: how many; None: all, those of other processes, too.
    """
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((len(devices),), (AGENTS,), (jax.sharding.AxisType.Auto,), devices=devices)


def spread_agents(tree: PyTree[Array], *, axis: int) -> PyTree[Array]:
    """Return arrays of which every device of the mesh in force holds its share.

    Args:
        tree: whole arrays, the same in all processes.
        axis: of the agents.
    """
    sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(*(None,) * axis, AGENTS))

    def place(v: Array) -> Array:
        whole = np.asarray(v)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree)


def num_shares() -> int:
    """Return over how many devices agents are spread: 1 unless the mesh in force says so."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[AGENTS] if AGENTS in mesh.auto_axes else 1


def unroll(
    ssm: Any,
    state: MixerState | None,
    inputs: MixerInputs,
    C: Float[Array, "*batch M S"] | None,
    alive: Bool[Array, "*batch M"] | None,
    *,
    reverse: bool = False,
) -> tuple[MixerState, Float[Array, "*batch M D"]]:
    """Return what `ssm.unroll` does, computed by all devices that agents are spread over.

    Args:
        ssm: an `AbstractSSM`.
        state: before the agents; None: nothing was read.
        inputs: what `ssm.project` gave.
        C: read from the agents themselves if None.
        alive: the dead leave the state as it was.
        reverse: read from the last to the first.

    Raises:
        UserError: if the devices' shares are not equal, or shorter than what a convolution reads.
    """
    shares, (*batch, num_agents, _) = num_shares(), inputs.x.shape
    if shares == 1 or num_agents == 1:  # what one agent would do by itself is no sequence
        return ssm.unroll(state, inputs, C, alive, reverse=reverse)
    least = ssm.conv.weight.shape[0] - 1
    if num_agents % shares or num_agents < shares * least:
        raise UserError(
            f"{shares} devices must have equally many of the agents, at least {least} each: "
            f"there are {num_agents}"
        )
    before_all = ssm.init_state(tuple(batch), inputs.x.dtype) if state is None else state
    reading = range(shares)[:: -1 if reverse else 1]

    def share(ssm, before_all, inputs, C, alive):
        device = lax.axis_index(AGENTS)

        def after(state):
            return ssm.unroll(state, inputs, C, alive, reverse=reverse)[0]

        # 1. The convolutions read the last agents of the share before.
        handed_on = list(pairwise(reading))
        halo = jax.tree.map(
            lambda first, own: jnp.where(
                device == reading[0], first, lax.ppermute(own, AGENTS, handed_on)
            ),
            before_all.conv_state,
            after(None).conv_state,
        )
        # 2. The scan's state before every share, from all shares' transitions.
        start = replace(before_all, conv_state=halo)
        rest = replace(start, ssm_state=jnp.zeros_like(before_all.ssm_state))
        decays, ends = lax.all_gather(
            (ssm.decay(start, inputs, alive, reverse=reverse), after(rest).ssm_state), AGENTS
        )
        h, starts = before_all.ssm_state, {}
        for k in reading:
            starts[k] = h
            h = decays[k] * h + ends[k]
        own = jnp.stack([starts[k] for k in range(shares)])[device]
        # 3. The share itself.
        last, y = ssm.unroll(replace(start, ssm_state=own), inputs, C, alive, reverse=reverse)
        return jax.tree.map(lambda v: v[reading[-1]], lax.all_gather(last, AGENTS)), y

    agents, whole = jax.P(*(None,) * len(batch), AGENTS), jax.P()
    return jax.shard_map(
        share,
        in_specs=(whole, whole, agents, agents, agents),
        out_specs=(whole, agents),
        axis_names={AGENTS},
        check_vma=False,
    )(ssm, before_all, inputs, C, alive)
