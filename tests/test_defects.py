"""Ten defects of public implementations that this one must not have, and the tests that would find each.

 defect                                     tests
 1  agents shuffled, log-probabilities not  contracts/test_training_contract::test_every_update_starts_at_ratio_one
                                            contracts/test_policy_contract::test_evaluate_repeats_act
                                            learning/test_update::test_steps_metrics_and_the_first_ratio_deviation
 2  a time limit treated as termination     learning/test_advantages::test_a_time_limit_is_bootstrapped_a_termination_is_not
                                            learning/test_train::test_advantages_are_bootstrapped_from_the_true_successor
 3  the decoder recomputed for every agent  here
 4  evaluating the weights of before        learning/test_train::test_evaluation_is_of_the_current_weights
                                            learning/test_train::test_the_evaluation_after_an_update_is_of_what_it_learned
 5  dead parameters                         contracts/test_training_contract::test_every_parameter_learns
                                            contracts/test_policy_contract::test_no_parameter_is_dead
                                            contracts/test_mixer_contract::test_no_parameter_is_dead
 6  one key for all agents                  networks/test_actions::test_noise_belongs_to_the_agent
                                            contracts/test_policy_contract::test_joint_actions_are_as_frequent_as_evaluated
 7  step and parallel form that differ      contracts/test_mixer_contract::test_step_equals_parallel
                                            contracts/test_policy_contract::test_evaluate_repeats_act
 8  dead agents trained on                  learning/test_ppo::test_the_dead_contribute_nothing
                                            contracts/test_policy_contract::test_appended_dead_agents_change_nothing
                                            networks/test_embed::test_what_dead_agents_see_goes_nowhere
 9  memory not reset, or one step off       learning/test_rollout::test_memory_counts_from_the_first_step_of_every_episode
                                            learning/test_evaluate::test_every_episode_equals_one_played_by_hand
                                            learning/test_external::test_memory_counts_from_the_first_step_of_every_episode
                                            networks/test_memory::test_memory_is_that_of_the_episode_exactly
                                            contracts/test_policy_contract::test_evaluate_repeats_act_over_time
10  resuming without the optimiser's state  learning/test_train::test_resuming_equals_going_on
                                            runs/test_loop::test_a_stopped_and_resumed_run_equals_an_uninterrupted_one
"""  # noqa: E501

import math
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from mam.config import NetworkConfig
from mam.kernels.native.library import without_native
from mam.networks.policy import make_policy, policies
from mam.networks.sequence import SequencePolicy
from mam.types import EnvSpec, Observation
from named_tests import check_named_tests

NUM_ACTIONS, BATCH = 5, 3


def work(jaxpr):
    """Multiplications in a program's matrix products, all branches counted, times loop turns."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += math.prod(shape[axis] for axis in contracted) * math.prod(
                equation.outvars[0].aval.shape
            )
        assert equation.primitive.name != "while", "turns unknown"
        inner = sum(work(sub) for sub in jaxprs_in_params(equation.params))
        total += inner * equation.params.get("length", 1)
    return total


def setup(name, num_agents):
    spec = EnvSpec("suite/task", num_agents, obs_dim=4, num_actions=NUM_ACTIONS, time_limit=10)
    sizes = NetworkConfig(d_model=64)
    policy = jax.eval_shape(lambda key: make_policy(name, spec, sizes, key=key), jax.random.key(0))
    shape = (BATCH, num_agents)
    obs = Observation(
        jnp.zeros((*shape, 4)), jnp.ones((*shape, NUM_ACTIONS), bool), jnp.ones(shape, bool)
    )
    return policy, obs


@cache
def work_of_acting(name, num_agents):
    def act(policy, key):
        memory = policy.init_memory((BATCH,))
        return policy.act(memory, obs, jnp.zeros(BATCH, bool), jax.random.split(key, BATCH))

    policy, obs = setup(name, num_agents)
    with without_native():  # what happens within a call of a library is not seen
        return work(jax.make_jaxpr(act)(policy, jax.random.key(0)).jaxpr)


@cache
def work_of_recomputing(name, num_agents):
    """What acting would take if every agent's logits came out of the whole decoder."""

    def act(policy):
        obs_rep = jnp.zeros((BATCH, num_agents, 64))
        decide = lambda action, _: (  # noqa: E731
            policy.decoder(action, obs_rep).argmax(-1).astype(jnp.int32),
            None,
        )
        return jax.lax.scan(decide, jnp.zeros((BATCH, num_agents), jnp.int32), length=num_agents)

    policy, _ = setup(name, num_agents)
    return work(jax.make_jaxpr(act)(policy).jaxpr)


@pytest.mark.parametrize("name", policies())
def test_acting_never_recomputes_the_decisions_of_earlier_agents(name):
    """Defect 3. Twice the agents are twice the work, not four times: what is quadratic is small."""
    few, many = 10, 20
    growth = work_of_acting(name, many) / work_of_acting(name, few)
    assert 1.9 < growth < 2.2 if isinstance(setup(name, few)[0], SequencePolicy) else growth == 2
    policy, _ = setup(name, many)
    if isinstance(policy, SequencePolicy):
        assert work_of_recomputing(name, many) > 3.8 * work_of_recomputing(name, few)
        assert work_of_acting(name, many) < work_of_recomputing(name, many) / 5


def test_the_table_names_tests_that_exist():
    assert check_named_tests(__doc__) == 24
