"""All errors that saev raises on purpose.

A message names the object, the value found, the value expected and the remedy. The command line
prints it without a traceback and exits with status 1. Any other error that reaches the user is a
bug.
"""

import difflib
from collections.abc import Iterable

from saev import distributions
from saev.secrets import redact

# Checked here, because all packages of saev import this module.
distributions.check()


def did_you_mean(word: str, known: Iterable[str], *, n: int = 1) -> str:
    """`` Did you mean a, b or c?``, to be added to a sentence; empty if nothing is similar.

    Args:
        word: what the user wrote, in any case.
        known: the words that are valid.
        n: most words that are named.
    """
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=n, cutoff=0.5)
    *first, last = [by_lower[name] for name in near] or [""]
    named = f"{', '.join(first)} or {last}" if first else last
    return f" Did you mean {named}?" if named else ""


class SaevError(Exception):
    """Base of all errors that a user can cause and correct. Secrets in URLs are hidden."""

    def __init__(self, *args: object):
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(SaevError):
    """A flag, a config key or a combination of them is wrong."""


class StorageError(SaevError):
    """A location is missing, unreadable, unwritable or full."""

    passing = False
    """Whether the same operation may succeed later without a repair."""


class CorruptDataError(StorageError):
    """Stored bytes are damaged: wrong size, wrong checksum, or unreadable header."""


class IncompleteError(StorageError):
    """The output of a stage exists, but its closing object was not published."""


class ImageError(SaevError):
    """An image or mask cannot be decoded."""


class ModelError(SaevError):
    """A model family, checkpoint or layer does not exist or does not fit."""

    passing = False
    """As for StorageError: true if the model hub could not be reached."""


class CheckpointError(SaevError):
    """An SAE checkpoint or resume state cannot be read or does not fit the config."""


class RankError(SaevError):
    """A rank of a training ended or does not answer."""


class LaunchError(SaevError):
    """Pods that a step started on Kubernetes failed, or Kubernetes refuses to start them.

    Args:
        text: the message.
        passing: whether the same may succeed later without a repair.
        spent: whether all retries have been used.
    """

    def __init__(self, text: str, *, passing: bool = False, spent: bool = False):
        super().__init__(text)
        self.passing, self.spent = passing, spent


class ClusterError(SaevError):
    """Kubeflow Pipelines or Kubernetes cannot be reached, or refused a request."""

    def __init__(self, message: str, *, status: int = 0):
        super().__init__(message)
        self.status = status
        """The HTTP status; 0 if there was no answer."""

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later without a repair."""
        return self.status in (0, 429) or self.status >= 500
