"""Notes on latents: one JSON file that all who look share.

Whoever writes says which version was read (``If-Match``), so that nobody overwrites what another
one has written meanwhile.
"""

import json
import threading
import typing as tp

from saev import storage
from saev.serve.problems import Problem

MAX_BYTES = 4 << 20
"""Most bytes of all notes."""


class Notes:
    """A file of notes.

    Args:
        url: of the file.
    """

    def __init__(self, url: str):
        self.url = storage.normalize(url)
        self._lock = threading.Lock()

    def read(self) -> tuple[bytes, str]:
        """The notes and their version; ``{}`` if there are none yet.

        Raises:
            StorageError: the file cannot be read.
        """
        if not storage.exists(self.url):
            return b"{}", _version(b"")
        data = storage.read_bytes(self.url)
        storage.parse_json(data, self.url)
        return data, _version(data)

    def write(self, data: bytes, expected: str) -> str:
        """Replace the notes. Returns their new version.

        Args:
            data: JSON.
            expected: version that was read before.

        Raises:
            Problem: the notes are not JSON, or were changed meanwhile.
            StorageError: they cannot be written.
        """
        try:
            parsed: tp.Any = json.loads(data)
        except (ValueError, RecursionError) as err:
            raise Problem(400, "The notes are not JSON.", "Send one JSON object.") from err
        if not isinstance(parsed, dict):
            raise Problem(400, "The notes are no JSON object.", "Send one JSON object.")
        with self._lock:
            if not expected:
                raise Problem(
                    428, "Notes are written only over the version that was read.",
                    "Send the ETag of the last answer as If-Match.",
                )  # fmt: skip
            if self.read()[1] != expected:
                raise Problem(
                    412, "Somebody else has changed the notes meanwhile.",
                    "Read them again, and repeat the change.",
                )  # fmt: skip
            storage.write_bytes(self.url, data)
        return _version(data)


def _version(data: bytes) -> str:
    return f'"{storage.crc32c(data):08x}-{len(data)}"'


def check(url: str) -> Notes:
    """A file of notes that can be written.

    Raises:
        StorageError: it cannot.
    """
    notes = Notes(url)
    notes.read()
    storage.check_writable(storage.parent(notes.url))
    return notes
