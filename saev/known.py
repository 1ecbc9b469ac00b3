"""Finds a result again without the model whose weights are part of its name.

    <folder of a result>/asked/<hash of the question>.json      {"key": …}

A question is all that decides about a result and can be told without opening a model: the config,
the digest of the images, the versions of libraries. Where no such object is, as in folders of
earlier versions, the model is opened once more, and the object is written then.
"""

import concurrent.futures
import contextlib
import typing as tp
from collections.abc import Mapping, Sequence

from saev import storage
from saev.errors import SaevError

FOLDER = "asked"
_DIGITS = 16
_N_READERS = 16

Question = Mapping[str, tp.Any]
"""Plain JSON."""


class Known(tp.NamedTuple):
    """A folder that answers a question."""

    url: str
    key: str
    """Key of the result, which is to be compared with what the folder says."""


def find(folders: Sequence[str], question: Question) -> Known | None:
    """The first of some folders that was the answer to an equal question."""

    def key_in(folder: str) -> str:
        with contextlib.suppress(SaevError):  # damaged, or of another version: as if it were not
            found = storage.find_sealed(_place(folder, question))
            if found is not None:
                return str(found.record.get("key", ""))
        return ""

    with concurrent.futures.ThreadPoolExecutor(_N_READERS, "saev-known") as pool:
        keys = pool.map(key_in, folders)
        return next((Known(*pair) for pair in zip(folders, keys, strict=True) if pair[1]), None)


def note(folder: str, question: Question, key: str) -> None:
    """Write down that a folder answers a question, unless it is known or cannot be written."""
    place = _place(folder, question)
    with contextlib.suppress(SaevError):
        if not storage.exists(place):
            storage.clean_temporary(storage.parent(place))  # of a process that was killed
            storage.write_json(place, storage.seal({"key": key}))


def _place(folder: str, question: Question) -> str:
    digest = storage.content_hash(dict(question), _DIGITS)
    return storage.join(folder, FOLDER, f"{digest}.json")
