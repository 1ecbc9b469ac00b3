"""Records why a step failed and whether a retry may help: its "last word".

KFP's launcher ends with status 1 after every failure, so its status says nothing about the reason.
A failed step therefore writes a small record to storage, which `saev.launch.outcomes` reads.
"""

import hashlib
import json
import logging
import os
import typing as tp
from pathlib import Path

from saev import storage
from saev.errors import ClusterError, LaunchError, RankError, SaevError, StorageError
from saev.launch import outcomes

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "SAEV_LAST_WORD"
"""Environment variable with the folder where supervised processes write why they failed."""

Kind = tp.Literal["permanent", "passing", "stopped"]


class LastWord(tp.NamedTuple):
    """Why a step failed."""

    kind: Kind
    """permanent: the step fails again until somebody changes something. passing: the same command
    may succeed. stopped: the step was asked to end."""
    error: str
    """What happened, with the remedy, for people."""
    is_unexpected: bool = False
    """Whether saev did not raise the error on purpose: it is a bug, or a broken device."""
    is_echo: bool = False
    """Whether another process of the same training failed first. That one knows the reason."""
    is_spent: bool = False
    """Whether it was already retried as often as allowed."""


def of(error: BaseException) -> LastWord:
    """The last word for an error."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return LastWord("stopped", "It was stopped.")
    if isinstance(error, LaunchError):
        kind: Kind = "passing" if error.passing else "permanent"
        return LastWord(kind, str(error), is_spent=error.spent)
    # When a rank dies, the others end with a RankError that names it.
    is_echo = isinstance(error, RankError)
    passes = storage.is_passing(error) or is_echo
    passes = passes or (isinstance(error, ClusterError) and error.passing)
    if not isinstance(error, SaevError | ModuleNotFoundError):
        return LastWord("passing", f"{type(error).__name__}: {error}", is_unexpected=True)
    return LastWord("passing" if passes else "permanent", str(error), is_echo=is_echo)


def tell(error: BaseException) -> None:
    """Tell the supervisor why this process ends. Without a supervisor, nothing happens."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        text = json.dumps(of(error)._asdict())
        Path(folder, f"{os.getpid()}.json").write_text(text, encoding="utf-8")


def heard(folder: Path) -> LastWord | None:
    """The last word of a step's processes; None if none of them wrote one.

    If several wrote one, the process that knows the reason counts. The others lost that process, or
    were stopped because of it.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            word = LastWord(**{field: raw[field] for field in LastWord._fields})
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append(word)
    return min(found, default=None, key=lambda word: (word.kind == "stopped", word.is_echo))


# --- In storage ----------------------------------------------------------------------------------


def keep(word: LastWord, root: str, owner: str, step: str, flags: tp.Sequence[str]) -> None:
    """Write a record to storage.

    A storage error is only logged as a warning: the step has already failed for another reason.
    """
    try:
        storage.write_json(_place(root, owner, step, flags), {"step": step, **word._asdict()})
    except StorageError as err:
        logger.warning("The reason could not be kept in storage: %s", err)


def withdraw(root: str, owner: str, step: str, flags: tp.Sequence[str]) -> None:
    """Delete the record of an earlier failure of a step that has succeeded now."""
    place = _place(root, owner, step, flags)
    try:
        if storage.exists(place):
            storage.delete(place)
    except StorageError as err:
        logger.warning("The record of an earlier failure stays: %s", err)


def _place(root: str, owner: str, step: str, flags: tp.Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(flags).encode()).hexdigest()[:12]
    return storage.join(outcomes.folder_of(root, owner), f"{step}-{digest}.json")
