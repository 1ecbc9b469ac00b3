"""The version, in its own module, because `saev.distributions` must not import `saev`."""

__version__ = "0.2.0"
