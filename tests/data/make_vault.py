"""Writes vault.tar.gz, a small Vault as OG-MARL's are laid out: `python tests/data/make_vault.py`.

Three episodes of two agents with three actions: terminated after 3 steps, truncated after 2, one
in which an agent ends before the other; and a step of a fourth that does not end.
"""

import json
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import tensorstore as ts

LENGTHS = (3, 2, 4)
MOST_STEPS = int(10e12)  # the length of a Vault's time axis, most of which is never written


def experience():
    """The leaves of the experience tree, [1, T, …]."""
    rng, num_steps = np.random.default_rng(0), sum(LENGTHS) + 1
    terminals, truncations = np.zeros((2, num_steps, 2), np.float32)
    terminals[2], truncations[4], terminals[7, 0], terminals[8] = 1, 1, 1, 1
    legals = rng.random((num_steps, 2, 3)) < 0.7
    legals[..., 0] = True
    leaves = {
        "observations": rng.normal(size=(num_steps, 2, 4)).astype(np.float32),
        "actions": np.where(legals[..., 2], 2, 0).astype(np.int64),
        "rewards": np.repeat(rng.integers(0, 3, (num_steps, 1)), 2, axis=1).astype(np.float32),
        "terminals": terminals,
        "truncations": truncations,
        "infos.legals": legals.astype(np.float32),
        "infos.state": rng.normal(size=(num_steps, 5)).astype(np.float32),
    }
    return {name: x[None] for name, x in leaves.items()}


def write(folder):
    folder.mkdir(parents=True)
    leaves = experience()
    nested = [{}, {}]
    for name, x in leaves.items():
        for tree, value in zip(nested, (str(x.shape), x.dtype.name), strict=True):
            *groups, last = name.split(".")
            for group in groups:
                tree = tree.setdefault(group, {})
            tree[last] = value
    metadata = {"version": 1.2, "structure_shape": nested[0], "structure_dtype": nested[1]}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    for name, x in {**{f"{k}.": v for k, v in leaves.items()}, "vault_index": None}.items():
        store = {"driver": "ocdbt", "base": f"file://{folder.absolute()}", "path": name}
        asked = {"driver": "zarr", "kvstore": store, "metadata": {}}
        if x is None:
            index = ts.open(asked, dtype=ts.int32, shape=(1,), create=True).result()
            index.write(np.array([sum(LENGTHS) + 1], np.int32)).result()
            continue
        asked["metadata"]["compressor"] = {"id": "gzip", "level": 5}
        shape = (1, MOST_STEPS, *x.shape[2:])
        array = ts.open(asked, dtype=x.dtype.name, shape=shape, create=True).result()
        array[:, : x.shape[1]].write(x).result()


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "vault.tar.gz")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "sample.vlt" / "Good"
        write(folder)
        with tarfile.open(target, "w:gz") as file:
            file.add(folder.parent, "sample.vlt")
