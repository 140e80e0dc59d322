"""Play recorded.npz with the exported policy, and compare with what was recorded.

Needs NumPy, and onnxruntime or JAX: what card.json calls the format. Nothing of mam.
"""

import json
import sys
from pathlib import Path

import numpy as np


class Policy:
    """The policy in a folder: observations in, actions out; it remembers what it needs to."""

    def __init__(self, folder):
        self.card = json.loads((Path(folder) / "card.json").read_text())
        self.memory: list | None = None
        program = Path(folder) / self.card["program"]
        if self.card["format"] == "onnx":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1  # the arrays are small
            session = onnxruntime.InferenceSession(program, options)
            self.run = lambda arrays: session.run(None, arrays)
        else:
            import jax
            from jax import export

            call = jax.jit(export.deserialize(bytearray(program.read_bytes())).call)
            self.run = lambda arrays: [np.asarray(x) for x in call(*arrays.values())]

    def act(self, **arrays):
        """Return actions, log-probabilities and values; inputs are those of the card, [B, …]."""
        given, ports = set(arrays), self.card["inputs"]
        ports, kept = [p for p in ports if not p["memory"]], [p for p in ports if p["memory"]]
        if given != {p["name"] for p in ports}:
            raise ValueError(f"give {', '.join(p['name'] for p in ports)}; got {sorted(given)}")
        batch = np.shape(arrays["alive"])[:1]
        for p in ports:
            array = np.asarray(arrays[p["name"]])
            if array.shape != (shape := (*batch, *p["shape"])):
                raise ValueError(f"{p['name']} is {shape}, got {array.shape}")
            if array.dtype.kind == "f" and np.dtype(p["dtype"]).kind in "iu":
                raise ValueError(f"{p['name']} is {p['dtype']}, got {array.dtype}")
            if p["dtype"] == "bool" and (odd := array[(array != 0) & (array != 1)]).size:
                told = f"{p['name']} holds {odd.tolist()[0]!r}: expected 1 for True, 0 for False"
                raise ValueError(f"{told} ({p['about']})")
        feed = {p["name"]: np.asarray(arrays[p["name"]], p["dtype"]) for p in ports}
        floats = {name: array for name, array in feed.items() if array.dtype.kind == "f"}
        for name, array in floats.items():  # what the dead see may be anything
            if not np.isfinite(array if name == "state" else array[feed["alive"]]).all():
                raise ValueError(f"{name} holds numbers that are not finite")
        if self.memory is None or {np.shape(memory)[:1] for memory in self.memory} - {batch}:
            if not feed["reset"].all():
                raise ValueError("at the first step, and of another batch, every reset is True")
            self.memory = [np.zeros((*batch, *p["shape"]), p["dtype"]) for p in kept]
        feed |= {p["name"]: memory for p, memory in zip(kept, self.memory, strict=True)}
        action, log_prob, value, *self.memory = self.run(feed)
        return action, log_prob, value


if __name__ == "__main__":
    folder = Path(__file__).parent
    policy, recorded = Policy(folder), np.load(folder / "recorded.npz")
    names = [p["name"] for p in policy.card["inputs"] if not p["memory"]]
    steps = [
        policy.act(**{name: recorded[name][t] for name in names})
        for t in range(len(recorded["alive"]))
    ]
    action, log_prob, _ = (np.stack(arrays) for arrays in zip(*steps, strict=True))
    wrong = np.abs(action - recorded["action"]) > policy.card["verified"]["action_tolerance"]
    off = np.abs(log_prob - recorded["log_prob"]) / recorded["log_prob_tolerance"]
    count = int(np.prod(recorded["reset"].shape))
    print(f"{count} joint actions: {int(wrong.sum())} differ, log-probs at {off.max():.2g} of 1e-5")
    sys.exit(bool(wrong.any() or not off.max() <= 1))
