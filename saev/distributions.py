"""The name of saev on PyPI, and the other distribution that must not be installed beside it.

The package is called ``saev`` and its distribution ``saevit``. On PyPI, ``saev`` is the published
research code, which also has a package ``saev``. In one environment, each distribution would
overwrite files of the other.
"""

import functools
import importlib.metadata
import platform
from pathlib import Path

from saev.version import __version__

_HERE = Path(__file__).parent
LIBRARY = "saevit"
CLIENT = "saevit-client"
NAME = CLIENT if _HERE.parents[1].name == "saevit_client" else LIBRARY
"""Name of the distribution that this file belongs to. The client has a copy in its own folder."""
OTHER = "saev"
_BESIDE = {CLIENT: ("kfp", "kubernetes"), LIBRARY: ("torch", "timm")}
"""Packages whose versions matter to those who read a bug report."""


def install(extra: str) -> str:
    """The command that adds an extra, for error messages.

    Args:
        extra: one of pyproject.toml's optional dependencies, such as "s3".
    """
    return f"pip install '{NAME}[{extra}]'"


def version() -> str:
    """The versions to put into a bug report, in one line."""
    found = [f"{NAME} {__version__}", f"Python {platform.python_version()}"]
    for other in _BESIDE[NAME]:
        try:
            found.append(f"{other} {importlib.metadata.version(other)}")
        except importlib.metadata.PackageNotFoundError:
            continue  # the small image has none of them
    return ", ".join(found)


def is_installed(name: str) -> bool:
    """Whether a distribution is installed in this environment."""
    return next(iter(importlib.metadata.distributions(name=name)), None) is not None


@functools.cache
def conflict() -> str:
    """A sentence if the other distribution is installed over this one, else ""."""
    try:
        other = importlib.metadata.distribution(OTHER)
    except importlib.metadata.PackageNotFoundError:
        return ""
    if Path(str(other.locate_file("saev"))).resolve() != _HERE.resolve():
        return ""  # its files lie elsewhere, so nothing is overwritten
    return (
        f"This environment has two distributions with a package saev: {NAME}, and {OTHER} "
        f"{other.version}, which is another project (or an old installation of this one); each "
        f"overwrites files of the other. Remove both, then install one: `pip uninstall {OTHER} "
        f"{NAME}` and `pip install {NAME}`."
    )


def check() -> None:
    """Raise ImportError if the other distribution is installed over this one."""
    if sentence := conflict():
        raise ImportError(sentence)
