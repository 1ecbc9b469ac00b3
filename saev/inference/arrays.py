"""Reading the arrays of an inference folder: .safetensors files, and sparse matrices in .npz files.

Shapes, dtypes and indices are checked, so that damage is an error that names the file.
"""

import functools
import typing as tp

import numpy as np

from saev import storage
from saev.errors import CorruptDataError
from saev.inference import files
from saev.inference.folder import ResultsFolder
from saev.inference.members import Members

if tp.TYPE_CHECKING:
    import scipy.sparse  # at run time where it is used: steps that read figures do without it

_ARRAYS: dict[str, dict[str, tuple[str, int | None]]] = {
    files.SPARSITY: {"sparsity": ("f4", 0), "frequency": ("f8", 0), "counts": ("i8", 0)},
    files.MEAN_VALUES: {"mean_values": ("f8", 0), "max_values": ("f4", 0)},
    files.TOP_EXAMPLES: {
        "indptr": ("i8", 1), "example_idx": ("i8", None), "value": ("f4", None),
        "token_indptr": ("i8", None), "token_idx": ("i4", None), "token_value": ("f4", None),
    },
}  # fmt: skip
"""dtype of each array, and its length minus d_sae; None allows any length."""
_MAX_EXAMPLES = 1 << 48


class TopExamples(tp.NamedTuple):
    """The examples on which one latent is strongest, best first."""

    example_idx: np.ndarray
    """Rows of `Shards.examples()`, int64 [n], n at most `n_top`."""
    value: np.ndarray
    """Largest value over the example's tokens, float32 [n]."""
    token_acts: np.ndarray
    """Values of the content tokens, float32 [n, content_tokens]."""


class Distribution(tp.NamedTuple):
    """All values of a few latents."""

    latents: np.ndarray
    """Which latents, int64 [n]."""
    values: "scipy.sparse.csr_matrix"
    """Values, [tokens, n]; column i is `latents[i]`."""


class Arrays:
    """The arrays of an inference folder. Files are read when they are first asked for."""

    def __init__(self, folder: ResultsFolder):
        self._folder = folder
        self._loaded: dict[str, dict[str, np.ndarray]] = {}

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a .safetensors file, which are kept."""
        if name not in self._loaded:
            expected = {
                key: (dtype, (self._folder.d_sae + n,) if n is not None else (-1,))
                for key, (dtype, n) in _ARRAYS[name].items()
            }
            self._loaded[name] = storage.parse_tensors(
                self._folder.listed.read_bytes(name),
                self._folder.place(name),
                expected,
                remedy=files.REMEDY,
            )
        return self._loaded[name]

    def top(self, latent: int) -> TopExamples:
        """The best examples of a latent."""
        t = self._top_examples
        first, last = t["indptr"][latent : latent + 2]
        n = int(last - first)
        bounds = t["token_indptr"][first : last + 1]
        entries = slice(int(bounds[0]), int(bounds[-1]))
        rows = np.repeat(np.arange(n), np.diff(bounds))
        tokens, values = t["token_idx"][entries], t["token_value"][entries]
        is_content = tokens >= 0  # -1 is the class token, which has no place in the image
        maps = np.zeros((n, self._folder.content_tokens), dtype=np.float32)
        maps[rows[is_content], tokens[is_content]] = values[is_content]
        return TopExamples(t["example_idx"][first:last], t["value"][first:last], maps)

    def codes(self) -> "scipy.sparse.csr_matrix":
        """All sparse codes, [tokens, d_sae]."""
        with self._folder.listed.reader(files.TOKEN_ACTS) as reader:
            return self._matrix(Members(reader, files.REMEDY), self._folder.d_sae)

    def code_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Example int64 and token int32 of each row of :meth:`codes`, [tokens]."""
        n = self._folder.n_tokens
        with self._folder.listed.reader(files.TOKEN_ACTS) as reader:
            members = Members(reader, files.REMEDY)
            example_idx = members.array("example_idx", ["<i8"], (n,))
            return example_idx, members.array("token_idx", ["<i4"], (n,))

    def distributions(self) -> Distribution:
        """All values of some latents."""
        with self._folder.listed.reader(files.DISTRIBUTIONS) as reader:
            members = Members(reader, files.REMEDY)
            latents = members.array("latents", ["<i8"], (-1,))
            if not _within(latents, 0, self._folder.d_sae):
                raise CorruptDataError(
                    f"{members.url} names a latent that the SAE does not have. {files.REMEDY}"
                )
            return Distribution(latents, self._matrix(members, len(latents)))

    @functools.cached_property
    def _top_examples(self) -> dict[str, np.ndarray]:
        """Arrays of top_examples.safetensors, checked so that all indices lie inside the arrays."""
        t = self.tensors(files.TOP_EXAMPLES)
        n_entries, n_tokens = len(t["example_idx"]), len(t["token_idx"])
        if not (
            len(t["value"]) == n_entries
            and len(t["token_indptr"]) == n_entries + 1
            and len(t["token_value"]) == n_tokens
            and _is_indptr(t["indptr"], n_entries)
            and _is_indptr(t["token_indptr"], n_tokens)
            and _within(t["token_idx"], -1, self._folder.content_tokens)
            and _within(t["example_idx"], 0, _MAX_EXAMPLES)
        ):
            raise CorruptDataError(
                f"{self._folder.place(files.TOP_EXAMPLES)} has indices outside its arrays. "
                f"{files.REMEDY}"
            )
        return t

    def _matrix(self, members: Members, n_columns: int) -> "scipy.sparse.csr_matrix":
        import scipy.sparse

        n_rows = self._folder.n_tokens
        shape = members.array("shape", ["<i8"], (2,))
        if shape.tolist() != [n_rows, n_columns]:
            raise CorruptDataError(
                f"{members.url} is a matrix of {shape.tolist()}, expected {[n_rows, n_columns]}. "
                f"{files.REMEDY}"
            )
        indptr = members.array("indptr", ["<i4", "<i8"], (n_rows + 1,))
        indices = members.array("indices", ["<i4"], (-1,))
        data = members.array("data", ["<f4"], (len(indices),))
        with storage.parsed(members.url, "a sparse matrix", remedy=files.REMEDY):
            if not _is_indptr(indptr, len(indices)):
                raise ValueError("its indptr does not rise from 0 to its number of values")
            matrix = scipy.sparse.csr_matrix((data, indices, indptr), shape=(n_rows, n_columns))
            matrix.check_format(full_check=True)
        return matrix


def _is_indptr(indptr: np.ndarray, n: int) -> bool:
    """Whether ``indptr`` goes from 0 to ``n`` and never falls."""
    return bool(indptr[0] == 0 and indptr[-1] == n and (np.diff(indptr) >= 0).all())


def _within(values: np.ndarray, low: int, stop: int) -> bool:
    return not len(values) or bool(low <= values.min() and values.max() < stop)
