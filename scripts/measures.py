"""Measure the source code of any checkout: `python scripts/measures.py [CHECKOUT …]`.

Core is what computes: networks, kernels, the algorithm, and the types they share.
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

CORE = {
    "networks",
    "kernels",
    "learning",
    "types",
    "rollout",
    "host",
    "advantages",
    "losses",
    "update",
    "evaluate",
}
CORE |= {"train", "guard", "devices"}  # of the algorithm, before it had a room
NO_TOKENS = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
}
COPIED = 6  # lines in a row


def functions(tree: ast.AST, public: bool = True):
    """Yield (function, whether it and all around it is public), inner functions left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield node, public and not node.name.startswith("_")
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, public and not node.name.startswith("_"))


def tokens_per_line(text: str) -> tuple[int, int]:
    """Count tokens and the lines they stand on, docstrings and comments left out."""
    found = [
        t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in NO_TOKENS
    ]
    found = [t for t in found if not (t.type == tokenize.STRING and t.string.startswith('"""'))]
    return len(found), len({t.start[0] for t in found})


def copied_lines(texts: list[str]) -> tuple[int, int]:
    """Count lines in runs of six that stand elsewhere, and all, without blank ones and imports."""
    files = []
    for text in texts:
        imports = {
            number
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for number in range(node.lineno, (node.end_lineno or 0) + 1)
        }
        lines = enumerate(map(str.strip, text.splitlines()), start=1)
        files.append(
            [line for i, line in lines if line and i not in imports and not line.startswith("#")]
        )
    places: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for file, lines in enumerate(files):
        for i in range(len(lines) - COPIED + 1):
            places.setdefault(tuple(lines[i : i + COPIED]), []).append((file, i))
    copied = {
        (file, i + k)
        for found in places.values()
        if len(found) > 1
        for file, i in found
        for k in range(COPIED)
    }
    return len(copied), sum(map(len, files))


def measure(checkout: Path) -> dict[str, str]:
    """Measure one checkout."""
    root = checkout / "src/mam"
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))}
    lengths, documented, core = [], 0, 0
    num_docstrings = 0
    for path, text in texts.items():
        is_core = path.relative_to(root).with_suffix("").parts[0] in CORE
        for function, public in functions(ast.parse(text)):
            lengths.append((function.end_lineno or 0) - function.lineno + 1)
            docstring = ast.get_docstring(function) or ""
            num_docstrings += bool(docstring)
            takes = (
                len(function.args.args)
                + len(function.args.kwonlyargs)
                - (function.args.args[:1] != [])
            )
            if is_core and public and takes >= 2:
                core += 1
                documented += "Args:" in docstring
    lengths.sort()
    counts = [tokens_per_line(text) for text in texts.values()]
    copied, lines = copied_lines(list(texts.values()))
    ruff = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "D401",
        "--output-format",
        "concise",
    ]
    convention = ["--config", 'lint.pydocstyle.convention = "google"']
    passive = subprocess.run(
        [*ruff, *convention, str(root)], capture_output=True, text=True
    ).stdout.count(" D401 ")
    entries = [path for path in root.iterdir() if path.name not in ("__pycache__", "py.typed")]
    return {
        "entries of src/mam": f"{len(entries)}",
        "lines of code": f"{lines:,}",
        "lines of a function, 95th percentile": f"{lengths[int(0.95 * len(lengths))]}",
        "lines of a function, most": f"{lengths[-1]}",
        "functions above 60 lines": f"{sum(length > 60 for length in lengths)}",
        "tokens per code line": f"{sum(a for a, _ in counts) / sum(b for _, b in counts):.2f}",
        "public core functions of two parameters or more, with Args": (
            f"{documented / core:.0%} of {core}"
        ),
        "docstrings of functions that start with a verb in the imperative": (
            f"{1 - passive / num_docstrings:.0%}"
        ),
        "lines in copies of six lines": f"{copied / lines:.2%}",
    }


def main(checkouts: list[Path]) -> None:
    """Print one column per checkout."""
    columns = [measure(checkout) for checkout in checkouts]
    for name in columns[0]:
        print(f"{name:<70}", *(f"{column[name]:>12}" for column in columns))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or [Path(__file__).parents[1]])
