"""What saev is called on PyPI, and which other distribution must not be installed beside it.

The package is ``saev``, the distribution is ``saevit``: on PyPI, ``saev`` is the published research
package, which has a package ``saev`` too. Installed into one environment, each overwrites files of
the other.
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
    """The versions that a report of a mistake needs, in one line."""
    found = [f"{NAME} {__version__}", f"Python {platform.python_version()}"]
    for other in ("torch", "timm"):
        try:
            found.append(f"{other} {importlib.metadata.version(other)}")
        except importlib.metadata.PackageNotFoundError:
            continue  # the client's installation, and the small image
    return ", ".join(found)


@functools.cache
def conflict() -> str:
    """What is wrong with this environment, in one sentence; "" if nothing is."""
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
