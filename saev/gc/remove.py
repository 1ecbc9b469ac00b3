"""Deletes items. The closing object goes first, so that a half-deleted folder is unfinished."""

import typing as tp

from saev import storage
from saev.errors import StorageError
from saev.gc.choose import Item
from saev.gc.facts import CLOSING

_LAST = "config.json"
"""Deleted last in a run folder. It has the tag, by which the same command finds the rest after an
interruption."""

Outcome = tp.Literal["deleted", "gone", "changed", "in use"]


def remove(item: Item) -> Outcome:
    """Delete one item, unless anything in it changed since it was listed.

    If this is interrupted, the rest of the item is listed again, as incomplete.

    Raises:
        StorageError: something cannot be deleted.
    """
    if item.kind == "temporary":
        return "deleted" if storage.remove_temporary(item.url) else "in use"
    if not storage.exists(item.url):
        return "gone"
    if storage.is_dir(item.url):
        found = sorted(storage.walk(item.url, temporary=True))
        # Fewer files than before: another clean-up is at work, or an earlier one was interrupted.
        if len(found) > item.n_files or any(o.modified > item.modified for o in found):
            return "changed"
    closing = CLOSING.get(item.kind)
    if closing is not None:
        _delete(storage.join(item.url, closing))
    if item.kind == "run":
        _delete_but_last(item.url)
    elif item.kind == "resume":
        # A pointer without tensors would look like damage.
        for entry in storage.list_dir(item.url):
            if entry.name.endswith(".json"):
                _delete(entry.url)
    _delete(item.url, recursive=True)
    return "deleted"


def _delete_but_last(url: str) -> None:
    for entry in storage.list_dir(url) if storage.exists(url) else []:
        if entry.name != _LAST:
            _delete(entry.url, recursive=entry.is_dir)


def _delete(url: str, *, recursive: bool = False) -> None:
    """Delete, then check. Object stores may answer a bulk deletion with success and a list of
    errors."""
    storage.delete(url, recursive=recursive)
    if storage.exists(url):
        raise StorageError(
            f"{url} is still there after it was deleted: the credentials may not delete it, or "
            "something writes there. Check the permission to delete, then run the same command."
        )
