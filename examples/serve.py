"""Serve an exported policy on this machine: python examples/serve.py runs/first/export-onnx."""

import asyncio
import runpy
import sys
import uuid

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException


def make_app(folder: str, wait: float = 0.002, max_sessions: int = 10_000) -> FastAPI:
    """Return an application: a session plays one environment; acts within `wait` are one batch."""
    policy = runpy.run_path(f"{folder}/example.py")["Policy"](folder)
    ports = [p for p in policy.card["inputs"] if not p["memory"] and p["name"] != "reset"]
    blank = [np.zeros(p["shape"], p["dtype"]) for p in policy.card["inputs"] if p["memory"]]
    app, waiting, busy, counts = FastAPI(), {}, set(), {"requests": 0, "batches": 0}
    sessions = {}  # what each remembers; None before its first step

    def read(port: dict, given: dict) -> np.ndarray:
        name, shape = port["name"], tuple(port["shape"])
        if name not in given and name == "noise":  # without, the most likely action
            return np.zeros(shape, np.float32)
        try:
            array, raw = np.array(given[name], port["dtype"]), np.asarray(given[name])
        except (KeyError, ValueError, TypeError, OverflowError):
            raise HTTPException(422, f"give {name}, {port['dtype']} {shape}") from None
        if array.dtype.kind in "iu" and raw.dtype.kind == "f":
            raise HTTPException(422, f"{name} is {port['dtype']}, got fractions")
        if array.dtype == bool and (odd := raw[(raw != 0) & (raw != 1)]).size:
            told = f"{name} holds {odd.tolist()[0]!r}: expected 1 for True, 0 for False"
            raise HTTPException(422, told)
        if array.shape != shape or not np.isfinite(array).all():
            raise HTTPException(422, f"{name} is finite and {shape}, got {array.shape}")
        return array

    async def run() -> None:
        await asyncio.sleep(wait)
        while waiting:  # those that came while the batch before was computed
            batch = dict(waiting)
            waiting.clear()
            arrays = {p["name"]: np.stack([i[0][p["name"]] for i in batch.values()]) for p in ports}
            before = [sessions[name] for name in batch]
            policy.memory = [np.stack(m) for m in zip(*(m or blank for m in before), strict=True)]
            first = np.array([m is None for m in before])
            try:
                action, *_ = await asyncio.to_thread(policy.act, **arrays, reset=first)
            except Exception as error:  # all who wait are told; their sessions go on as they were
                busy.difference_update(batch)
                for _, answer in batch.values():
                    answer.set_exception(HTTPException(500, f"the policy raised {error!r}"))
                continue
            for k, (name, (_, answer)) in enumerate(batch.items()):
                sessions[name] = [leaf[k] for leaf in policy.memory]
                busy.discard(name)
                answer.set_result(action[k].tolist())
            counts["batches"] += 1

    def check(name: str) -> None:
        if name not in sessions:
            raise HTTPException(404, "no such session: POST /sessions begins one")
        if name in busy:
            raise HTTPException(409, "this session waits for an action: one at a time")

    @app.get("/health")
    async def health() -> dict:
        return {"task": policy.card["task"], "inputs": ports}

    @app.get("/metrics")
    async def metrics() -> dict:
        return counts | {"sessions": len(sessions)}

    @app.post("/sessions", status_code=201)
    async def begin() -> dict:
        if len(sessions) >= max_sessions:
            raise HTTPException(429, f"there are {max_sessions} sessions: end one")
        sessions[name := uuid.uuid4().hex] = None
        return {"session": name}

    @app.delete("/sessions/{name}", status_code=204)
    async def end(name: str) -> None:
        check(name)
        del sessions[name]

    @app.post("/sessions/{name}/act")
    async def act(name: str, given: dict) -> dict:
        check(name)
        arrays = {p["name"]: read(p, given) for p in ports}
        if not busy:
            app.state.task = asyncio.create_task(run())
        busy.add(name)
        waiting[name] = arrays, (answer := asyncio.get_running_loop().create_future())
        counts["requests"] += 1
        return {"action": await answer}

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1]), host="127.0.0.1", port=8000)
