"""The example server: what it answers is what the policy does, however requests come together."""

import asyncio
import json
import runpy
from pathlib import Path

import httpx
import numpy as np
import pytest
from test_export import make_policy, make_steps, write

from mam.deploy import export as exporting
from mam.deploy.program import Program

SESSIONS, STEPS = 8, 3


@pytest.fixture
def folder(tmp_path, symbolic_sizes):
    """An exported policy with memory."""
    write(Program.of(*make_policy("rec_mappo", "discrete")), "onnx", tmp_path)
    card = json.loads((tmp_path / "card.json").read_text()) | {"task": "suite/task"}
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "example.py").write_bytes(
        Path(exporting.__file__).with_name("example.py").read_bytes()
    )
    return tmp_path


def client(folder, **how):
    make_app = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "serve.py"))["make_app"]
    transport = httpx.ASGITransport(make_app(str(folder), **how))
    return httpx.AsyncClient(transport=transport, base_url="http://here")


def observation(seed):
    """Return what one session sees at every step, as JSON takes it."""
    steps = make_steps(make_policy("ippo", "discrete")[1])
    rng = np.random.default_rng(seed)
    names = ("agents_view", "action_mask", "alive")
    return [
        {name: rng.permutation(steps[name][t, 0]).tolist() for name in names} for t in range(STEPS)
    ]


async def play(http, seed):
    session = (await http.post("/sessions")).json()["session"]
    return [
        (await http.post(f"/sessions/{session}/act", json=seen)).json()["action"]
        for seen in observation(seed)
    ]


def test_concurrent_sessions_act_as_each_by_itself(folder):
    async def together():
        async with client(folder, wait=0.05) as http:
            played = await asyncio.gather(*(play(http, seed) for seed in range(SESSIONS)))
            return played, (await http.get("/metrics")).json()

    async def alone(seed):
        async with client(folder, wait=0) as http:
            return await play(http, seed)

    played, metrics = asyncio.run(together())
    assert played == [asyncio.run(alone(seed)) for seed in range(SESSIONS)]
    assert (metrics["requests"], metrics["sessions"]) == (SESSIONS * STEPS, SESSIONS)
    assert metrics["batches"] < SESSIONS * STEPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_mask": None}, "give action_mask, bool (3, 5)"),
        ({"alive": [True]}, "alive is finite and (3,), got (1,)"),
        ({"agents_view": [[0.0] * 4] * 2}, "agents_view is finite and (3, 4), got (2, 4)"),
        ({"noise": "loud"}, "give noise, float32 (3, 5)"),
        ({"action_mask": [[0, -1e9, 0, 0, 0]] * 3}, "action_mask holds -1000000000.0: expected 1"),
        ({"alive": ["False"] * 3}, "alive holds 'False': expected 1 for True, 0 for False"),
        ({"alive": [1, 1, None]}, "alive holds None: expected 1 for True, 0 for False"),
    ],
)
def test_what_cannot_be_read_is_a_clear_422(change, message, folder):
    async def ask():
        async with client(folder, max_sessions=1) as http:
            session = (await http.post("/sessions")).json()["session"]
            given = {k: v for k, v in (observation(0)[0] | change).items() if v is not None}
            answer = await http.post(f"/sessions/{session}/act", json=given)
            codes = [(await http.post(path)).status_code for path in ("/sessions",)]
            codes += [(await http.delete(f"/sessions/{n}")).status_code for n in (session, "x")]
            return answer, codes, (await http.get("/health")).json()

    answer, codes, health = asyncio.run(ask())
    assert (answer.status_code, codes) == (422, [429, 204, 404])
    assert message in answer.json()["detail"]
    assert health["task"] == "suite/task"


def test_a_policy_that_raises_answers_everyone(folder):
    with (folder / "example.py").open("a") as file:
        file.write("\nPolicy.act = lambda self, **arrays: 1 / 0\n")

    async def ask():
        async with client(folder) as http:
            session = (await http.post("/sessions")).json()["session"]
            ask = [http.post(f"/sessions/{session}/act", json=observation(0)[0]) for _ in range(2)]
            return [await one for one in ask]

    for answer in asyncio.run(ask()):
        assert answer.status_code == 500
        assert "ZeroDivisionError" in answer.json()["detail"]
