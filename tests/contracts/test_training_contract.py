"""What every policy must do under the trainer: solve tasks of known optimum, not learn noise.

Compiling a training step takes most of the time, so the tasks are one environment that plays the
task it is told, and each policy is compiled once. Tasks follow each other in a `lax.map`: every one
is a run of its own. For the same reason seeds side by side are compared with seeds alone for one
policy of each kind only.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import Config, NetworkConfig, PPOConfig, RecurrenceConfig
from mam.envs.probes import PROBES, Copy, Identity, Matrix, Memory
from mam.envs.wrappers import AgentId, AutoReset, EpisodeStatistics
from mam.learning import experience, train
from mam.learning.train import TrainState
from mam.networks.policy import has_memory, policies
from mam.types import EnvSpec

NUM_AGENTS, OBS_DIM, NUM_ACTIONS = 2, 5, 4
NUM_UPDATES = 27
PPO = PPOConfig(
    lr=5e-3,
    num_envs=16,
    rollout_length=16,
    num_epochs=4,
    num_minibatches=2,
    gamma=0.9,
    ent_coef=0.2,
)
# The norm: state-space memories learn a cue in the few steps there are.
NETWORK = NetworkConfig(
    d_model=16,
    num_heads=2,
    d_state=2,
    d_conv=2,
    recurrence=RecurrenceConfig(normalise=True),
)


class Mortal(Identity):
    """`Identity` in which agents come and go, and half of the wrong actions are illegal."""

    def _observe(self, view):
        # Whatever looks random to the policy will do: the bits of the cues, new at every step.
        cue = view.argmax(axis=-1)
        bits = (cue[:, None] * 5 + cue[::-1, None] * 3 + jnp.arange(self.num_actions)) % 7
        action_mask = (bits < 4) | (view > 0)
        return replace(super()._observe(view), action_mask=action_mask, alive=bits[:, 0] != 3)


class Unscaled(Identity):
    """`Identity` in which steps cost 100, and a useless feature is a thousand times the cue."""

    def _observe(self, view):
        cue = view.argmax(axis=-1)
        noise = 1000.0 * ((cue * 5 + cue[::-1] * 3) % 7 - 3)
        return super()._observe(jnp.concatenate([view, noise[:, None]], axis=1))

    def step(self, state, action, key):
        state, timestep = super().step(state, action, key)
        return state, replace(timestep, reward=timestep.reward - 100.0)


TASKS = {
    "identity": Identity(NUM_AGENTS, NUM_ACTIONS),
    "copy": Copy(NUM_AGENTS, NUM_ACTIONS),
    "matrix": Matrix(NUM_AGENTS),
    "memory": Memory(NUM_AGENTS, NUM_ACTIONS),
    "mortal": Mortal(NUM_AGENTS, NUM_ACTIONS),
    "unscaled": Unscaled(NUM_AGENTS, NUM_ACTIONS),
}
INDEPENDENT = ["mappo", "ippo", "rec_mappo", "rec_ippo"]
# A program with all tasks compiles for a minute; these are made of parts that others here have.
NAMES = [name for name in policies() if name not in ("rec_mam2", "rec_mat")]
SEQUENCE = [name for name in NAMES if name not in INDEPENDENT]
WITH_MEMORY = [name for name in NAMES if has_memory(name, NetworkConfig())]


def runs_of(name):
    """What a policy trains on: all tasks, and `shuffled`, `identity` with others' rewards.

    Only of sequence policies is anything asked where agents must agree at random (independent ones
    may or may not be trapped, and those with memory may take turns).
    """
    left_out = {} if name in SEQUENCE else {"copy", "matrix"}
    return [run for run in (*TASKS, "shuffled") if run not in left_out]


def rows_of(name):
    """For each run the number of its task, and whether rewards are shuffled."""
    runs = runs_of(name)
    numbers = [0 if run == "shuffled" else list(TASKS).index(run) for run in runs]
    return jnp.array(numbers), jnp.array([run == "shuffled" for run in runs])


def only(*names):
    return pytest.mark.parametrize("learned", names, indirect=True)


def pad(observation):
    """The same for all tasks; what a task does not have is zero, or illegal."""
    view, mask = observation.agents_view, observation.action_mask
    view, mask = (
        jnp.pad(x, ((0, 0), (0, size - x.shape[1])))
        for x, size in ((view, OBS_DIM), (mask, NUM_ACTIONS))
    )
    return replace(observation, agents_view=view, action_mask=mask)


@dataclass(frozen=True)
class AnyTask:
    """All tasks side by side; seen and earned is that of one, whose number may be traced."""

    task: Any
    spec = EnvSpec("test/any", NUM_AGENTS, OBS_DIM, NUM_ACTIONS, time_limit=16)

    def reset(self, key):
        return self._choose([task.reset(key) for task in TASKS.values()])

    def step(self, state, action, key):
        return self._choose(
            [task.step(s, action, key) for task, s in zip(TASKS.values(), state, strict=True)]
        )

    def animate(self, states, path):
        raise NotImplementedError

    def _choose(self, outcomes):
        states, timesteps = zip(*outcomes, strict=True)
        same = [
            replace(t, observation=pad(t.observation), final_observation=pad(t.final_observation))
            for t in timesteps
        ]
        return states, jax.tree.map(lambda *x: jnp.stack(x)[self.task], *same)


@dataclass(frozen=True)
class Shuffled(AutoReset):
    """If so told, environment i is paid what environment i − 1 earned."""

    shuffle: Any

    def step(self, state, action, key):
        state, timestep = super().step(state, action, key)
        reward = jnp.where(self.shuffle, jnp.roll(timestep.reward, 1, axis=0), timestep.reward)
        return state, replace(timestep, reward=reward)


def make_trainer(name, task, shuffle):
    config = Config(policy=name, total_timesteps=NUM_UPDATES * 256, network=NETWORK, ppo=PPO)
    with pytest.MonkeyPatch.context() as patch:
        statistics = EpisodeStatistics(AgentId(AnyTask(task)))
        patch.setattr(
            experience,
            "make_batched",
            lambda name, num_envs, agent_id: Shuffled(statistics, num_envs, shuffle),
        )
        return train.make_train(config)


@dataclass(frozen=True)
class Learned:
    """A policy's runs on all tasks."""

    name: str
    init: TrainState  # before the first update, [runs, 1, …]
    states: list[TrainState]  # after the first and the second
    values: dict[str, np.ndarray]  # metric → [updates, runs]

    def returns(self, run):
        """Of sampled actions as in training: means over every three consecutive updates."""
        returns = self.values["episode_return"][:, runs_of(self.name).index(run)]
        return np.convolve(returns, np.ones(3) / 3, mode="valid")


@pytest.fixture(scope="module", params=NAMES)
def learned(request):
    name = request.param
    rows = rows_of(name)

    @jax.jit
    def init(rows):
        return jax.lax.map(lambda row: make_trainer(name, *row).init(jnp.zeros(1, jnp.int32)), rows)

    @jax.jit
    def train_step(rows, states):
        return jax.lax.map(lambda x: make_trainer(name, *x[0]).train_step(x[1]), (rows, states))

    first = state = init(rows)
    states, values = [], []
    for _ in range(NUM_UPDATES):
        state, new = train_step(rows, state)
        states.append(state)
        values.append(new)
    assert train_step._cache_size() == 1
    stacked = jax.tree.map(lambda *x: np.stack(x)[..., 0], *jax.device_get(values))
    return Learned(name, first, states[:2], stacked)


def test_learns_to_answer_its_own_observation(learned):
    task = TASKS["identity"]
    assert (task.random_return, task.optimal_return) == (2, 8)
    assert learned.returns("identity").max() > 7


def test_learns_whatever_the_scale_of_features_and_the_offset_of_rewards(learned):
    assert learned.returns("unscaled").max() > 7 - 800


@only(*SEQUENCE)
def test_later_agents_learn_from_the_choices_of_earlier_ones(learned):
    """Far above what agents that choose independently could earn."""
    task = TASKS["copy"]
    assert (task.random_return, task.independent_return, task.optimal_return) == (
        2.8125,
        3.75,
        11.25,
    )
    assert learned.returns("copy").max() > 7.5


@only(*SEQUENCE)
def test_agents_coordinate_on_the_better_of_two_optima(learned):
    assert TASKS["matrix"].trap_return == 0.6
    assert learned.returns("matrix").max() > 0.95


def test_learns_where_agents_come_and_go(learned):
    returns = learned.returns("mortal")
    assert returns.max() > 1.4 * returns[0]


def test_nothing_is_learned_from_shuffled_rewards(learned):
    """Sixteen episodes of 16 answers per update, three updates: chance is 2, give or take 0.15."""
    assert learned.returns("shuffled").min() > 1.4
    assert learned.returns("shuffled").max() < 2.6


@only(*WITH_MEMORY)
def test_memory_carries_a_cue_to_the_end_of_an_episode(learned):
    assert (TASKS["memory"].random_return, TASKS["memory"].optimal_return) == (0.25, 1)
    # Sable starts with gates near zero and takes longer: 0.97 after 40,000 steps in place of 7,000.
    assert learned.returns("memory").max() > (0.45 if learned.name == "sable" else 0.9)


@only(*(name for name in NAMES if name not in WITH_MEMORY))
def test_without_memory_a_cue_is_forgotten(learned):
    """Chance is 0.25, give or take 0.03."""
    assert learned.returns("memory").min() > 0.15
    assert learned.returns("memory").max() < 0.35


def test_every_update_starts_at_ratio_one(learned):
    """Defect 1, on every task, also where agents are dead and actions illegal."""
    assert learned.values["first_ratio_deviation"].max() <= 1e-5
    assert (learned.values["ratio_deviation"].max(axis=0) > 0.1).all()  # and goes on from there


def test_all_metrics_are_finite(learned):
    for name, values in learned.values.items():
        assert np.isfinite(values).all(), name


def test_every_parameter_learns(learned):
    """Defect 5, through the whole loss: after one update Adam has seen gradients of every array."""
    adam = learned.states[0].opt_state[1].inner_state[0]
    for path, square in jax.tree.leaves_with_path(adam.nu):
        assert (np.asarray(square)[runs_of(learned.name).index("mortal")] > 0).any(), (
            jax.tree_util.keystr(path)
        )


@only("mam", "rec_mappo")
def test_a_seed_does_not_depend_on_its_neighbours(learned):
    """Two seeds side by side in the trainer's own program, against each in a run of its own.

    Not to the bit: with a seed axis XLA sums in another order.
    """
    trainer = make_trainer(learned.name, jnp.array(0), jnp.array(False))
    both = jax.tree.map(lambda x: jnp.concatenate([x[0], x[0]]), learned.init)
    for alone in learned.states:
        both, _ = trainer.train_step(both)
        for seed in (0, 1):
            jax.tree.map(
                lambda a, b, seed=seed: np.testing.assert_allclose(
                    a[seed], b[0, 0], rtol=1e-4, atol=1e-5
                ),
                *((both.policy, both.opt_state), (alone.policy, alone.opt_state)),
            )


@pytest.mark.parametrize("name", ["mam", "ippo"])
def test_several_choices_at_once_are_learned(name):
    """From one answer in six to nearly all: components mixed up would be left to chance."""
    config = Config(
        policy=name, env="probe/components", total_timesteps=10**6, network=NETWORK, ppo=PPO
    )
    trainer = train.make_train(config)
    state, returns = trainer.init(jnp.zeros(1, jnp.int32)), []
    for _ in range(NUM_UPDATES):
        state, values = trainer.train_step(state)
        assert values["first_ratio_deviation"] <= 1e-5
        returns.append(float(values["episode_return"][0]))
    task = PROBES["components"]()
    assert returns[0] < 2 * task.random_return
    assert np.mean(returns[-3:]) > 0.85 * task.optimal_return
