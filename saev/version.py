"""The version, in its own module, because `saev.distributions` must not import `saev`.

setuptools-scm makes it of git's tags (pyproject.toml), and writes it when saev is installed.
"""

try:
    from saev._version import __version__
except ModuleNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"
