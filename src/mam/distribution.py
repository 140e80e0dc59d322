"""What the library is called where packages are installed from, and which version of it is installed."""

from contextlib import suppress
from importlib import metadata

from mam.errors import UserError

DISTRIBUTION = "multi-agent-mamba"  # the distribution called mam is another project's
NATIVE = "multi-agent-mamba-native"
_FORMER = {DISTRIBUTION: "mam", NATIVE: "mam-native"}  # what older checkouts are installed as


def installed_version(name: str) -> str | None:
    """Return the version of a distribution that is installed, under its former name if need be; None if it is not."""
    for candidate in filter(None, (name, _FORMER.get(name))):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(candidate)
    return None


def missing_extra(who: str, needs: str, extra: str) -> UserError:
    """Return the error for a package that one of the library's extras installs."""
    return UserError(f'{who} needs {needs}: pip install "{DISTRIBUTION}[{extra}]"')
