"""Exported programs do what the policy does, for every kind of policy and of action."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

import mam
from mam.cli.main import main
from mam.config import NetworkConfig
from mam.deploy import export as exporting
from mam.deploy.example import Policy
from mam.deploy.formats import WRITERS
from mam.deploy.program import Program
from mam.envs.wrappers import agent_ids
from mam.errors import RunError, UserError
from mam.kernels.native.library import portable
from mam.learning.train import init_policy
from mam.types import Observation
from small_run import INDEPENDENT

pytestmark = pytest.mark.usefixtures("symbolic_sizes")

BATCH, STEPS = 3, 3
POLICIES = ("ippo", "mappo", "mam", "mam2", "mat", "sable", "rec_mappo", "rec_mam")
CASES = [
    *((policy, "discrete", "onnx") for policy in POLICIES),
    *(("mam", actions, "onnx") for actions in ("continuous", "components")),
    *(("ippo", image, "onnx") for image in ("cnn", "scan2d", "int16", "uint16", "int64")),
    *((policy, "discrete", "stablehlo") for policy in ("ippo", "rec_mam")),
    ("ippo", "int64", "stablehlo"),
]
IMAGES = {"cnn": "bool", "scan2d": "uint8", "int16": "int16", "uint16": "uint16", "int64": "int64"}


def make_policy(name, actions, num_agents=3):
    """Return a configuration, a task of odd sizes with ids, and a policy of random weights.

    What reads images, or their type, stands in place of `actions` where the task gives some.
    """
    kind = {"continuous": actions == "continuous"}
    if actions == "components":
        kind = {"action_components": (2, 3)}
    if actions in IMAGES:
        kind |= {"grid_shape": (9, 4, 2), "grid_dtype": IMAGES[actions]}
    spec = mam.EnvSpec("suite/task", num_agents, 16 + 4, 5, None, id_dim=16, **kind)
    image = "scan2d" if actions == "scan2d" else "cnn"
    network = NetworkConfig(d_model=8, d_state=2, image=image, image_width=4)
    config = replace(INDEPENDENT, policy=name, network=network, agent_id="sinusoid")
    return config, spec, init_policy(config, spec, key=jax.random.key(1))


def make_steps(spec):
    """Return observations with illegal actions and dead agents, resets and noise, [T, B, …]."""
    rng = np.random.default_rng(0)
    shape = (STEPS, BATCH, spec.num_agents)
    steps = {
        "agents_view": rng.normal(size=(*shape, spec.obs_dim - spec.id_dim)).astype(np.float32),
        "action_mask": rng.random((*shape, spec.num_actions)) < 0.7,
        "alive": rng.random(shape) < 0.8,
        "reset": rng.random(shape[:2]) < 0.3,
        "noise": rng.normal(size=(*shape, spec.num_actions)).astype(np.float32),
    }
    if spec.grid_shape is not None:
        steps["grid"] = rng.integers(0, 5, (*shape, *spec.grid_shape)).astype(spec.grid_dtype)
    steps["action_mask"][..., [0, 2]] = True  # of both components
    steps["reset"][0], steps["noise"][:, 0] = True, 0
    return steps


def write(program, kind, folder):
    """Write a program, and the part of its card that the example reads."""
    about = WRITERS[kind](program, folder)
    card = {"format": kind, **about, "inputs": exporting._ports(program, program.inputs)}
    (folder / "card.json").write_text(json.dumps(card))
    return Policy(folder)


@pytest.mark.parametrize(("name", "actions", "kind"), CASES)
def test_a_program_acts_as_its_policy(name, actions, kind, tmp_path):
    config, spec, policy = make_policy(name, actions)
    exported = write(Program.of(config, spec, policy), kind, tmp_path)
    steps, memory = make_steps(spec), policy.init_memory((BATCH,))
    act = jax.jit(type(policy).act_on_noise)
    ids = np.broadcast_to(agent_ids(3, "sinusoid"), (BATCH, 3, 16))
    for t in range(STEPS):
        now = {key: value[t] for key, value in steps.items()}
        view = np.concatenate([ids, now["agents_view"]], axis=-1)
        obs = Observation(view, now["action_mask"], now["alive"], now.get("grid"))
        memory, output = act(policy, memory, obs, now["reset"], now["noise"])
        action, log_prob, value = exported.act(**now)
        alive = now["alive"]
        np.testing.assert_allclose(action[alive], output.action[alive], atol=1e-5)
        np.testing.assert_allclose(log_prob[alive], output.log_prob[alive], atol=2e-5)
        np.testing.assert_allclose(value[alive], output.value[alive], atol=1e-5)


def by_place(obs):
    """Return keys of one environment's agents: those on the left first."""
    return obs.positions[..., 0]


def test_an_order_of_ones_own_reads_positions(tmp_path):
    config, spec, _ = make_policy("mam", "discrete")
    spec = replace(spec, position_dim=2)
    config = replace(config, network=replace(config.network, order="test_export:by_place"))
    policy = init_policy(config, spec, key=jax.random.key(1))
    exported = write(Program.of(config, spec, policy), "stablehlo", tmp_path)
    now = {key: value[0] for key, value in make_steps(spec).items()}
    places = np.random.default_rng(1).random((BATCH, 3, 2)).astype(np.float32)
    ids = np.broadcast_to(agent_ids(3, "sinusoid"), (BATCH, 3, 16))
    view = np.concatenate([ids, now["agents_view"]], axis=-1)
    obs = Observation(view, now["action_mask"], now["alive"], positions=places)
    memory = policy.init_memory((BATCH,))
    act = jax.jit(type(policy).act_on_noise)
    output = act(policy, memory, obs, now["reset"], now["noise"])[1]
    action, log_prob, _ = exported.act(**now, positions=places)
    alive = now["alive"]
    np.testing.assert_array_equal(action[alive], output.action[alive])
    np.testing.assert_allclose(log_prob[alive], output.log_prob[alive], atol=2e-5)


def test_the_example_refuses_what_it_would_misread(tmp_path):
    config, spec, policy = make_policy("rec_ippo", "scan2d")
    exported = write(Program.of(config, spec, policy), "onnx", tmp_path)
    now = {name: value[0] for name, value in make_steps(spec).items()}
    later = now | {"reset": np.zeros(BATCH, bool)}
    with pytest.raises(ValueError, match="at the first step, and of another batch, every reset"):
        exported.act(**later)
    exported.act(**now)
    exported.act(**later)
    with pytest.raises(ValueError, match="grid is uint8, got float32"):
        exported.act(**now | {"grid": now["grid"].astype(np.float32) / 255})
    unseen = np.where(now["alive"][..., None], now["agents_view"], np.nan)
    exported.act(**now)
    without = exported.act(**later)
    exported.act(**now)
    for one, other in zip(exported.act(**later | {"agents_view": unseen}), without, strict=True):
        np.testing.assert_array_equal(one[now["alive"]], other[now["alive"]])
    with pytest.raises(ValueError, match="agents_view holds numbers that are not finite"):
        exported.act(**now | {"agents_view": np.full_like(unseen, np.inf)})
    fewer = {name: value[:1] for name, value in later.items()}
    with pytest.raises(ValueError, match="of another batch, every reset is True"):
        exported.act(**fewer)
    assert len(exported.act(**{name: value[:1] for name, value in now.items()})[0]) == 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run, exported by the command, and what it said."""
    path = tmp_path_factory.mktemp("export") / "run"
    mam.train(INDEPENDENT, out=path)
    assert main(["export", str(path)]) == 0
    return path / "export-onnx"


def test_the_folder_says_what_it_holds(exported):
    card = json.loads((exported / "card.json").read_text())
    assert (card["format"], card["task"], card["algorithm"]) == ("onnx", "probe/matrix", "ippo")
    assert card["scores"].keys() == {"best_return", "absolute_metric"}
    assert card["verified"]["joint_actions"] >= 100
    names = [port["name"] for port in card["inputs"]]
    assert names == ["agents_view", "action_mask", "alive", "reset", "noise"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_mask": None}, r"^give agents_view, action_mask, alive, reset, noise; got"),
        ({"noise": np.zeros((2, 2, 7))}, r"^noise is \(2, 2, 3\), got \(2, 2, 7\)$"),
        (
            {"action_mask": np.full((2, 2, 3), -np.inf)},
            r"^action_mask holds -inf: expected 1 for True, 0 for False \(True = legal\)$",
        ),
        ({"alive": np.full((2, 2), "False")}, "^alive holds 'False': expected 1 for True"),
        ({"reset": np.array([1, np.nan])}, "^reset holds nan: expected 1 for True"),
        ({"noise": np.full((2, 2, 3), np.nan)}, "^noise holds numbers that are not finite$"),
    ],
)
def test_its_example_refuses_what_it_cannot_read(change, message, exported):
    policy = Policy(exported)
    shapes = {port["name"]: port["shape"] for port in policy.card["inputs"]}
    arrays = {name: np.ones((2, *shape)) for name, shape in shapes.items()} | change
    with pytest.raises(ValueError, match=message):
        policy.act(**{name: array for name, array in arrays.items() if array is not None})


def test_its_weights_come_back(exported, tmp_path):
    """Also as a format of its own."""
    weights = tmp_path / "weights"
    how = ["--format", "safetensors", "--out", str(weights)]
    assert main(["export", str(exported.parent), *how]) == 0
    policy = mam.load(exported.parent)
    views = np.zeros((5, policy.spec.num_agents, policy.spec.obs_dim), np.float32)
    for folder in (exported, weights):
        again = mam.load(folder)
        np.testing.assert_array_equal(again.act(views), mam.load(exported.parent).act(views))
        assert again.metadata == policy.metadata
    (weights / "weights.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="is damaged, or of a later version"):
        mam.load(weights)


def test_an_existing_folder_stays(exported, capsys):
    assert main(["export", str(exported.parent)]) == 2
    assert "exists: choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["action", "log_prob"])
def test_a_program_that_does_something_else_is_no_success(name, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "other")
    assert "128 joint actions: 0 differ" in exporting.verify(folder, "onnx")
    with np.load(folder / "recorded.npz") as arrays:
        recorded = dict(arrays)
    recorded[name][-1, -1, -1] += 1
    np.savez(folder / "recorded.npz", **recorded)
    with pytest.raises(RunError, match="the export was not kept, its example fails: 128 joint"):
        exporting.verify(folder, "onnx")


@pytest.mark.parametrize("name", ["mam", "mam2"])
def test_a_portable_program_chooses_by_no_platform(name):
    config, spec, policy = make_policy(name, "discrete")
    program = Program.of(config, spec, policy)
    arrays = [port.struct(2) for port in program.inputs]
    with portable():
        text = str(jax.make_jaxpr(lambda *arrays: program(*arrays))(*arrays))
    assert "platform_index" not in text
    assert "ffi_call" not in text
