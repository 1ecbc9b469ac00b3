"""What a pipeline run left in storage about its failures.

    <root>/datasets/runs/<run id>/<step>-<hash of its flags>.json   why a step failed
    <root>/datasets/runs/<run id>.json                              the same, when the run has ended

A pod that is lost leaves nothing: neither the step nor its supervisor could write any more.
"""

import datetime
import typing as tp

from saev import storage

_DAMAGED = "Restore it from a copy, or delete it: the run then counts as one whose pods were lost."


class Failure(tp.NamedTuple):
    """Why a step failed."""

    step: str
    kind: str
    """permanent: it fails again until somebody changes something. passing: it may succeed."""
    error: str
    """What happened, with the remedy."""


def folder_of(root: str, run_id: str) -> str:
    """Where the last words of a run's steps are while it runs."""
    return storage.join(root, "datasets", "runs", run_id)


def record_of(root: str, run_id: str) -> str:
    """Where it is written down what a run took on, and how it ended."""
    return folder_of(root, run_id) + ".json"


def last_words(root: str, run_id: str) -> list[Failure]:
    """Why steps of a run failed, of those that were not run again or failed again."""
    found = []
    for entry in storage.list_dir(folder_of(root, run_id), missing_ok=True):
        raw = storage.read_json(entry.url)
        if isinstance(raw, dict):
            found.append(Failure(*(str(raw.get(key, "")) for key in Failure._fields)))
    return found


def failures(root: str, run_id: str, since: datetime.datetime | None) -> list[Failure]:
    """Why steps of a run that is over failed; none if its pods were lost.

    Args:
        root: URL of the storage root.
        run_id: the run.
        since: when it ended before, if it was retried; None if not. Kubeflow runs an exit handler
            that has succeeded no second time, so the record may be of the earlier end.

    Raises:
        StorageError: that cannot be read.
    """
    found = last_words(root, run_id)
    if found:
        return found
    sealed = storage.find_sealed(record_of(root, run_id), remedy=_DAMAGED)
    record = sealed.record if sealed else {}
    finished = record.get("finished")
    if finished and since and datetime.datetime.fromisoformat(finished) <= since:
        return []
    return [Failure(*(raw[key] for key in Failure._fields)) for raw in record.get("failures", [])]


def permanent(found: tp.Sequence[Failure]) -> Failure | None:
    """A failure that another try would only repeat, if there is one."""
    return next((failure for failure in found if failure.kind == "permanent"), None)
