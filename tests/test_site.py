"""The documentation site is built as `make site` builds it: whatever it refers to is there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GENERATOR = ("sphinx", "myst_parser", "furo")  # of the extra docs


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in GENERATOR),
    reason="the extra docs is not installed",
)
def test_the_site_is_built_without_a_warning(tmp_path):
    out = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    pages = {path.stem for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.stem for path in out.rglob("*.html")}
    # Files that pages link to, outside of the pages, are beside them.
    assert (out / "_repository" / "results" / "lbf" / "README.md").is_file()
    assert "mam.LoadedPolicy.act" in (out / "api.html").read_text(encoding="utf-8")
