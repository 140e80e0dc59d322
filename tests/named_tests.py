"""Tests that a text names, as `room/test_file::test_name`."""

import re
from pathlib import Path


def check_named_tests(text: str) -> int:
    """Fails for a test that does not exist; returns how many are named."""
    named = re.findall(r"([\w/]+)::(test_\w+)", text)
    for file, test in named:
        source = (Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8")
        assert f"\ndef {test}(" in source, f"there is no {file}::{test}"
    return len(named)
