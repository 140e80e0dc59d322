"""Names that a run chose, in the languages of the report: one function each, for every value."""

import html
import re
from typing import Any

from mam.errors import printable

_TEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"|": r"\textbar{}", "`": r"\textasciigrave{}", '"': r"\textquotedbl{}"}
    | {
        "\N{NO-BREAK SPACE}": "~",
        "–": "--",
        "…": r"\ldots{}",
        ">": r"$>$",
        "<": r"$<$",
        "½": r"$\frac{1}{2}$",
        "τ": r"$\tau$",
    }
)


def markdown(text: Any) -> str:
    """Escape text for Markdown: no HTML, link, emphasis, formula or end of a table's cell."""
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(printable(text), quote=False))


def tex(text: Any) -> str:
    """Escape text for LaTeX.

    Where a row of a table begins, `[` or `*` would belong to the one before.
    """
    return re.sub(r"^([\[*])", r"{\1}", printable(text).translate(_TEX))
