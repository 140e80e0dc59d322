"""What the blocks of a sequence policy read, put out and mix, at steps whose actions are given."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mam.errors import UserError
from mam.networks.mixers.base import materialize
from mam.networks.order import take_agents
from mam.networks.sequence import SequencePolicy
from mam.types import Action, Memory, Observation, Order, Policy, Reset


class Activations(eqx.Module):
    """What the blocks read, one array for each, agents in the order of deciding."""

    encoder: tuple[Float[Array, "*batch N E"], ...]
    decoder: tuple[Float[Array, "*batch N E"], ...]  # the action stream
    cross: tuple[Float[Array, "*batch N E"], ...]  # the stream where it meets the observations
    obs_rep: Float[Array, "*batch N E"]
    alive: Bool[Array, "*batch N"]
    scans: tuple[Order, ...]  # further orders along which the encoder's blocks mix


def activations(
    policy: Policy, memory: Memory, obs: Observation, action: Action, order: Order, reset: Reset
) -> Activations:
    """Return what the blocks of a policy read, as in `evaluate`.

    Args:
        policy: a sequence policy whose mixers remember nothing.
        memory: before the first step.
        obs: time first where there is memory.
        action: the joint action at each step.
        order: in which the agents decided.
        reset: whether a step was the first of its episode.

    Raises:
        UserError: for any other policy.
    """
    if not isinstance(policy, SequencePolicy):
        raise UserError("only sequence policies, such as mam and mat, have blocks that mix agents")
    if jax.tree.leaves((memory.encoder, memory.decoder)):
        raise UserError("mixers that remember earlier environment steps are no matrices of one")
    _, x = policy.memory.unroll(memory.agents, policy.embed(obs), reset, action)
    x, alive = policy.in_order(x, order), take_agents(obs.alive, order)
    scans = policy.scans(obs, order)
    read: dict[str, list[Array]] = {"encoder": [], "decoder": [], "cross": []}
    for block in policy.encoder.blocks:
        read["encoder"].append(x)
        x = block((), x, alive, reset, scans)[1]
    obs_rep, decoder = x, policy.decoder
    tokens = policy.distribution.token(take_agents(action, order))
    x = decoder.embed(decoder.embed.shift_right(tokens)).astype(obs_rep.dtype)
    for block in decoder.blocks:
        read["decoder"].append(x)
        read["cross"].append(block.mixer_norm(x, block.mixer(x)))
        x = block.all_at_once(x, obs_rep)
    found = {name: tuple(inputs) for name, inputs in read.items()}
    return Activations(**found, obs_rep=obs_rep, alive=alive, scans=scans)


def block_outputs(policy: SequencePolicy, read: Activations) -> tuple[Float[Array, "..."], ...]:
    """Return what every block makes of the given inputs, the encoder's first.

    Args:
        policy: whose blocks they are.
        read: by the blocks of this policy, or of another of the same width and depth.
    """
    first = jnp.ones(read.alive.shape[:-1], bool)
    encoder = zip(policy.encoder.blocks, read.encoder, strict=True)
    decoder = zip(policy.decoder.blocks, read.decoder, strict=True)
    return (
        *(block((), x, read.alive, first, read.scans)[1] for block, x in encoder),
        *(block.all_at_once(x, read.obs_rep) for block, x in decoder),
    )


def mixing_matrices(policy: SequencePolicy, read: Activations) -> dict[str, Float[Array, "..."]]:
    """Return what every mixer makes of the given inputs as matrices [*batch, H, N, N], by name.

    Rows and columns are in the order of deciding. Those of the decoder read the action stream,
    whose agent j is the action of agent j − 1. Of an encoder that mixes along further orders they
    are those along the order of deciding.

    Args:
        policy: whose mixers they are.
        read: by the blocks of this policy, or of another of the same width and depth.
    """
    found = {}
    for index, (block, x) in enumerate(zip(policy.encoder.blocks, read.encoder, strict=True)):
        found[f"encoder {index + 1}"] = materialize(block.mixer, x, alive=read.alive)
    decoder = zip(policy.decoder.blocks, read.decoder, read.cross, strict=True)
    for index, (block, x, crossing) in enumerate(decoder):
        found[f"decoder {index + 1}"] = materialize(block.mixer, x, alive=read.alive)
        cross = materialize(block.cross, crossing, read.obs_rep, alive=read.alive)
        found[f"cross {index + 1}"] = cross
    return found
