"""Errors of the client: what a cluster refused, or what a run came to."""

from saev.errors import SaevError


class ClusterError(SaevError):
    """Kubeflow Pipelines or Kubernetes cannot be reached, or refused a request."""

    def __init__(self, message: str, *, status: int = 0):
        super().__init__(message)
        self.status = status
        """The HTTP status; 0 where there was no answer."""


class RunFailedError(SaevError):
    """A run that was waited for ended in another state than success."""
