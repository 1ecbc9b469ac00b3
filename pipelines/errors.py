"""Errors of the client: what a cluster refused, or what a run came to."""

from saev.errors import ClusterError, SaevError

__all__ = ["ClusterError", "RunFailedError"]


class RunFailedError(SaevError):
    """A run that was waited for ended in another state than success."""
