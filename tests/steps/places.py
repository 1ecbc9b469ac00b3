"""Where the steps' tests have their data."""

import typing as tp

from saev import storage


class Place(tp.NamedTuple):
    """Where a test has its data."""

    incoming: str
    """URL of the folder of datasets."""
    root: str
    """URL of the storage root."""

    def put(self, key: str, data: bytes = b"x") -> None:
        """Write a file below the datasets."""
        storage.write_bytes(storage.join(self.incoming, key), data)
