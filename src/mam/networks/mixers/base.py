"""What a mixer is: a sequence layer along the agent axis, all in which MAM and MAT differ."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

T = TypeVar("T")

MixerState = PyTree  # what a causal mixer knows of the agents so far
MixerMemory = PyTree  # what a mixer knows of earlier environment steps; () if nothing
MixerInputs = PyTree  # what it reads of one agent; every leaf has the agents' axes first


@dataclass(frozen=True)
class Mixing:
    """A mixer as matrices: how much every agent takes of every agent's values, by head.

        output = finish(M values + c)

    M, c and `finish` are functions of what the mixer read: its scores, decays and gates. Held
    still, they leave it affine in its values. c is made of biases, and nobody's.
    """

    values: Float[Array, "*batch H N F"]
    apply: Callable[[Array], Array]  # M v, of any v like `values`
    finish: Callable[[Array], Array]  # the mixer's output [*batch, N, E]
    offset: Float[Array, "*batch H N F"] | float = 0.0  # c

    @property
    def matrix(self) -> Float[Array, "*batch H N N"]:
        """M: row i is the agent that takes, column j the one it takes from."""

        def column(agent: Float[Array, "N"]) -> Float[Array, "*batch H N"]:
            one = jnp.broadcast_to(agent[:, None], self.values.shape).astype(self.values.dtype)
            return self.apply(one)[..., 0]

        return jax.vmap(column, out_axes=-1)(jnp.eye(self.values.shape[-2]))

    @property
    def output(self) -> Float[Array, "*batch N E"]:
        """What the mixer puts out."""
        return self.finish(self.apply(self.values) + self.offset)

    def then(self, finish: Callable[[Array], Array]) -> "Mixing":
        """Return the mixing whose output is a function of this one's."""
        return replace(self, finish=lambda y: finish(self.finish(y)))


class AbstractMixer(eqx.Module):
    """Mixes agents. Any mixer may serve the encoder."""

    @abstractmethod
    def __call__(
        self,
        x: Float[Array, "*batch N E"],
        context: Float[Array, "*batch N E"] | None = None,
        *,
        alive: Bool[Array, "*batch N"] | None = None,
    ) -> Float[Array, "*batch N E"]:
        """Mix all agents at once.

        Args:
            x: the agents, in the order in which they decide.
            context: a second sequence, for mixers that read one (the decoder's cross mixers).
            alive: agents that exist; the dead must come last. They change nothing for the others,
                and their own outputs mean nothing. None: all are alive.
        """

    def init_memory(self, batch: tuple[int, ...]) -> MixerMemory:
        """Return the memory before an episode, for leading axes `batch`; () if there is none."""
        return ()

    def mix_steps(
        self,
        memory: MixerMemory,
        x: Float[Array, "*batch N E"],
        alive: Bool[Array, "*batch N"],
        reset: Bool[Array, "*batch"],
    ) -> tuple[MixerMemory, Float[Array, "*batch N E"]]:
        """Mix all agents of each of T environment steps.

        With memory the first axis is time, without all leading axes are alike.

        Args:
            memory: before the first step.
            x: the agents of step t, in the order in which they decide.
            alive: as in `__call__`.
            reset: whether step t is the first of its episode.

        Returns:
            The memory after the last step, and the outputs.
        """
        return memory, self(x, alive=alive)

    def mixing(
        self,
        x: Float[Array, "*batch N E"],
        context: Float[Array, "*batch N E"] | None = None,
        *,
        alive: Bool[Array, "*batch N"] | None = None,
    ) -> Mixing:
        """Return what `__call__` does as matrices; see `materialize`.

        Args:
            x: the agents, in the order in which they decide.
            context: a second sequence, for mixers that read one.
            alive: agents that exist; the others' columns are zero.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `mixing`: it is no matrix")

    def metrics(self) -> dict[str, Float[Array, ""]]:
        """Return numbers to watch in training; the largest of a policy's mixers is reported."""
        return {}


class AbstractCausalMixer(AbstractMixer):
    """A mixer in which no agent sees a later one.

    What an agent contributes by itself (`project`, `project_context`) is apart from the mixing, so
    that it can be computed once for everything an agent may be, or for all agents before the first
    of them acts. The mixing has two equal forms: `step` for one agent, `unroll` for several.
    """

    has_constant_state: ClassVar[bool] = False  # whether a state's size is the same for any N

    @abstractmethod
    def project(self, x: Float[Array, "*batch E"]) -> MixerInputs:
        """Compute what the mixer reads of agents, each by itself."""

    @abstractmethod
    def project_context(self, context: Float[Array, "*batch E"] | None) -> MixerInputs:
        """Compute what the mixer reads of the second sequence, by agent; None if it reads none."""

    @abstractmethod
    def init_state(
        self, num_agents: int, batch: tuple[int, ...] = (), dtype: jnp.dtype | None = None
    ) -> MixerState:
        """Return the state before the first agent.

        Args:
            num_agents: N, the most agents that the state will take.
            batch: leading axes.
            dtype: of the inputs.
        """

    @abstractmethod
    def step(
        self, state: MixerState, inputs: MixerInputs, context: MixerInputs
    ) -> tuple[MixerState, Float[Array, "*batch E"]]:
        """Return the state after the next agent, and its output.

        Args:
            state: after the agents before.
            inputs: what `project` gave for the agent.
            context: what `project_context` gave for it.
        """

    @abstractmethod
    def unroll(
        self,
        state: MixerState | None,
        inputs: MixerInputs,
        context: MixerInputs,
        alive: Bool[Array, "*batch M"] | None = None,
    ) -> tuple[MixerState, Float[Array, "*batch M E"]]:
        """Return the state after the next M agents, and their outputs.

        Args:
            state: after the agents before; None: there are none.
            inputs: what `project` gave for the M agents.
            context: what `project_context` gave for them.
            alive: as in `__call__`.
        """

    def start_step(
        self,
        memory: MixerMemory,
        num_agents: int,
        alive: Bool[Array, "*batch N"],
        reset: Bool[Array, "*batch"],
        dtype: jnp.dtype | None = None,
    ) -> MixerState:
        """Return the state before the first agent of an environment step.

        Args:
            memory: after the step before.
            num_agents: the most agents that the state will take, at least N.
            alive: the agents of the step, the dead last.
            reset: whether the step is the first of its episode.
            dtype: of the inputs.
        """
        return self.init_state(num_agents, reset.shape, dtype)

    def end_step(self, state: MixerState) -> MixerMemory:
        """Return the memory after a step, given the state after all of its agents."""
        return ()

    def unroll_steps(
        self,
        memory: MixerMemory,
        inputs: MixerInputs,
        context: MixerInputs,
        alive: Bool[Array, "*batch N"],
        reset: Bool[Array, "*batch"],
    ) -> tuple[MixerMemory, Float[Array, "*batch N E"]]:
        """Return the memory after T environment steps, and the outputs of all agents.

        With memory the first axis is time, without all leading axes are alike.

        Args:
            memory: before the first step.
            inputs: what `project` gave for the agents of step t.
            context: what `project_context` gave for them.
            alive: the dead, who come last, leave nothing to later steps.
            reset: whether step t is the first of its episode.
        """
        return memory, self.unroll(None, inputs, context)[1]

    @property
    def fused(self) -> Any:
        """The block that fused decoders (native, CUDA) run in its place; None if there is none."""
        return None

    @final
    def __call__(self, x, context=None, *, alive=None):
        return self.unroll(None, self.project(x), self.project_context(context), alive)[1]


@dataclass(frozen=True)
class Roles:
    """The three roles that a kind of mixer plays, each built as `role(config, key=key)`."""

    encoder: Callable[..., AbstractMixer]
    decoder: Callable[..., AbstractCausalMixer]
    # Of the decoder, reading the observations as its context.
    cross: Callable[..., AbstractCausalMixer]


def materialize(
    mixer: AbstractMixer,
    x: Float[Array, "*batch N E"],
    context: Float[Array, "*batch N E"] | None = None,
    *,
    alive: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch H N N"]:
    """Return a mixer as matrices: M[h, i, j] is what agent i takes of agent j's values in head h.

    They are exact: `mixer.mixing(x)` also has the values, and what is done with M values. Of a
    state-space model every channel is a head, for its convolution, which is in M, is its own.

    Args:
        mixer: of any family and role.
        x: the agents, in the order in which they decide.
        context: a second sequence, for mixers that read one.
        alive: agents that exist; nobody takes anything of the others, whose rows mean nothing.

    Raises:
        NotImplementedError: if the mixer does not say what it is as a matrix.

    Source: Dao and Gu 2024 (arXiv 2405.21060), §2.3 (sequence mixers as matrices). The SiLU after a
    convolution counts as a gate, SiLU(c) = σ(c) c.
    """
    return mixer.mixing(x, context, alive=alive).matrix


def by_channel(x: Float[Array, "*batch N D"]) -> Float[Array, "*batch D N 1"]:
    """Make a head of every channel."""
    return jnp.swapaxes(x, -1, -2)[..., None]


def side_by_side(x: Float[Array, "*batch D N 1"]) -> Float[Array, "*batch N D"]:
    """Put channels side by side again, the inverse of `by_channel`."""
    return jnp.swapaxes(x[..., 0], -1, -2)


def mixer_metrics(policy: PyTree) -> dict[str, Float[Array, ""]]:
    """Return the metrics of a policy's mixers, the largest of each name."""
    mixers = jax.tree.leaves(policy, is_leaf=lambda node: isinstance(node, AbstractMixer))
    found: dict[str, list[Array]] = {}
    for mixer in mixers:
        if isinstance(mixer, AbstractMixer):
            for name, value in mixer.metrics().items():
                found.setdefault(name, []).append(value)
    return {name: jnp.stack(values).max() for name, values in found.items()}


def required(context: T | None) -> T:
    """Return a mixer's second sequence.

    Raises:
        ValueError: if it is None.
    """
    if context is None:
        raise ValueError("this mixer reads a second sequence: pass context")
    return context
