"""What blocks read, put out and mix, against the policy they are of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mam.config import NetworkConfig
from mam.errors import UserError
from mam.networks.inside import activations, block_outputs, mixing_matrices
from mam.networks.policy import make_policy
from mam.types import EnvSpec, Observation

SPEC = EnvSpec("own/task", num_agents=3, obs_dim=4, num_actions=5, time_limit=None)
NETWORK = NetworkConfig(d_model=8, num_heads=2, num_blocks=2, d_state=2)
ORDER = jnp.array([[1, 2, 0], [2, 0, 1]])


def make(name):
    policy = make_policy(name, SPEC, NETWORK, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(policy)
    moved = [x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(tree, moved)


def look(name):
    """Two steps: in the second one agent is dead."""
    rng = np.random.default_rng(1)
    alive = jnp.array([[True, True, True], [True, False, True]])
    view = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    obs = Observation(view, jnp.ones((2, 3, 5), bool), alive)
    action = jnp.asarray(rng.integers(5, size=(2, 3)), jnp.int32)
    seen = (obs, action, ORDER, jnp.zeros(2, bool))

    @jax.jit
    def run(policy):
        memory = policy.init_memory((2,))
        read = activations(policy, memory, *seen)
        outputs = block_outputs(policy, read)
        return read, outputs, mixing_matrices(policy, read), policy.evaluate(memory, *seen)

    policy = make(name)
    return policy, *run(policy)


@pytest.mark.parametrize("name", ["mam", "mat"])
def test_blocks_follow_each_other_to_what_the_policy_says(name):
    policy, read, outputs, matrices, evaluated = look(name)
    living = np.asarray(read.alive)
    following = (read.encoder[1], read.obs_rep, read.decoder[1])
    for output, after in zip(outputs[:3], following, strict=True):
        np.testing.assert_allclose(output[living], after[living], rtol=1e-5, atol=1e-5)
    value = np.take_along_axis(evaluated.value, np.asarray(ORDER), -1)
    made = policy.encoder.values(read.obs_rep)
    np.testing.assert_allclose(made[living], value[living], rtol=1e-4, atol=1e-5)
    logits = jax.nn.log_softmax(policy.decoder.head(outputs[-1]))
    said = np.take_along_axis(evaluated.distribution, np.asarray(ORDER)[..., None], -2)
    np.testing.assert_allclose(logits[living], said[living], rtol=1e-4, atol=1e-4)
    heads = 2 if name == "mat" else 16
    assert {key: x.shape for key, x in matrices.items()} == {
        f"{part} {block}": (2, heads, 3, 3)
        for part in ("encoder", "decoder", "cross")
        for block in (1, 2)
    }
    for x in matrices.values():  # nobody takes anything of the dead, who come last
        np.testing.assert_array_equal(x[1, :, :2, 2], 0)


def test_only_mixers_of_one_step_are_looked_into():
    with pytest.raises(UserError, match="only sequence policies"):
        look("ippo")
    with pytest.raises(UserError, match="remember earlier environment steps"):
        look("sable")
