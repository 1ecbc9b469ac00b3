"""Finds an existing result without loading the model whose weights are part of its name.

    <folder of a result>/asked/<hash of the question>.json      {"key": …}

A question consists of all inputs of a result that are known without loading a model: the config,
the digest of the images, and the versions of libraries. Folders of earlier versions do not have
these objects. For them the model is loaded once, and then the object is written.
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
"""The inputs of a result, as plain JSON."""


class Known(tp.NamedTuple):
    """A folder with the result of a question."""

    url: str
    """The folder."""
    key: str
    """Key of the result. The caller must compare it with the folder's own key."""


def find(folders: Sequence[str], question: Question) -> Known | None:
    """The first of some folders with the result of an equal question; None if there is none."""

    def key_in(folder: str) -> str:
        with contextlib.suppress(SaevError):  # a damaged object counts as missing
            found = storage.find_sealed(_place(folder, question))
            if found is not None:
                return str(found.record.get("key", ""))
        return ""

    with concurrent.futures.ThreadPoolExecutor(_N_READERS, "saev-known") as pool:
        keys = pool.map(key_in, folders)
        return next((Known(*pair) for pair in zip(folders, keys, strict=True) if pair[1]), None)


def note(folder: str, question: Question, key: str) -> None:
    """Record that a folder has the result of a question. Failures to write are ignored."""
    place = _place(folder, question)
    with contextlib.suppress(SaevError):
        if not storage.exists(place):
            storage.clean_temporary(storage.parent(place))  # files of killed processes
            storage.write_json(place, storage.seal({"key": key}))


def _place(folder: str, question: Question) -> str:
    digest = storage.content_hash(dict(question), _DIGITS)
    return storage.join(folder, FOLDER, f"{digest}.json")
