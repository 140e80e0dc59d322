"""Files that anyone may have written: one line each, and nothing hangs."""

import json
import os
from pathlib import Path

import pytest

from mam.config import Config, to_json
from mam.errors import UserError
from mam.runs.files import read_config, read_object

CONTENTS = {
    "empty": (b"", "is damaged"),
    "cut": (b'{"seed": ', "is damaged"),
    "list": (b"[]", "expected a JSON object, got list"),
    "null": (b"null", "expected a JSON object, got NoneType"),
    "number": (b"3", "expected a JSON object, got int"),
    "string": (b'"text"', "expected a JSON object, got str"),
    "nested beyond the parser": (b"[" * 100_000, "nested more than 32 deep"),
    "nested": (b'{"a":' * 40 + b"1" + b"}" * 40, "nested more than 32 deep"),
    "many digits": (b'{"seed": ' + b"9" * 400 + b"}", "a number of 400 digits"),
    "20 digits": (b'{"num_seeds": 10000000000000000000}', "a number of 20 digits"),
    "large": (b'{"ppo": {"lr": 1e999}}', "the number 1e999 is not finite"),
    "NaN": (b'{"ppo": {"lr": NaN}}', "the number NaN is not finite"),
    "latin-1": ('{"env": "é"}'.encode("latin-1"), "not UTF-8"),
    "half a pair": (b'{"env": "\\ud800"}', "not UTF-8"),
    "half a pair as a key": (b'{"\\udfff": 1}', "not UTF-8"),
    "long": (b" " * (2**24 + 1), "longer than 16777216 bytes"),
}


def refused(read, path):
    with pytest.raises(UserError) as told:
        read(path)
    message = str(told.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    assert str(path) in message
    return message


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_no_object_is_refused_in_one_line(tmp_path, name):
    content, why = CONTENTS[name]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert why in refused(read_object, path)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "No such file"),
        (Path.mkdir, "not a regular file"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path), "cannot read"),
    ],
    ids=["missing", "folder", "pipe", "device", "loop"],
)
def test_only_regular_files_are_read(tmp_path, make, why):
    path = tmp_path / "config.json"
    make(path)
    assert why in refused(read_object, path)


def test_an_object_is_read_as_it_was_written(tmp_path):
    path, config = tmp_path / "config.json", Config(env="ü:é 🐍", total_timesteps=2**63 - 1)
    path.write_text(json.dumps(to_json(config)))
    assert read_config(path) == config


@pytest.mark.parametrize(
    "data",
    [
        {"ppo": []},
        {"ppo": {"lr": {}}},
        {"seed": None},
        {"env": ["a\nb"]},
        {"on_non_finite": []},
        {"two\nlines": 1},
        {"x" * 100_000: 1},
        {"seed": "x" * 100_000},
        {"network": {"encoder": {"layout": "-" * 100_000}}},
        {"num_seeds": -1},
    ],
    ids=lambda data: str(data)[:30],
)
def test_an_object_that_is_no_configuration_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    refused(read_config, path)
