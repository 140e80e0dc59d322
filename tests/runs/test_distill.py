"""Runs that distill earlier ones."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from mam.cli.main import read_options
from mam.config import Config, DistillConfig, EvalConfig, NetworkConfig, PPOConfig
from mam.envs.probes import Identity
from mam.errors import UserError
from mam.learning.normalise import as_normalised
from mam.learning.train import make_train
from mam.runs import loop
from mam.runs.initial import started_from
from mam.runs.load import load_weights

CONFIG = Config(
    policy="ippo",
    env="probe/identity",
    agent_id="none",
    total_timesteps=30 * 128,
    network=NetworkConfig(d_model=16, d_state=2),
    ppo=PPOConfig(num_envs=16, rollout_length=8, num_epochs=4, num_minibatches=2, lr=0.01),
    eval=EvalConfig(num_evaluations=2, num_episodes=32, num_absolute_episodes=64, both_modes=False),
)


def trained(config, path, **how):
    folder, trainer = loop.start(config, path)
    return loop.run(config, folder, trainer, **how), folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    outcome, folder = trained(CONFIG, tmp_path_factory.mktemp("runs") / "teacher")
    assert outcome == "finished"
    return folder


def distilling(teacher, **changes):
    return replace(CONFIG, learn="distill", teacher=str(teacher.path), **changes)


def absolute(folder):
    (record,) = [record for record in folder.records() if record.kind == "absolute"]
    return record.values["episode_return"].mean()


def test_a_student_of_another_family_does_what_its_teacher_does(teacher, tmp_path):
    """In a third of the steps, of a task whose optimum is known."""
    config = distilling(teacher, policy="mam", total_timesteps=10 * 128)
    outcome, folder = trained(config, tmp_path / "student")
    assert outcome == "finished"
    assert absolute(teacher) >= 0.95 * Identity().optimal_return
    assert absolute(folder) >= 0.95 * absolute(teacher)
    assert load_weights(folder.path).config.algorithm == "mam-distill"


def test_a_distilling_run_is_a_run(teacher, tmp_path):
    """Stopped and resumed it equals one that was not, and does not read its teacher again."""
    source = shutil.copytree(teacher.path, tmp_path / "teacher")
    config = replace(distilling(teacher, total_timesteps=4 * 128), teacher=str(source))
    outcome, folder = trained(config, tmp_path / "whole")
    assert outcome == "finished"

    class Stop(loop.Callback):
        def on_update(self, event):
            return event.update == 2

    outcome, parts = trained(config, tmp_path / "parts", callbacks=[Stop()])
    assert outcome == "stopped"
    shutil.rmtree(source)
    assert loop.run(config, *loop.resume(parts.path, config)) == "finished"
    one, other = (
        jax.tree.map(
            lambda x: (
                jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            ),
            run.load_state(config, make_train(config, teacher=CONFIG)),
        )
        for run in (folder, parts)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_every_seed_is_taught_by_the_best_weights_and_takes_their_units(teacher):
    config = distilling(teacher, num_seeds=2, policy="rec_ippo")
    state = started_from(config, make_train(config, teacher=CONFIG)).init(np.arange(2))
    best = load_weights(teacher.path).policies
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), best)
    jax.tree.map(np.testing.assert_array_equal, state.teacher, twice)
    ours, theirs = (as_normalised(one).statistics for one in (state.policy, state.teacher))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert (ours.values.count > 0).all()


def test_settings_start_from_the_teachers(teacher):
    path = str(teacher.path)
    options = read_options("distill", [path, "--policy", "mam2", "--out", "somewhere"])
    assert options.config == replace(CONFIG, learn="distill", teacher=path, policy="mam2")
    with pytest.raises(UserError, match="distill needs the folder of a run: mam distill RUN"):
        read_options("distill", ["--policy", "mam2"])


def test_a_teacher_of_another_task_or_with_other_ids_is_refused(teacher):
    config = distilling(teacher, agent_id="one_hot")
    with pytest.raises(UserError, match="sees --agent-id none: take it, too, instead of one_hot"):
        started_from(config, make_train(config, teacher=CONFIG))
    config = distilling(teacher, env="probe/matrix")
    with pytest.raises(UserError, match="was trained on probe/identity and cannot play"):
        started_from(config, make_train(config, teacher=CONFIG))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """A run of a sequence policy that has learned next to nothing."""
    config = replace(CONFIG, policy="mat", total_timesteps=128)
    return trained(config, tmp_path_factory.mktemp("runs") / "transformer")[1]


STAGED = DistillConfig(hidden_updates=1)


def test_a_student_whose_mixers_are_aligned_has_the_rest_of_its_teacher(transformer):
    config = distilling(transformer, policy="mam2", distill=STAGED)
    trainer = make_train(config, teacher=transformer.load_config())
    state = started_from(config, trainer).init(np.arange(1))
    student, teacher = (as_normalised(one).network for one in (state.policy, state.teacher))
    for part in ("embed", "memory", "distribution"):
        jax.tree.map(np.testing.assert_array_equal, getattr(student, part), getattr(teacher, part))
    (ours,), (theirs,) = student.decoder.blocks, teacher.decoder.blocks
    jax.tree.map(np.testing.assert_array_equal, ours.mlp, theirs.mlp)
    jax.tree.map(np.testing.assert_array_equal, student.decoder.head, teacher.decoder.head)
    assert type(ours.mixer) is not type(theirs.mixer)


@pytest.mark.parametrize("of_student", [True, False])
def test_blocks_are_aligned_whoever_has_a_critic_of_its_own(of_student, transformer, tmp_path):
    pooled, config = replace(CONFIG.network, critic="pooled"), transformer.load_config()
    teacher = transformer
    if not of_student:
        config = replace(config, network=pooled)
        teacher = trained(config, tmp_path / "teacher")[1]
    network = pooled if of_student else CONFIG.network
    student = distilling(teacher, policy="mam2", network=network, distill=STAGED)
    trainer = make_train(student, teacher=config)
    state = started_from(student, trainer).init(np.arange(1))
    _, metrics = trainer.train_step(state)
    assert np.isfinite(metrics["hidden_distance"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "ippo"}, "between sequence policies: neither may be independent"),
        (
            {"network": replace(CONFIG.network, d_model=8, num_blocks=2)},
            "as many: network.d_model is 8 instead of 16, the number of encoder blocks is 2",
        ),
        ({"network": replace(CONFIG.network, memory="gru")}, "as many: .*memory"),
    ],
)
def test_a_student_that_cannot_be_aligned_is_told_what_differs(transformer, changes, message):
    config = distilling(transformer, **{"policy": "mam2", "distill": STAGED} | changes)
    with pytest.raises(UserError, match=message):
        started_from(config, make_train(config, teacher=transformer.load_config()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn": "distill"}, "--learn distill learns from a run: give --teacher, its folder"),
        (
            {"learn": "bc", "data": "data/a", "teacher": "runs/a"},
            "--learn bc does not learn from a run: drop --teacher",
        ),
        ({"teacher": "runs/a", "distill": DistillConfig(hidden_updates=1)}, "belong to --learn"),
        (
            {"distill": DistillConfig(teacher_share=1.5)},
            r"teacher_share must lie in \[0, 1\]",
        ),
        (
            {"distill": DistillConfig(teacher_until=0.0)},
            r"teacher_until must lie in \(0, 1\]",
        ),
        ({"distill": DistillConfig(value_coef=-1.0)}, "distill.value_coef must not be negative"),
    ],
)
def test_settings_that_no_run_could_have(changes, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes)
