"""Policies that come with the library: `zoo:task/policy` where the folder of a run may be.

mam/zoo/<task>/<policy>/   weights and card, as `mam export --format safetensors` writes them
mam/zoo/index.json         the checksum of every file
"""

import hashlib
from pathlib import Path

from mam.errors import UserError, unknown_name
from mam.runs.files import read_object

PREFIX = "zoo:"
ROOT = Path(__file__).parent.parent / "zoo"
INDEX = "index.json"


def zoo_names() -> list[str]:
    """Return the names of all policies of the zoo, without the prefix."""
    return sorted(read_object(ROOT / INDEX))


def checksums(folder: Path) -> dict[str, str]:
    """Return the checksum of each file of a folder, by its name."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def policy_folder(name: str | Path) -> Path:
    """Return the folder that a path, or a name of the zoo, stands for.

    Raises:
        UserError: if the zoo has no policy of this name, or its files are not what they were.
    """
    if not str(name).startswith(PREFIX):
        return Path(name)
    wanted = str(name).removeprefix(PREFIX)
    index = read_object(ROOT / INDEX)
    if wanted not in index:
        raise unknown_name("policy of the zoo", wanted, index, see="mam zoo")
    folder = ROOT / wanted
    if not folder.is_dir() or checksums(folder) != index[wanted]:
        raise UserError(f"the files of {name} are not those that were published: install mam again")
    return folder


def beside(run: Path, name: str) -> Path:
    """Return where a file about a run goes: into its folder, or here for one of the zoo."""
    return Path(name) if str(run).startswith(PREFIX) else run / name
