"""Finding latents, classes and images by words: names of classes, of latents and of image files.

The beginning of a word is enough, and accents and capitals do not matter. A text matches if all
words of the query do.
"""

import bisect
import dataclasses
import hashlib
import typing as tp
import unicodedata
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saev.serve.cache import ByteCache
from saev.serve.measured import Measured, Names

MAX_QUERY = 200
"""Most letters of a query."""
MAX_FOUND = 50
"""Most images and classes in an answer."""
_BETWEEN = r"[\s\p{Z}\p{P}]+"


def words_of(query: str) -> list[str]:
    """The words of a query, spelt as the index spells them."""
    text = unicodedata.normalize("NFD", query[:MAX_QUERY])
    letters = (c for c in text if not unicodedata.category(c).startswith("M"))
    spelt = "".join(
        " " if c.isspace() or unicodedata.category(c)[0] in "ZP" else c for c in letters
    )
    return list(dict.fromkeys(spelt.lower().split()))


@dataclasses.dataclass(frozen=True)
class WordIndex:
    """Which texts have which words."""

    n: int
    """Number of texts."""
    words: pa.Array
    """All words, sorted by their bytes."""
    starts: np.ndarray
    """First entry of each word in :attr:`texts`, int64 [words + 1]."""
    texts: np.ndarray
    """Numbers of texts by word, int32."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return int(self.words.nbytes) + self.starts.nbytes + self.texts.nbytes

    @classmethod
    def of(cls, texts: pa.ChunkedArray) -> tp.Self:
        """Index texts; null is a text without words."""
        coded_chunks, texts_of, done = [], [np.zeros(0, np.int32)], 0
        for chunk in texts.chunks:
            spelt = pc.utf8_lower(pc.utf8_normalize(pc.fill_null(chunk, ""), form="NFD"))
            spelt = pc.replace_substring_regex(spelt, pattern=r"\p{M}+", replacement="")
            lists = pc.split_pattern_regex(spelt, pattern=_BETWEEN)
            coded_chunks.append(pc.dictionary_encode(pc.list_flatten(lists)))
            texts_of.append(pc.list_parent_indices(lists).to_numpy().astype(np.int32) + done)
            done += len(chunk)
        kind = pa.dictionary(pa.int32(), pa.string())
        coded = pa.chunked_array(coded_chunks, kind).unify_dictionaries().combine_chunks()
        del coded_chunks
        sorting = pc.array_sort_indices(coded.dictionary)
        rank = np.empty(len(sorting), np.int32)
        rank[sorting.to_numpy()] = np.arange(len(sorting), dtype=np.int32)
        of_entry = rank[coded.indices.to_numpy()] if len(rank) else np.zeros(0, np.int32)
        by_word = np.argsort(of_entry, kind="stable")
        counts = np.bincount(of_entry, minlength=len(rank))
        all_texts = np.concatenate(texts_of)
        return cls(
            done,
            coded.dictionary.take(sorting),
            np.concatenate([[0], np.cumsum(counts)]),
            all_texts[by_word],
        )

    def find(self, words: Sequence[str]) -> np.ndarray:
        """The texts in which each word begins some word, ascending, int64."""
        found: np.ndarray | None = None
        for entries in sorted(map(self._beginning_with, words), key=len):
            mark = np.zeros(self.n, dtype=bool)
            mark[entries] = True
            found = mark if found is None else found & mark
            if not found.any():
                break
        return np.zeros(0, np.int64) if found is None else np.flatnonzero(found)

    def _beginning_with(self, word: str) -> np.ndarray:
        """Texts with words that begin so: they stand beside each other."""
        start = word.encode()

        def head(number: int) -> bytes:
            return self.words[number].as_py().encode()[: len(start)]

        places = range(len(self.words))
        first = bisect.bisect_left(places, start, key=head)
        last = bisect.bisect_right(places, start, lo=first, key=head)
        return self.texts[self.starts[first] : self.starts[last]]


@dataclasses.dataclass(frozen=True)
class Searcher:
    """All that is found in one SAE."""

    measured: Measured
    cache: ByteCache
    digest: bytes
    """Of the names of images: SAEs on the same images share their index."""
    latents: WordIndex
    """By latent: its name, and those of its best classes."""
    classes: WordIndex
    """By place in the list of classes."""
    shown_latent: np.ndarray
    """Latents of the pairs of a latent and an image that it shows."""
    shown_row: np.ndarray
    """Rows of the images of these pairs."""

    @property
    def nbytes(self) -> int:
        """Bytes, without the names of images and their index, which are kept beside it."""
        own = (self.latents.nbytes, self.classes.nbytes)
        return sum(own) + self.shown_latent.nbytes + self.shown_row.nbytes

    def files(self) -> WordIndex:
        """The index of the names of images, by row of the names."""
        names = self.measured.names()

        def made() -> WordIndex:
            index = WordIndex.of(_joined(names.path, names.label))
            pa.default_memory_pool().release_unused()
            return index

        return self.cache.get(("files", self.digest), made, dear=True)

    def find(self, query: str) -> dict[str, tp.Any]:
        """What matches a query, as JSON.

        ``latents`` has all that match: by number, by name, by the names of their best classes, or
        by an image that `examples.parquet` shows of them. ``classes`` and ``images`` have the first
        ones, and ``n_classes`` and ``n_images`` say how many there are.
        """
        words = words_of(query)
        if not words:
            return {"query": query[:MAX_QUERY], "latents": [], "classes": [], "images": [],
                    "n_latents": 0, "n_classes": 0, "n_images": 0}  # fmt: skip
        names = self.measured.names()
        rows, classes = self.files().find(words), self.classes.find(words)
        latents = self._latents(query, words, rows)
        listed = self.measured.class_list()
        return {
            "query": query[:MAX_QUERY],
            "latents": latents.tolist(),
            "classes": [
                {key: listed[i][key] for key in ("class", "kind", "name", "support")}
                for i in classes[:MAX_FOUND].tolist()
            ],
            "images": [
                names.of(int(names.example[row])) for row in rows[:MAX_FOUND].tolist()
            ],
            "n_latents": len(latents), "n_classes": len(classes), "n_images": len(rows),
        }  # fmt: skip

    def _latents(self, query: str, words: Sequence[str], rows: np.ndarray) -> np.ndarray:
        number = query.strip().removeprefix("#")
        if number.isascii() and number.isdigit():
            found = [i for i in range(self.measured.d_sae) if str(i).startswith(number)]
            if found:
                return np.array(found)
        is_found = np.zeros(len(self.measured.names().example), dtype=bool)
        is_found[rows] = True
        by_image = self.shown_latent[is_found[self.shown_row]]
        return np.union1d(self.latents.find(words), by_image)


def prepare(measured: Measured, cache: ByteCache) -> Searcher:
    """The searcher of an SAE. Takes seconds for a million images, and then is kept."""
    found = measured.cached("searcher", lambda: _searcher(measured, cache))
    found.files()
    return found


def _searcher(measured: Measured, cache: ByteCache) -> Searcher:
    names, shown = measured.names(), measured.shown()
    texts = measured.whole("latents", ["name", "best_class_name", "best_mask_name"])
    classes = measured.class_list()
    rows = np.searchsorted(names.example, shown.example).astype(np.int32)
    return Searcher(
        measured,
        cache,
        _digest(names),
        WordIndex.of(_joined(*texts.columns)),
        WordIndex.of(pa.chunked_array([[one["name"] for one in classes]], pa.string())),
        shown.latent,
        rows,
    )


def _joined(*columns: pa.ChunkedArray) -> pa.ChunkedArray:
    """Columns of texts as one."""
    texts = [pc.cast(column, pa.string()) for column in columns]
    return pc.binary_join_element_wise(*texts, " ", null_handling="replace", null_replacement="")


def _digest(names: Names) -> bytes:
    """Of all names: SAEs on the same images share an index."""
    digest = hashlib.blake2b(digest_size=16)
    for column in (names.path, pc.cast(names.label, pa.string())):
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                if buffer is not None:
                    digest.update(buffer)
    return digest.digest()
