"""The name of saev on PyPI, and the other distribution that must not be installed beside it.

The package is called ``saev`` and its distribution ``saevit``. On PyPI, ``saev`` is the published
research code, which also has a package ``saev``. In one environment, each distribution would
overwrite files of the other.
"""

import functools
import importlib.metadata
import platform

from saev.version import __version__

NAME = "saevit"
OTHER = "saev"


def install(extra: str) -> str:
    """The command that adds an extra, for error messages.

    Args:
        extra: one of pyproject.toml's optional dependencies, such as "s3".
    """
    return f"pip install '{NAME}[{extra}]'"


def version() -> str:
    """The versions to put into a bug report, in one line."""
    found = [f"{NAME} {__version__}", f"Python {platform.python_version()}"]
    for other in ("torch", "timm"):
        try:
            found.append(f"{other} {importlib.metadata.version(other)}")
        except importlib.metadata.PackageNotFoundError:
            continue  # not installed for the client and in the small image
    return ", ".join(found)


@functools.cache
def conflict() -> str:
    """A sentence if both distributions are installed, else ""."""
    try:
        other = importlib.metadata.distribution(OTHER)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return (
        f"This environment has two distributions with a package saev: {NAME}, and {OTHER} "
        f"{other.version}, which is another project (or an old installation of this one); each "
        f"overwrites files of the other. Remove both, then install one: `pip uninstall {OTHER} "
        f"{NAME}` and `pip install {NAME}`."
    )


def check() -> None:
    """Raise ImportError if the other distribution is installed as well."""
    if sentence := conflict():
        raise ImportError(sentence)
