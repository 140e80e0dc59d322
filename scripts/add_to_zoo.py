"""Adds the best policies of finished runs to the zoo.

python scripts/add_to_zoo.py RUN…

A policy of the same task and algorithm is replaced. What is there is tested by
tests/runs/test_zoo.py, its score included.
"""

import json
import shutil
import sys
from pathlib import Path

import mam
from mam.deploy.export import export
from mam.errors import UserError
from mam.runs.files import read_object
from mam.runs.zoo import INDEX, ROOT, checksums


def add(run: str) -> str:
    policy = mam.load(run)
    if "absolute_metric" not in policy.metadata["scores"]:
        raise UserError(f"{run} is not finished: it has no absolute metric")
    name = f"{policy.config.env}/{policy.config.algorithm}"
    shutil.rmtree(ROOT / name, ignore_errors=True)
    export(policy, ROOT / name, "safetensors")
    index = read_object(ROOT / INDEX) | {name: checksums(ROOT / name)}
    (ROOT / INDEX).write_text(json.dumps(dict(sorted(index.items())), indent=2) + "\n")
    return name


if __name__ == "__main__":
    for run in map(Path, sys.argv[1:]):
        print(f"zoo:{add(str(run))}")
