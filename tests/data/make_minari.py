"""Writes minari.tar.gz, datasets that Minari itself writes: `python tests/data/make_minari.py`.

Three episodes of two agents, terminated after 3 steps, truncated after 2, and cut off after 4: in
`choices` they choose under masks, in `reals` they act by real numbers, and `alone` is of one agent.
Takes `pip install minari h5py` (0.5.4 wrote what is here).
"""

import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from gymnasium import spaces

LENGTHS = (3, 2, 4)
AGENTS = ("left", "right")
VIEW = spaces.Box(-10, 10, (4,), np.float32)
MASKED = spaces.Dict({"observation": VIEW, "action_mask": spaces.Box(0, 1, (3,), np.int8)})
CHOICES = (MASKED, spaces.Discrete(3, start=1))
REALS = (VIEW, spaces.Box(np.float32([-1, 0]), np.float32([3, 2])))


def episodes(view, action):
    """What happens, as Minari's buffers have it, the same at every call."""
    rng, found = np.random.default_rng(0), []
    for kind, length in enumerate(LENGTHS):

        def view_of(length=length):
            vector = rng.normal(size=(length + 1, 4)).astype(np.float32)
            if view is VIEW:
                return vector
            legal = (rng.random((length + 1, 3)) < 0.7).astype(np.int8)
            legal[:, 0] = 1
            return {"observation": vector, "action_mask": legal}

        last = np.arange(length) == length - 1
        reals = isinstance(action, spaces.Box)
        found.append(
            {
                "observations": {name: view_of() for name in AGENTS},
                "actions": {
                    name: rng.uniform(0, 2, (length, 2)).astype(np.float32)
                    if reals
                    else np.ones(length, np.int64)
                    for name in AGENTS
                },
                "rewards": rng.integers(0, 3, length).astype(np.float64),
                "terminations": last & (kind == 0),
                "truncations": last & (kind == 1),
            }
        )
    return found


def write(root):
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    import minari
    from minari.data_collector import EpisodeBuffer

    for name, (view, action) in {"choices": CHOICES, "reals": REALS, "alone": REALS}.items():
        joint = [spaces.Dict(dict.fromkeys(AGENTS, one)) for one in (view, action)]
        found = episodes(view, action)
        if name == "alone":
            joint = [view, action]
            for one in found:
                one |= {key: one[key]["left"] for key in ("observations", "actions")}
        minari.create_dataset_from_buffers(
            f"own/{name}-v0",
            [EpisodeBuffer(**one) for one in found],
            observation_space=joint[0],
            action_space=joint[1],
            data_format="hdf5",
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch))
        with tarfile.open(Path(__file__).parent / "minari.tar.gz", "w:gz") as file:
            file.add(Path(scratch, "own"), "own")
