"""Errors of the client: a cluster refused a request, or a run failed."""

from saev.errors import ClusterError, SaevError

__all__ = ["ClusterError", "RunFailedError"]


class RunFailedError(SaevError):
    """The run that the client waited for did not succeed."""
