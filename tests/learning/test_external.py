"""Acting in external environments: the same as a plain loop, for every seed and environment.

The environments here live in this very process, in NumPy.
"""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import Config, DistillConfig, EvalConfig, NetworkConfig, PPOConfig
from mam.data.store import Writer
from mam.learning import experience, train
from mam.learning.external import (
    external_evaluate,
    external_rollout,
    seed_of,
    start_episodes,
    take_infos,
)
from mam.runs.record import Controller, record
from mam.types import EnvSpec, ExternalEnvironments, Observation, PolicyOutput, TimeStep

NUM_SEEDS, NUM_ENVS, LENGTH, NUM_AGENTS, NUM_ACTIONS = 2, 3, 6, 2, 5


class Dice:
    """Episodes of 1 to 4 steps, as long as a die says; even ones terminate, odd ones are truncated.

    The view is (the episode's length, steps so far, agent); an agent earns its action plus the
    steps before it. Environment i throws the die of (seed, first + i), whatever the others do.
    """

    spec = EnvSpec(
        *("test/dice", NUM_AGENTS, 3, NUM_ACTIONS, None),
        team_reward=False,
        agent_names=("even_0", "odd_1"),
    )

    def __init__(self, num_envs, first=0):
        self.num_envs, self.first = num_envs, first
        self.lost = np.zeros(num_envs, bool)
        self.seeds, self.actions, self.closed = [], [], False  # what it was told

    def reset(self, seed):
        self.seeds.append(seed)
        self.dice = [np.random.default_rng([seed, self.first + i]) for i in range(self.num_envs)]
        self.length, self.time, self.total = np.zeros((3, self.num_envs), np.float32)
        self._start(np.ones(self.num_envs, bool))
        never = np.zeros(self.num_envs, bool)
        zeros = np.zeros((self.num_envs, NUM_AGENTS), np.float32)
        return TimeStep(self._observe(), zeros, never, never, self._observe(), self._metrics())

    def step(self, action):
        self.actions.append(action)
        reward = (action + self.time[:, None]).astype(np.float32)
        self.time, self.total = self.time + 1, self.total + reward.mean(axis=1)
        final, metrics, over, even = (
            self._observe(),
            self._metrics(),
            self.time == self.length,
            self.length % 2 == 0,
        )
        self._start(over)
        return TimeStep(self._observe(), reward, over & even, over & ~even, final, metrics)

    def close(self):
        self.closed = True

    def _start(self, where):
        drawn = [
            die.integers(1, 5) if new else old
            for die, new, old in zip(self.dice, where, self.length, strict=True)
        ]
        self.length = np.array(drawn, np.float32)
        self.time, self.total = np.where(where, 0, self.time), np.where(where, 0, self.total)

    def _observe(self):
        agents = (self.num_envs, NUM_AGENTS)
        features = (
            self.length[:, None],
            self.time[:, None],
            np.arange(NUM_AGENTS, dtype=np.float32),
        )
        view = np.stack([np.broadcast_to(x, agents) for x in features], axis=-1)
        return Observation(view, np.ones((*agents, NUM_ACTIONS), bool), alive=np.ones(agents, bool))

    def _metrics(self):
        return {"episode_return": self.total, "episode_length": self.time}


class Counter(eqx.Module):
    """Its memory is the number of steps since the last reset, and also its value."""

    taste: jax.Array

    def init_memory(self, batch=()):
        return jnp.full(batch, 99, jnp.int32)  # as if left over from an earlier episode

    def act(self, memory, obs, reset, key, *, greedy=False):
        count = jnp.where(reset, 0, memory)
        logits = jax.nn.log_softmax(self.taste[count][..., None, :] + obs.agents_view[..., :1])
        action = jnp.where(greedy, logits.argmax(-1), jax.vmap(jax.random.categorical)(key, logits))
        log_prob = jnp.take_along_axis(logits, action[..., None], -1)[..., 0]
        value = jnp.broadcast_to(count[..., None], action.shape).astype(float)
        order = jnp.broadcast_to(jnp.arange(NUM_AGENTS, dtype=jnp.int32)[::-1], action.shape)
        return count + 1, PolicyOutput(action.astype(jnp.int32), log_prob, value, order)

    def evaluate(self, memory, obs, action, order, reset):
        raise NotImplementedError

    def successor_values(self, memory, obs, action, reset, successor):
        raise NotImplementedError


POLICY = Counter(
    jax.random.normal(jax.random.key(0), (NUM_SEEDS, 100, NUM_ACTIONS))
)  # one per seed
KEYS = [jax.random.split(jax.random.key(k), NUM_SEEDS) for k in (1, 2)]  # of two rollouts
SEED = 5  # of the environments
act_alone = jax.jit(
    lambda policy, *args, greedy: policy.act(*args, greedy=greedy), static_argnames="greedy"
)


def blank_memory(num_seeds=NUM_SEEDS):
    return jnp.full((num_seeds, NUM_ENVS), 99, jnp.int32)


def play_by_hand(seed_index, env_index, seed, key_of, *, greedy=False):
    """One environment of one seed, step by step: what `Transition` holds, for ever."""
    env, policy = (
        Dice(1, seed_index * NUM_ENVS + env_index),
        jax.tree.map(lambda x: x[seed_index], POLICY),
    )
    obs, reset, memory, t = (
        env.reset(seed).observation,
        np.ones(1, bool),
        jnp.full(1, 99, jnp.int32),
        0,
    )
    while True:
        key = jax.random.split(key_of(t), NUM_ENVS)[env_index]
        after, output = act_alone(policy, memory, obs, reset, key[None], greedy=greedy)
        timestep = env.step(np.asarray(output.action))
        parts = ("reward", "terminated", "truncated", "final_observation", "metrics")
        yield (
            {"observation": obs, "reset": reset}
            | {part: getattr(output, part) for part in ("action", "log_prob", "value", "order")}
            | {part: getattr(timestep, part) for part in parts}
        )
        obs, reset, memory, t = timestep.observation, timestep.ended, after, t + 1


def roll_out(num_seeds=NUM_SEEDS, first_seed=0, sequence_length=None):
    """Two rollouts of some of the seeds: environments, states, transitions and memories."""
    seeds = slice(first_seed, first_seed + num_seeds)
    envs = Dice(num_seeds * NUM_ENVS, first_seed * NUM_ENVS)
    policy = jax.tree.map(lambda x: x[seeds], POLICY)
    states = [start_episodes(envs, blank_memory(num_seeds), num_seeds, SEED)[0]]
    rollouts = []
    for keys in KEYS:
        after, found = external_rollout(
            envs, policy, states[-1], keys[seeds], LENGTH, sequence_length
        )
        states.append(after)
        rollouts.append(found)
    np.testing.assert_array_equal(after.observation.alive, found.final_alive)
    memory = np.concatenate([found.memory for found in rollouts], axis=1)
    transitions = [found.transitions for found in rollouts]
    return envs, states, jax.tree.map(lambda *x: np.concatenate(x, axis=1), *transitions), memory


@pytest.fixture(scope="module")
def rolled_out():
    return roll_out()


def test_the_toy_is_what_the_protocol_says():
    assert isinstance(Dice(1), ExternalEnvironments)


def test_a_rollout_equals_a_plain_loop(rolled_out):
    """Seeds first, then time, then environments; acting goes on where it stopped."""
    envs, _, transitions, _ = rolled_out
    assert envs.seeds == [SEED]
    assert {x.shape[:3] for x in jax.tree.leaves(transitions)} == {
        (NUM_SEEDS, 2 * LENGTH, NUM_ENVS)
    }
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(transitions))
    for seed, env in np.ndindex(NUM_SEEDS, NUM_ENVS):

        def key_of(t, seed=seed):
            return jax.random.fold_in(KEYS[t // LENGTH][seed], t % LENGTH)

        for t, expected in zip(
            range(2 * LENGTH), play_by_hand(seed, env, SEED, key_of), strict=False
        ):
            actual = jax.tree.map(lambda x, at=(seed, t, env): x[at][None], transitions)
            for part, value in expected.items():
                assert_close = partial(np.testing.assert_allclose, rtol=1e-6, err_msg=part)
                jax.tree.map(assert_close, getattr(actual, part), value)


def test_both_ends_and_many_actions_occur(rolled_out):
    _, _, t, _ = rolled_out
    assert (t.terminated.any(), t.truncated.any(), (t.terminated & t.truncated).any()) == (
        True,
        True,
        False,
    )
    assert set(t.action.ravel()) == set(range(NUM_ACTIONS))
    np.testing.assert_array_equal(
        t.final_observation.agents_view[..., 1], t.observation.agents_view[..., 1] + 1
    )


def test_memory_counts_from_the_first_step_of_every_episode(rolled_out):
    """Defect 9: not one step off, whatever was in the memory before."""
    _, states, t, memory = rolled_out
    np.testing.assert_array_equal(t.value, t.observation.agents_view[..., 1])
    np.testing.assert_array_equal(t.reset, t.observation.agents_view[..., 0, 1] == 0)
    before = np.concatenate(
        [np.full_like(t.value[:, :1, :, 0], 99), t.value[:, :-1, :, 0] + 1], axis=1
    )
    np.testing.assert_array_equal(memory, before[:, ::LENGTH])  # as it was before the policy acted
    *_, memory = roll_out(sequence_length=3)
    np.testing.assert_array_equal(memory, before[:, ::3])
    np.testing.assert_array_equal(states[-1].memory, t.value[:, -1, :, 0] + 1)
    np.testing.assert_array_equal(states[-1].reset, (t.terminated | t.truncated)[:, -1])


def test_a_seed_does_not_depend_on_its_neighbours(rolled_out):
    for seed in range(NUM_SEEDS):
        _, _, alone, _ = roll_out(num_seeds=1, first_seed=seed)
        beside = jax.tree.map(lambda x, seed=seed: x[seed : seed + 1], rolled_out[2])
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), alone, beside)


def test_every_episode_equals_one_played_by_hand():
    """In rounds of one episode per environment, each from a reset to its end and no further."""
    num_episodes = 2 * NUM_ENVS + 1
    envs = Dice(NUM_SEEDS * NUM_ENVS)
    metrics = external_evaluate(envs, POLICY, blank_memory(), KEYS[0], num_episodes, greedy=True)
    own = metrics.pop("agent_return")
    assert {x.shape for x in metrics.values()} == {(NUM_SEEDS, num_episodes)}
    first = seed_of(KEYS[0])
    assert envs.seeds == [first, first + NUM_ENVS, first + 2 * NUM_ENVS]
    for seed, episode in np.ndindex(NUM_SEEDS, num_episodes):
        a_round, env = divmod(episode, NUM_ENVS)
        total = np.zeros(NUM_AGENTS)
        for last in play_by_hand(
            seed, env, envs.seeds[a_round], lambda t: jax.random.key(t), greedy=True
        ):
            total += last["reward"][0]
            if last["terminated"] | last["truncated"]:
                break
        np.testing.assert_allclose(own[seed, episode], total, rtol=1e-6)
        for name, value in last["metrics"].items():
            np.testing.assert_allclose(metrics[name][seed, episode], value[0], rtol=1e-6)
    assert set(metrics["episode_length"].ravel()) == {1, 2, 3, 4}


def test_a_round_stops_when_its_last_episode_is_over():
    envs = Dice(NUM_SEEDS * NUM_ENVS)
    metrics = external_evaluate(envs, POLICY, blank_memory(), KEYS[0], 2 * NUM_ENVS, greedy=True)
    rounds = metrics["episode_length"].reshape(NUM_SEEDS, 2, NUM_ENVS)
    assert len(envs.actions) == rounds.max(axis=(0, 2)).sum()


def test_what_does_not_end_is_cut_off_and_counted():
    envs = Dice(NUM_SEEDS * NUM_ENVS)
    whole = external_evaluate(envs, POLICY, blank_memory(), KEYS[0], NUM_ENVS, greedy=True)
    cut = external_evaluate(
        envs, POLICY, blank_memory(), KEYS[0], NUM_ENVS, greedy=True, max_steps=2
    )
    late = whole["episode_length"] > 2
    np.testing.assert_array_equal(cut["unfinished"], late)
    assert 0 < late.sum() < late.size
    np.testing.assert_array_equal(cut["episode_length"], np.minimum(whole["episode_length"], 2))
    np.testing.assert_array_equal(cut["episode_return"][~late], whole["episode_return"][~late])


class Fragile(Dice):
    """Loses the process of its first two environments at some step: their episodes begin anew."""

    def __init__(self, num_envs, at):
        super().__init__(num_envs)
        self.at = at

    def step(self, action):
        before, there = self._observe(), self.lost.copy()
        there[:2] = len(self.actions) == self.at
        self.time = np.where(there, 0, self.time)  # it cannot end at this step
        timestep = super().step(action)
        self.lost = there
        self._start(there)
        return replace(
            timestep,
            observation=self._observe(),
            reward=np.where(there[:, None], 0, timestep.reward),
            terminated=timestep.terminated & ~there,
            truncated=timestep.truncated | there,
            final_observation=before,
        )


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_episode_cut_short_by_a_lost_process_is_played_again(at):
    envs = Fragile(NUM_SEEDS * NUM_ENVS, at)
    metrics = external_evaluate(envs, POLICY, blank_memory(), KEYS[0], NUM_ENVS)
    assert envs.lost.sum() in (0, 2)
    np.testing.assert_array_equal(metrics["unfinished"], 0)
    np.testing.assert_allclose(
        metrics["agent_return"].mean(axis=-1), metrics["episode_return"], rtol=1e-6
    )
    whole = external_evaluate(Dice(NUM_SEEDS * NUM_ENVS), POLICY, blank_memory(), KEYS[0], NUM_ENVS)
    first = whole["episode_length"].ravel()[:2]
    again = metrics["episode_length"].ravel()
    np.testing.assert_array_equal(again[2:], whole["episode_length"].ravel()[2:])
    np.testing.assert_array_equal(again[:2][first <= at], first[first <= at])  # ended before


class Talkative(Dice):
    """Says after a while how often it won."""

    def _metrics(self):
        late = (
            {"info_won": np.where(self.time == self.length, self.length, np.nan)}
            if len(self.actions) > 2
            else {}
        )
        return super()._metrics() | late


def test_metrics_that_come_up_late(monkeypatch):
    """They are NaN before, and means over the episodes that say them afterwards."""
    envs = Talkative(NUM_SEEDS * NUM_ENVS)
    state, _ = start_episodes(envs, blank_memory(), NUM_SEEDS, SEED)
    whole = external_rollout(envs, POLICY, state, KEYS[0], LENGTH)[1].transitions
    transitions, means = take_infos(whole)
    assert set(transitions.metrics) == {"episode_return", "episode_length"}
    won = whole.metrics["info_won"]
    assert np.isnan(won[:, :2]).all()
    np.testing.assert_allclose(means["info_won"], np.nanmean(won, axis=(1, 2)), rtol=1e-6)
    metrics = external_evaluate(
        Talkative(NUM_SEEDS * NUM_ENVS), POLICY, blank_memory(), KEYS[0], 2 * NUM_ENVS
    )
    late = np.isfinite(metrics["info_won"])
    assert late.any()
    np.testing.assert_array_equal(metrics["info_won"][late], metrics["episode_length"][late])


def test_sampled_episodes_depend_on_the_key_and_on_the_round():
    """Were the environments' seeds the same, their actions would still differ."""

    def first_actions(key):
        envs = Dice(NUM_SEEDS * NUM_ENVS)
        external_evaluate(envs, POLICY, blank_memory(), key, 2 * NUM_ENVS)
        lengths = np.cumsum([0, len(envs.actions) - 1])
        return np.stack([envs.actions[t] for t in lengths])

    once, again, other = first_actions(KEYS[0]), first_actions(KEYS[0]), first_actions(KEYS[1])
    np.testing.assert_array_equal(once, again)
    assert (once[0] != once[1]).any()
    assert (once[0] != other[0]).any()


CONFIG = Config(
    env="test/dice",
    num_seeds=NUM_SEEDS,
    total_timesteps=10**6,
    network=NetworkConfig(d_model=8, d_state=2),
    ppo=PPOConfig(num_envs=4, rollout_length=6, num_epochs=2, num_minibatches=2, lr=0.01),
    eval=EvalConfig(num_episodes=3, num_absolute_episodes=5),
)
SEEDS = jnp.arange(NUM_SEEDS)


class Host:
    """Stands in for worker processes: keeps what trainers start, and where they acted from."""

    def __init__(self):
        self.made, self.states = [], []

    def make_external(self, name, num_envs, agent_id, num_workers, limits, first):
        assert first in (0, NUM_SEEDS * 3)  # those that learn come after those that play
        self.made.append(Dice(num_envs))
        return self.made[-1]

    def external_rollout(self, envs, policy, state, key, length, sequence_length):
        self.states.append(jax.device_get(state))
        return external_rollout(envs, policy, state, key, length, sequence_length)

    def make_train(self, policy, taught_by=None, **changes):
        config = replace(CONFIG, policy=policy, **changes)
        return train.make_train(config, teacher=taught_by and replace(CONFIG, policy=taught_by))


@pytest.fixture
def host(monkeypatch):
    host = Host()
    monkeypatch.setattr(experience, "is_external", lambda name: True)
    monkeypatch.setattr(experience, "make_external", host.make_external)
    monkeypatch.setattr(experience, "external_rollout", host.external_rollout)
    return host


@pytest.mark.parametrize("policy", ["mam", "rec_mappo"])
def test_two_updates(host, policy):
    """Learning starts at ratio one, reaches every array, and goes on with its episodes."""
    trainer = host.make_train(policy)
    assert not host.made  # nothing is started before it is needed
    assert (trainer.spec, [envs.num_envs for envs in host.made]) == (
        Dice.spec,
        [NUM_SEEDS * 3],
    )  # for evaluating
    state = trainer.init(SEEDS)
    assert (
        trainer.compile(state).train_step is trainer.train_step
    )  # there is nothing to compile ahead
    before = jax.device_get(state.policy)
    for update in (1, 2):
        state, values = trainer.train_step(state)
        assert {np.shape(value) for value in values.values()} == {(NUM_SEEDS,)}
        assert all(np.isfinite(value).all() for value in values.values())
        assert values["first_ratio_deviation"].max() <= 1e-5
        np.testing.assert_array_equal(state.num_updates, update)
    adam = state.opt_state[1].inner_state[0]
    for path, square in jax.tree.leaves_with_path(adam.nu):
        assert (square > 0).reshape(NUM_SEEDS, -1).any(axis=1).all(), jax.tree_util.keystr(path)
    changed = jax.tree.map(lambda new, old: (new != old).any(), state.policy, before)
    assert np.mean(jax.tree.leaves(changed)) > 0.9
    spent = dict(trainer.clock.seconds)
    assert set(spent) == {"environment", "acting"}
    state, values = trainer.evaluate_step(state)
    assert trainer.clock.seconds == spent  # what is played is an evaluation as a whole
    assert values["episode_return"].shape == (NUM_SEEDS, 3)
    np.testing.assert_allclose(state.best_return, values["episode_return"].mean(axis=1), rtol=1e-6)
    absolute = trainer.absolute_metric(state)
    assert absolute["episode_return"].shape == absolute["return_even"].shape == (NUM_SEEDS, 5)
    assert "agent_return" not in absolute.keys() | values.keys()
    # The environments in which it learned were reset once.
    played, learned = host.made
    assert (len(learned.seeds), learned.num_envs, len(learned.actions)) == (1, NUM_SEEDS * 4, 2 * 6)
    assert host.states[0].reset.all()
    assert not host.states[1].reset.all()
    np.testing.assert_array_equal(
        host.states[1].reset, host.states[1].observation.agents_view[..., 0, 1] == 0
    )
    trainer.close()
    trainer.close()
    assert played.closed
    assert learned.closed


def test_a_resumed_run_starts_new_episodes(host):
    """Those of its first half cannot be saved; they are not the first half's once more either."""
    trainer = host.make_train("rec_mappo")
    state, _ = trainer.train_step(trainer.init(SEEDS))
    assert not state.actors.reset.all()
    resumed = host.make_train("rec_mappo")
    state, values = resumed.train_step(state)
    assert host.states[1].reset.all()
    assert (host.states[1].observation.agents_view[..., 1] == 0).all()
    assert values["first_ratio_deviation"].max() <= 1e-5
    first, second = (envs for envs in host.made if envs.num_envs == NUM_SEEDS * CONFIG.ppo.num_envs)
    assert len(first.seeds) == len(second.seeds) == 1
    assert first.seeds != second.seeds


def test_a_student_and_its_teacher_act_by_turns(host):
    """They remember the same steps, whoever acted, in processes as anywhere else."""
    half = DistillConfig(teacher_share=0.5, teacher_until=1.0)
    how = {"learn": "distill", "teacher": "unread", "distill": half}
    trainer = host.make_train("ippo", "rec_mappo", **how)
    state, losses = trainer.init(SEEDS), []
    state = replace(state, teacher=jax.tree.map(lambda x: x + 0.1, state.teacher))
    for _ in range(2):
        state, values = trainer.train_step(state)
        losses.append(values["teacher_kl"])
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(values["teacher_share"], 0.5, atol=0.01)
    assert not jax.tree.leaves(state.actors.memory.student)
    assert np.abs(jax.tree.leaves(state.actors.memory.teacher)[0]).max() > 0


def test_a_dataset_is_imitated_beside_ppo(host, tmp_path):
    """Of a policy with memory, in processes as anywhere else."""
    with Writer(tmp_path / "d", Dice.spec) as writer:
        record(Dice(2), Controller(lambda observation: np.array([1, 3]), Dice.spec), writer, 20)
    trainer = host.make_train("rec_mappo", data=str(tmp_path / "d"), agent_id="none")
    state, losses = trainer.init(SEEDS), []
    for _ in range(4):
        state, values = trainer.train_step(state)
        losses.append(values["cloning_loss"])
        assert values["first_ratio_deviation"].max() <= 1e-5
    assert (losses[-1] < 0.9 * losses[0]).all()
