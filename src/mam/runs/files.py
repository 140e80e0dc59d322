"""Reading files of unknown origin, and writing where there may be no space."""

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from mam.config import Config, from_json
from mam.errors import RunError, UserError

MAX_BYTES = 2**24
MAX_DEPTH = 32
TAIL = 1024  # bytes before a position that are remembered, see `goes_on`


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line what could not be written, and why.

    Raises:
        RunError: for an OSError, which knows of no file where the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, without waiting for the other end of a pipe.

    Raises:
        OSError: if it cannot be opened, or is a pipe or a device, which may never end.
    """
    # A pipe opens at once with O_NONBLOCK; only Windows knows O_BINARY.
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return open(descriptor, "rb")


def goes_on(file: IO[bytes], position: int, tail: bytes) -> bool:
    """Say whether a file, read up to a position, still ends there with `tail`.

    It does not if it was cut meanwhile, and perhaps written again. If it does, it stands at the
    position. As many bytes as TAIL are enough to tell.
    """
    file.seek(position - len(tail))
    return file.read(len(tail)) == tail


def read_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file, which may hold anything.

    Raises:
        UserError: in one line, if it cannot be read, is no regular file or longer than `max_bytes`,
            or if `parse_object` refuses what is in it.
    """
    try:
        with open_regular(path) as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ValueError(f"longer than {max_bytes} bytes")
        return parse_object(data)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object of sane depth, whose numbers are finite and fit into 64 bits.

    Raises:
        ValueError: in one line, if it is anything else.
    """
    try:
        value = json.loads(data, parse_int=_integer, parse_float=_number, parse_constant=_number)
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, got {type(value).__name__}")
        _check_depth(value, MAX_DEPTH)
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from error
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which nothing can print
        raise ValueError("not UTF-8") from error
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**64
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"a number of {len(text)} digits")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


def _check_depth(value: Any, levels: int) -> None:
    children = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    )
    if levels == 0 and children:
        raise RecursionError
    for child in children:
        _check_depth(child, levels - 1)


def read_config(path: Path) -> Config:
    """Read the configuration in a file, whatever the file holds.

    Raises:
        UserError: in one line that names the file, if there is none in it.
    """
    if not os.path.exists(path):  # Path's own raises for some names
        run = path.name == "config.json"
        raise UserError(
            f"{path.parent} holds no run: there is no config.json in it"
            if run
            else f"no file {path}"
        )
    data = read_object(path)
    try:
        return from_json(Config, data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
