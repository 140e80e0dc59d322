"""JaxMARL: `mpe/…`, `mabrax/…`, `overcooked/…` and `hanabi/…`, and what they share with `smax/…` in `smax.py`.

JaxMARL's dictionaries by agent end here: rows are stacked in the order of its `env.agents`, by name, because
JAX sorts keys (`ally_10` before `ally_2`). It is stepped without its own auto-reset, which would lose an episode's
last observation. Task settings are those of the published MAM and Sable benchmarks. JaxMARL takes seconds to
import and starts JAX's backend, so that waits until the first task is made.
"""

import abc
import contextlib
import io
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, Shaped

from mam.envs.base import Metrics, restart, transition
from mam.errors import UserError, missing_extra
from mam.types import Action, EnvSpec, EnvState, Observation, TimeStep

MPE_TIME_LIMIT = 26  # JaxMARL's limit of 25 is compared before the step is counted, so one more is taken
MABRAX_TIME_LIMIT = 1000
OVERCOOKED_TIME_LIMIT = 400


def make_mpe(task: str) -> "MpeEnv":
    """Makes a task of `MPE_TASKS`: as many agents as landmarks, which are all to be covered without collisions."""
    agents, _, kind = task.removeprefix("simple_spread_").partition("-")
    return _mpe(f"mpe/{task}", int(agents), int(agents), local_ratio=0.5, continuous=not kind)


def make_mpe_auto(
    agents: int = 3,
    landmarks: int = 0,
    local_ratio: float = 0.5,
    continuous: bool = False,
    limit: int = MPE_TIME_LIMIT,
) -> "MpeEnv":
    """Makes simple_spread of any size.

    Args:
        agents: how many.
        landmarks: how many; 0: as many as agents.
        local_ratio: of an agent's reward, the part that is for its own collisions; 0: all earn the same.
        continuous: actions are strengths instead of directions.
        limit: time limit.

    Raises:
        UserError: an option is out of range.
    """
    landmarks = landmarks or agents
    require_positive("mpe/auto", agents=agents, landmarks=landmarks, limit=limit)
    if not 0 <= local_ratio <= 1:
        raise UserError(f"mpe/auto: local_ratio must be between 0 and 1, got {local_ratio}")
    return _mpe("mpe/auto", agents, landmarks, local_ratio, continuous, limit)


def make_mabrax(task: str) -> "MabraxEnv":
    """Makes a task of `MABRAX_TASKS`: one robot whose joints are shared out among the agents.

    Agents that have fewer joints or see less than others are padded; the padding of actions is masked. JaxMARL
    writes agent i's one-hot index and then its features from position i + 1 on, so they overlap; kept, because
    published scores have it.
    """
    import_jaxmarl()
    with _quietly(), contextlib.ExitStack() as undo:
        try:
            import brax.envs  # noqa: F401  # before JaxMARL's own import, during which the streams are closed files
            import mujoco
            from jaxmarl.environments import mabrax
        except ImportError as error:
            raise missing_extra("this task", "JaxMARL and brax", "mabrax") from error
        # MuJoCo would write what it warns of into a file in the current folder.
        simulator: Any = mujoco  # its functions in C are not known to type checkers
        undo.callback(simulator.set_mju_user_warning, simulator.get_mju_user_warning())
        simulator.set_mju_user_warning(lambda message: None)
        env: Any = mabrax.MABraxEnv(task, MABRAX_TIME_LIMIT, auto_reset=False, homogenisation_method="max")
    (obs_dim,), (num_actions,) = env.observation_space(env.agents[0]).shape, env.action_space(env.agents[0]).shape
    spec = EnvSpec(f"mabrax/{task}", env.num_agents, obs_dim, num_actions, MABRAX_TIME_LIMIT, continuous=True)
    return MabraxEnv(spec, env)


def make_overcooked(task: str) -> "OvercookedEnv":
    """Makes a task of `OVERCOOKED_TASKS`: cooks in a kitchen, seen whole by each; the team earns 20 for each soup.

    In most kitchens chance never serves a soup. A "-shaped" task adds JaxMARL's shaped rewards of all agents, for
    filling pots, fetching plates and taking up soups; its returns are not those of the task without.
    JaxMARL's second version, which it recommends over the first.
    """
    import_jaxmarl()
    from jaxmarl.environments import OvercookedV2

    layout, _, shaped = task.partition("-")
    env = OvercookedV2(layout, max_steps=OVERCOOKED_TIME_LIMIT)
    rows, columns, channels = cast(tuple[int, int, int], env.obs_shape)
    spec = EnvSpec(
        f"overcooked/{task}",
        env.num_agents,
        obs_dim=0,
        num_actions=env.num_actions,
        time_limit=OVERCOOKED_TIME_LIMIT,
        grid_shape=(rows, columns, channels),
    )
    return OvercookedEnv(spec, env, shaped=bool(shaped))


def make_hanabi(task: str) -> "HanabiEnv":
    """Makes a task of `HANABI_TASKS`, the full game for 2 to 5 players.

    Players act in turn; whoever is not to move has one legal action, which does nothing. The team earns 1 for
    each card played well, and loses it all with the last life. No time limit: every game comes to an end.
    """
    import_jaxmarl()
    from jaxmarl.environments import Hanabi

    env = Hanabi(int(task.removesuffix("p")))
    spec = EnvSpec(f"hanabi/{task}", env.num_agents, int(env.obs_size), int(env.num_moves), time_limit=None)
    return HanabiEnv(spec, env)


@dataclass(frozen=True)
class JaxMarlEnv(abc.ABC):
    """What the suites share: stepping, and telling a task's own end from its time limit."""

    spec: EnvSpec
    env: Any  # jaxmarl.environments.MultiAgentEnv

    def reset(self, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        views, state = self.env.reset(key)
        state = jax.tree.map(_strongly_typed, state)
        return state, restart(self._observe(views, state), self._metrics(state))

    def step(self, state: EnvState, action: Action, key: Key[Array, ""]) -> tuple[EnvState, TimeStep]:
        actions = dict(zip(self.env.agents, self._decode(action), strict=True))
        views, state, rewards, dones, info = self.env.step_env(key, state, actions)
        state = jax.tree.map(_strongly_typed, state)
        ended, limit = dones["__all__"], self._is_cut_off(state)
        return state, transition(
            self._observe(views, state),
            reward=self._reward(rewards, info),
            terminated=ended & ~limit,
            truncated=ended & limit,
            metrics=self._metrics(state),
        )

    def animate(self, states: list[EnvState], path: Path) -> None:
        """Writes a GIF of consecutive unbatched states; raises `NotImplementedError` where nothing can draw them."""
        raise NotImplementedError(f"{self.spec.name} cannot be drawn")

    @abc.abstractmethod
    def _observe(self, views: Mapping[str, Array], state: Any) -> Observation: ...

    def _is_cut_off(self, state: Any) -> Bool[Array, ""]:
        """Whether an episode that ended in `state` did so by its time limit alone; here, because nothing else can."""
        del state
        return jnp.ones((), bool)

    def _decode(self, action: Action) -> Iterable[Any]:
        """Actions in JaxMARL's own form, one for each agent."""
        return action

    def _reward(self, rewards: Mapping[str, Array], info: Mapping[str, Any]) -> Float[Array, "N"]:
        del info
        return self._stack(rewards)

    def _metrics(self, state: Any) -> Metrics:
        del state
        return {}

    def _stack(self, rows: Mapping[str, Array]) -> Shaped[Array, "N ..."]:
        return jnp.stack([rows[agent] for agent in self.env.agents])

    def _all_alive(self) -> Bool[Array, "N"]:
        return jnp.ones(self.spec.num_agents, bool)

    def _all_legal(self) -> Bool[Array, "N A"]:
        return jnp.ones((self.spec.num_agents, self.spec.num_actions), bool)


@dataclass(frozen=True)
class MpeEnv(JaxMarlEnv):
    """simple_spread: nothing, left, right, down and up. Continuous actions push left, right, down and up at once.

    JaxMARL takes the strengths from 0 to 1, after a fifth number, for nothing, which it does not read.
    """

    def _observe(self, views: Mapping[str, Array], state: Any) -> Observation:
        del state
        return Observation(self._stack(views), self._all_legal(), self._all_alive())

    def _decode(self, action: Action) -> Iterable[Any]:
        return jnp.pad((action + 1) / 2, ((0, 0), (1, 0))) if self.spec.continuous else action

    def animate(self, states: list[EnvState], path: Path) -> None:
        """Writes a GIF: agents green, landmarks dark."""
        positions = np.stack([state.p_pos for state in jax.device_get(states)])
        colours = np.broadcast_to(np.array(self.env.colour) / 255, (*positions.shape[:2], 3))
        draw_discs(positions, np.asarray(self.env.rad), colours, (-2, 2), path)


@dataclass(frozen=True)
class MabraxEnv(JaxMarlEnv):
    """A robot. All joints of all agents move at once, and the reward is the team's."""

    def _observe(self, views: Mapping[str, Array], state: Any) -> Observation:
        del state
        num_joints = np.array([joints.size for joints in self.env.agent_action_mapping.values()])
        in_use = jnp.arange(self.spec.num_actions) < num_joints[:, None]
        return Observation(self._stack(views), in_use, self._all_alive())

    def _is_cut_off(self, state: Any) -> Bool[Array, ""]:
        return state.info["truncation"] > 0


@dataclass(frozen=True)
class OvercookedEnv(JaxMarlEnv):
    """A kitchen, as a picture for each agent."""

    shaped: bool = False

    def _observe(self, views: Mapping[str, Array], state: Any) -> Observation:
        del state
        return Observation(
            agents_view=jnp.zeros((self.spec.num_agents, 0)),
            action_mask=self._all_legal(),
            alive=self._all_alive(),
            grid=self._stack(views).astype(jnp.uint8),  # counts up to 20, in a quarter of the memory
        )

    def _reward(self, rewards: Mapping[str, Array], info: Mapping[str, Any]) -> Float[Array, "N"]:
        reward = self._stack(rewards)
        return reward + self._stack(info["shaped_reward"]).sum() if self.shaped else reward

    def animate(self, states: list[EnvState], path: Path) -> None:
        """Writes a GIF drawn by JaxMARL."""
        from PIL import Image

        try:
            from jaxmarl.viz.overcooked_v2_visualizer import OvercookedV2Visualizer
        except ImportError as error:
            raise NotImplementedError(f"drawing {self.spec.name} needs imageio: pip install imageio") from error
        pictures = OvercookedV2Visualizer().render_sequence(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
        first, *rest = [Image.fromarray(picture) for picture in np.asarray(pictures)]
        first.save(path, save_all=True, append_images=rest, duration=150, loop=0)


@dataclass(frozen=True)
class HanabiEnv(JaxMarlEnv):
    """A game of cards, whose actions are mostly illegal."""

    def _observe(self, views: Mapping[str, Array], state: Any) -> Observation:
        legal = self._stack(self.env.get_legal_moves(state)).astype(bool)
        return Observation(self._stack(views), legal, self._all_alive())

    def _is_cut_off(self, state: Any) -> Bool[Array, ""]:
        del state
        return jnp.zeros((), bool)


def _mpe(
    name: str, agents: int, landmarks: int, local_ratio: float, continuous: bool, limit: int = MPE_TIME_LIMIT
) -> MpeEnv:
    import_jaxmarl()
    from jaxmarl.environments.mpe import SimpleSpreadMPE

    env: Any = SimpleSpreadMPE(
        num_agents=agents,
        num_landmarks=landmarks,
        local_ratio=local_ratio,
        action_type="Continuous" if continuous else "Discrete",
        max_steps=limit - 1,
    )
    (obs_dim,) = env.observation_space(env.agents[0]).shape
    num_actions = 4 if continuous else 5
    spec = EnvSpec(name, agents, obs_dim, num_actions, limit, continuous=continuous, team_reward=local_ratio == 0)
    return MpeEnv(spec, env)


def require_positive(name: str, **counts: int) -> None:
    for option, count in counts.items():
        if count < 1:
            raise UserError(f"{name}: {option} must be at least 1, got {count}")


def _strongly_typed(leaf: Array) -> Array:
    # Where reset and step disagree on weak types, every jitted loop would compile twice.
    return jnp.asarray(leaf, leaf.dtype)


def draw_discs(
    positions: np.ndarray, radius: np.ndarray, colours: np.ndarray, extent: tuple[int, int], path: Path
) -> None:
    """Writes a GIF of moving discs: positions [T, discs, 2], radius [discs], colours [T, discs, 3 or 4]."""
    from matplotlib.animation import PillowWriter
    from matplotlib.collections import EllipseCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    axes = figure.subplots()
    axes.set(xlim=extent, ylim=extent, aspect="equal", xticks=[], yticks=[])
    size = 2 * radius
    discs = EllipseCollection(
        size, size, np.zeros_like(size), units="xy", offsets=positions[0], offset_transform=axes.transData
    )
    axes.add_collection(discs)
    writer = PillowWriter(fps=7)
    with writer.saving(figure, str(path), dpi=100):
        for step, (position, colour) in enumerate(zip(positions, colours, strict=True)):
            discs.set(offsets=position, facecolor=colour)
            axes.set_title(f"step {step}")
            writer.grab_frame()


def import_jaxmarl() -> None:
    """Imports JaxMARL, all but its brax tasks, which would double the seconds that takes.

    They are held back by failing to import, as where there is no brax, and can be imported afterwards by name.
    """
    brax_tasks = "jaxmarl.environments.mabrax"
    held_back = sys.modules.setdefault(brax_tasks, cast(Any, None)) is None
    try:
        with _quietly():
            import jaxmarl  # noqa: F401
    except ImportError as error:
        raise missing_extra("this task", "JaxMARL", "jaxmarl") from error
    finally:
        if held_back:
            del sys.modules[brax_tasks]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    # JaxMARL and brax print as they are imported, and warn that brax is old; JaxMARL also replaces both streams.
    streams = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(sys.stderr)
    with streams[0], streams[1], warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "Brax System", UserWarning)
        yield
