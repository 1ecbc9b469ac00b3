"""A list of image files that needs little memory: some 60 MB for a million files."""

import array
import typing as tp
from collections.abc import Iterable, Sequence

from saev.images.datasets import one_name


class File(tp.NamedTuple):
    """An image file that was listed."""

    url: str
    key: str
    """Path below the root. It does not depend on the location of the dataset."""
    label: str
    """Path of its folder below the root; "" for files directly in the root."""
    size: int
    """Number of bytes."""

    @property
    def stem(self) -> str:
        """The key without its suffix, in NFC, so that stems can be compared."""
        return one_name(self.key.rpartition(".")[0])


class Files(Sequence[File]):
    """Files in the order in which they were given.

    All keys are in one block of memory, as UTF-8. A :class:`File` is made when it is accessed.

    Args:
        files: the files. The label of each must be the end of the folder in its key.
    """

    def __init__(self, files: Iterable[File]):
        self._text = bytearray()
        self._ends = array.array("Q")
        self._sizes = array.array("Q")
        self._skipped = array.array("I")
        """Characters of a key before its label."""
        self._roots = array.array("I")
        self._root_urls: list[str] = []
        self.is_sorted = True
        """Whether each key comes after the one before it."""
        before = b""
        for file in files:
            self._append(file)
            place = _place(file)
            self.is_sorted = self.is_sorted and before < place
            before = place

    @property
    def n_empty(self) -> int:
        """Number of files of zero bytes."""
        return self._sizes.count(0)

    def __len__(self) -> int:
        return len(self._ends)

    @tp.overload
    def __getitem__(self, index: int) -> File: ...
    @tp.overload
    def __getitem__(self, index: slice) -> list[File]: ...
    def __getitem__(self, index: int | slice) -> File | list[File]:
        if isinstance(index, slice):
            return [self._file(i) for i in range(*index.indices(len(self)))]
        return self._file(range(len(self))[index])

    def _file(self, i: int) -> File:
        key = self._text[self._ends[i - 1] if i else 0 : self._ends[i]].decode()
        label = key[self._skipped[i] :].rpartition("/")[0]
        return File(self._root_urls[self._roots[i]] + key, key, label, self._sizes[i])

    def _append(self, file: File) -> None:
        root = file.url.removesuffix(file.key)
        if not self._root_urls or self._root_urls[-1] != root:
            self._root_urls.append(root)
        self._text += file.key.encode()
        self._ends.append(len(self._text))
        self._sizes.append(file.size)
        folder = file.key.rpartition("/")[0]
        self._skipped.append(len(folder) - len(file.label))
        self._roots.append(len(self._root_urls) - 1)


def in_order(files: Iterable[File]) -> Files:
    """Sort files by their keys. Of files with equal keys, only the first is kept.

    Keys are compared component by component, so the files of a folder stay together on every kind
    of storage.
    """
    found = Files(files)
    if found.is_sorted:
        return found
    places = [_place(file) for file in found]
    order = sorted(range(len(found)), key=places.__getitem__)
    once = (i for n, i in enumerate(order) if not n or places[i] != places[order[n - 1]])
    return Files(found[i] for i in once)


def _place(file: File) -> bytes:
    return place_of(file.key)


def place_of(key: str) -> bytes:
    """Bytes that sort like the components of a key. Components are separated by zero bytes, which
    no name contains."""
    return key.encode().replace(b"/", b"\0")
