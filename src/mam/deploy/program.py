"""A policy as a function of named arrays: what is exported, in whatever format."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mam.config import Config
from mam.envs.wrappers import agent_ids
from mam.errors import UserError
from mam.learning.normalise import as_normalised
from mam.learning.train import init_policy
from mam.runs.load import reads_positions
from mam.types import EnvSpec, ExportablePolicy, Memory, Observation


@dataclass(frozen=True)
class Port:
    """An input or an output: [B, *shape], of any batch B."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    about: str

    def struct(self, batch: Any) -> jax.ShapeDtypeStruct:
        """Return its shape and type for a batch."""
        return jax.ShapeDtypeStruct((batch, *self.shape), np.dtype(self.dtype))


@dataclass(frozen=True)
class Program:
    """One step of a policy without randomness: arrays in the order of `inputs` to `outputs`.

    Agents' ids, normalisation and masks are part of it. What it remembers goes in and comes out.
    """

    policy: ExportablePolicy
    spec: EnvSpec
    ids: np.ndarray  # in front of the agents' views
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    memory: Any  # the structure of what is remembered

    @classmethod
    def of(cls, config: Config, spec: EnvSpec, policy: ExportablePolicy) -> "Program":
        """Return the program of a policy.

        Args:
            config: of its run.
            spec: of the task it is to play.
            policy: the weights, of these sizes.

        Raises:
            UserError: if it computes in half precision.
        """
        if config.network.dtype != "float32":
            raise UserError("a policy that computes in half precision is not exported")
        policy = _in_passes(policy, config, spec)
        ids = agent_ids(spec.num_agents, config.agent_id)[:, : spec.id_dim]
        paths, memory = jax.tree_util.tree_flatten_with_path(policy.init_memory((1,)))
        remembered = [
            Port(f"memory{k}", leaf.shape[1:], str(leaf.dtype), jax.tree_util.keystr(path))
            for k, (path, leaf) in enumerate(paths)
        ]
        placed = reads_positions(config.network.order, spec)
        inputs = (*_inputs(spec, placed=placed), *remembered)
        outputs = (*_outputs(spec), *remembered)
        return cls(policy, spec, ids, inputs, outputs, memory)

    @property
    def num_remembered(self) -> int:
        """Count the last of the inputs, and of the outputs, that are memory."""
        return self.memory.num_leaves

    def __call__(self, *arrays: Array) -> Sequence[Array]:
        """Choose joint actions, and return them with their log-probabilities, values and memory."""
        named = dict(zip((port.name for port in self.inputs), arrays, strict=True))
        view = named["agents_view"]
        if self.ids.shape[1]:
            ids = jnp.broadcast_to(self.ids, (*view.shape[:-1], self.ids.shape[1]))
            view = jnp.concatenate([ids, view], axis=-1)
        mask, alive = named["action_mask"], named["alive"]
        others = {name: named.get(name) for name in ("grid", "state", "positions")}
        obs = Observation(view, mask, alive, **others)
        memory: Memory = jax.tree.unflatten(
            self.memory, arrays[len(self.inputs) - self.num_remembered :]
        )
        memory, output = self.policy.act_on_noise(memory, obs, named["reset"], named["noise"])
        return output.action, output.log_prob, output.value, *jax.tree.leaves(memory)


def _in_passes(policy: ExportablePolicy, config: Config, spec: EnvSpec) -> ExportablePolicy:
    """Return the policy as one that decides in whole passes over the agents.

    A pass is few operations on many rows. Runtimes are slow at loops: ONNX Runtime takes up to 14
    times as long for one agent after another.
    """
    if not hasattr(as_normalised(policy).network, "decoding"):
        return policy
    config = replace(config, decode="fixed_point", decode_window=None, decode_max_passes=None)
    like = jax.eval_shape(lambda: init_policy(config, spec, key=jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(policy))


def _inputs(spec: EnvSpec, *, placed: bool) -> list[Port]:
    n, ports = spec.num_agents, []
    view = (n, spec.obs_dim - spec.id_dim)
    legal = "components in use" if spec.continuous else "True = legal"
    ports.append(Port("agents_view", view, "float32", "features of each agent, without its id"))
    ports.append(Port("action_mask", (n, spec.num_actions), "bool", legal))
    ports.append(Port("alive", (n,), "bool", "False = dead or padded: its rows are not read"))
    if spec.grid_shape is not None:
        grid = (n, *spec.grid_shape)
        ports.append(Port("grid", grid, spec.grid_dtype, "an image for each agent"))
    if spec.state_dim is not None:
        ports.append(Port("state", (spec.state_dim,), "float32", "of the whole environment"))
    if placed and spec.position_dim is not None:
        about = "where agents are: decides their order"
        ports.append(Port("positions", (n, spec.position_dim), "float32", about))
    ports.append(Port("reset", (), "bool", "first step of an episode: memory is not read"))
    noise = "standard normal" if spec.continuous else "standard Gumbel: −log(−log(uniform))"
    noise += " for a sample, zeros for the most likely action"
    return [*ports, Port("noise", (n, spec.num_actions), "float32", noise)]


def _outputs(spec: EnvSpec) -> list[Port]:
    n, action = spec.num_agents, spec.joint_action
    return [
        Port("action", action.shape, str(np.dtype(action.dtype)), "of each agent, by its index"),
        Port("log_prob", (n,), "float32", "of each action, given those of agents before"),
        Port("value", (n,), "float32", "the critic's, in units of reward"),
    ]
