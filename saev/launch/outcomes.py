"""Reads from storage why the steps of a pipeline run failed.

    <root>/datasets/runs/<run id>/<step>-<hash of its flags>.json   why a step failed
    <root>/datasets/runs/<run id>.json                              the same, when the run has ended

A lost pod leaves no record, because neither the step nor its supervisor could write one.
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
    """URL of the folder with the failures of a run's steps, while it runs."""
    return storage.join(root, "datasets", "runs", run_id)


def record_of(root: str, run_id: str) -> str:
    """URL of the record with a run's datasets and its end."""
    return folder_of(root, run_id) + ".json"


def last_words(root: str, run_id: str) -> list[Failure]:
    """The failures of a run's steps, without those of steps that succeeded later."""
    found = []
    for entry in storage.list_dir(folder_of(root, run_id), missing_ok=True):
        raw = storage.read_json(entry.url)
        if isinstance(raw, dict):
            found.append(Failure(*(str(raw.get(key, "")) for key in Failure._fields)))
    return found


def failures(root: str, run_id: str, since: datetime.datetime | None) -> list[Failure]:
    """The failures of the steps of a run that is over; none if its pods were lost.

    Args:
        root: URL of the storage root.
        run_id: the run.
        since: when it ended before its last retry; None if it was not retried. Kubeflow does not
            repeat an exit handler that succeeded, so the record may be of the earlier end.

    Raises:
        StorageError: a record cannot be read.
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
    """The first permanent failure; None if there is none."""
    return next((failure for failure in found if failure.kind == "permanent"), None)
