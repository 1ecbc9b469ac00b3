"""Reading an inference folder. Needs numpy and safetensors, scipy for sparse codes, no torch."""

import contextlib
import functools
import typing as tp

import numpy as np

from saev import storage
from saev.config.source import ActivationSource
from saev.errors import (
    ConfigError,
    CorruptDataError,
    IncompleteError,
    SaevError,
    StorageError,
)
from saev.inference import files, provenance
from saev.inference.members import Members

if tp.TYPE_CHECKING:
    import pyarrow as pa
    import scipy.sparse  # at run time where it is used: steps that read figures do without it

    from saev.parquet import Tables


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


class Results:
    """A complete inference folder. Use :meth:`open`; everything is read when it is asked for."""

    def __init__(self, folder: storage.Folder):
        self.url = folder.url
        self.folder = folder
        """With the list of its files."""
        self.metrics = folder.record
        """Scalar figures, see docs/metrics.md."""
        self._loaded: dict[str, dict[str, np.ndarray]] = {}

    @classmethod
    def open(cls, url: str) -> "Results":
        """Open a folder.

        Raises:
            StorageError: it does not exist.
            IncompleteError: inference has not finished.
        """
        url = storage.normalize(url)
        place = storage.join(url, files.METRICS)
        if not storage.exists(place):
            if not storage.exists(url):
                raise StorageError(f"No inference results at {url}: it does not exist.")
            raise IncompleteError(
                f"{url} is incomplete: {files.METRICS} is missing. Run the same `saev inference` "
                "command again; it continues where it stopped."
            )
        folder = storage.Folder.open(url, files.METRICS, files.REMEDY)
        _check_metrics(folder.record, place)
        return cls(folder)

    @classmethod
    def find(cls, run: str, shards_hash: str, shards_url: str = "") -> "Results":
        """The results of a run on a shards folder (`Metadata.hash`).

        If there are several, this returns the one that `saev inference` would make of this run
        today, without further flags. If that is missing, this returns the only one that this
        version of saev would accept as its own.

        Args:
            run: URL of the run folder.
            shards_hash: which shards.
            shards_url: where they are now; by default where the results say.

        Raises:
            ConfigError: there are none, or several (then name one with --inference).
        """
        folder = storage.join(run, "inference")
        entries = storage.list_dir(folder) if storage.exists(folder) else []
        complete = [e.url for e in entries if storage.exists(storage.join(e.url, files.METRICS))]
        found = [results for results in map(cls.open, complete) if results._is_of(shards_hash)]
        if not found:
            raise ConfigError(
                f"{run} has no inference results on shards {shards_hash}. Run `saev inference` "
                "with this run and these shards first."
            )
        if len(found) > 1:
            found = _current(run, found, shards_url) or found
        if len(found) > 1:
            urls = ", ".join(results.url for results in found)
            raise ConfigError(
                f"{run} has several inference results on shards {shards_hash}: {urls}. Say which "
                "one with --inference."
            )
        return found[0]

    def _is_of(self, shards_hash: str) -> bool:
        return self.metrics.get("shards_hash") == shards_hash

    def trained_on(self, run: str) -> ActivationSource | None:
        """What the SAE was trained on, as inference recorded it, or else as the run says now."""
        if "trained_on" in self.metrics:
            raw = self.metrics["trained_on"]
            place = storage.join(self.url, files.METRICS)
            return None if raw is None else ActivationSource.from_dict(raw, source=place)
        return provenance.trained_on(run)

    @property
    def other_model(self) -> list[str]:
        """How the activations differ from those of training, if such a difference was allowed."""
        found = self.metrics.get("other_model", [])
        return [str(difference) for difference in found] if isinstance(found, list) else []

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.metrics["d_sae"])

    @property
    def content_tokens(self) -> int:
        """Content tokens per example."""
        return int(self.metrics["content_tokens"])

    @property
    def frequency(self) -> np.ndarray:
        """Share of tokens on which each latent fires, float64 [d_sae]."""
        return self._tensors(files.SPARSITY)["frequency"]

    @property
    def counts(self) -> np.ndarray:
        """Tokens on which each latent fires, int64 [d_sae]."""
        return self._tensors(files.SPARSITY)["counts"]

    @property
    def mean_values(self) -> np.ndarray:
        """Mean value over the tokens on which each latent fires, float64 [d_sae]; 0 if none."""
        return self._tensors(files.MEAN_VALUES)["mean_values"]

    @property
    def max_values(self) -> np.ndarray:
        """Largest value of each latent, float32 [d_sae]; 0 if it never fires."""
        return self._tensors(files.MEAN_VALUES)["max_values"]

    def top(self, latent: int) -> TopExamples:
        """The best examples of a latent.

        Raises:
            ConfigError: there is no such latent.
        """
        self._check_latent(latent)
        t = self._top_examples
        first, last = t["indptr"][latent : latent + 2]
        n = int(last - first)
        bounds = t["token_indptr"][first : last + 1]
        entries = slice(int(bounds[0]), int(bounds[-1]))
        rows = np.repeat(np.arange(n), np.diff(bounds))
        tokens, values = t["token_idx"][entries], t["token_value"][entries]
        is_content = tokens >= 0  # -1 is the class token, which has no place in the image
        maps = np.zeros((n, self.content_tokens), dtype=np.float32)
        maps[rows[is_content], tokens[is_content]] = values[is_content]
        return TopExamples(t["example_idx"][first:last], t["value"][first:last], maps)

    @property
    def concepts(self) -> list[dict[str, tp.Any]]:
        """Per class its best latent and figures; empty where tokens have no labels."""
        if not self._has(files.CONCEPTS, "n_classes" in self.metrics):
            return []
        from saev.inference.concepts import ClassAlignment

        rows = self.folder.read_json(files.CONCEPTS)
        place = storage.join(self.url, files.CONCEPTS)
        if not isinstance(rows, list):
            raise CorruptDataError(f"{place} holds no list of classes. {files.REMEDY}")
        found = [ClassAlignment.from_dict(row, source=place) for row in rows]
        if any(not 0 <= row.latent < self.d_sae for row in found):
            raise CorruptDataError(
                f"{place} names a latent that the SAE does not have. {files.REMEDY}"
            )
        return [row.to_dict() for row in found]

    def codes(self) -> "scipy.sparse.csr_matrix":
        """All sparse codes, [tokens, d_sae], rows in dataset order.

        Raises:
            StorageError: they were not saved (--no-save).
        """
        self._need_codes()
        with self.folder.reader(files.TOKEN_ACTS) as reader:
            return self._matrix(Members(reader, files.REMEDY), self.d_sae)

    @property
    def codes_bytes(self) -> int:
        """Size of the saved codes; 0 if none were saved."""
        if not self._has_codes():
            return 0
        listed = self.folder.listed(files.TOKEN_ACTS)
        return (
            storage.size(storage.join(self.url, files.TOKEN_ACTS))
            if listed is None
            else listed.n_bytes
        )

    def code_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Which token each row of `codes` is: example_idx int64 and token_idx int32, [tokens]."""
        self._need_codes()
        n = int(self.metrics["n_tokens"])
        with self.folder.reader(files.TOKEN_ACTS) as reader:
            members = Members(reader, files.REMEDY)
            example_idx = members.array("example_idx", ["<i8"], (n,))
            return example_idx, members.array("token_idx", ["<i4"], (n,))

    # --- Tables ----------------------------------------------------------------------------

    @functools.cached_property
    def tables(self) -> "Tables":
        """The Parquet tables; docs/formats.md describes their columns.

        Raises:
            StorageError: an earlier version of saev wrote the results, without tables.
        """
        from saev.parquet import TABLES, Tables  # need pyarrow

        if not self.folder.has(TABLES):
            raise StorageError(
                f"{self.url} has no tables, because an earlier version of saev wrote it. To have "
                "them, delete this folder and run the same `saev inference` command again."
            )
        return Tables.open(self.url, self.folder.read_bytes(TABLES), files.REMEDY)

    def latents(self, columns: tp.Sequence[str] | None = None) -> "pa.Table":
        """One row for each latent: `latents.parquet`, or some of its columns."""
        return self.tables.read("latents", columns)

    def images(self, columns: tp.Sequence[str] | None = None) -> "pa.Table":
        """One row for each image: `images.parquet`, or some of its columns."""
        return self.tables.read("images", columns)

    def classes(self, columns: tp.Sequence[str] | None = None) -> "pa.Table":
        """Pairs of a class and a latent: `classes.parquet`, or some of its columns."""
        return self.tables.read("classes", columns)

    def latent_examples(self, latent: int) -> "pa.Table":
        """The images of one latent, strongest first, then a sample of all on which it fires: its
        rows of `examples.parquet`.

        Raises:
            ConfigError: there is no such latent.
        """
        return self.tables.rows("examples", self._check_latent(latent))

    def latent_acts(self, latent: int) -> "pa.Table":
        """One latent's largest and mean value on each image: its rows of
        `image_acts_by_latent.parquet`.

        Raises:
            ConfigError: there is no such latent.
        """
        return self.tables.rows("image_acts_by_latent", self._check_latent(latent))

    def image_acts(self, example: int) -> "pa.Table":
        """The latents that fire on one image: its rows of `image_acts_by_image.parquet`."""
        return self.tables.rows("image_acts_by_image", example)

    def latent_tokens(self, latent: int) -> "pa.Table":
        """One latent's values on all tokens: its rows of `token_acts_by_latent.parquet`.

        Raises:
            ConfigError: there is no such latent, or codes were not saved (--no-save).
        """
        return self.tables.rows("token_acts_by_latent", self._check_latent(latent))

    def image_tokens(self, example: int) -> "pa.Table":
        """The codes of one image's tokens: its rows of `token_acts_by_image.parquet`.

        Raises:
            ConfigError: codes were not saved (--no-save).
        """
        return self.tables.rows("token_acts_by_image", example)

    def class_latents(self, name: str) -> "pa.Table":
        """The latents that find a class of images or of patches, best first: its rows of
        `classes.parquet`.

        Args:
            name: of the class, or where classes have no names, its number in the dataset.

        Raises:
            ConfigError: there is no such class.
        """
        import pyarrow.compute as pc

        table = self.classes()
        found = table.filter(pc.equal(table["name"], name))
        if not len(found) and name.isdigit():
            found = table.filter(pc.equal(table["value"], int(name)))
        if not len(found):
            raise ConfigError(f"No latent of {self.url} fires on a class {name!r}.")
        return found

    def _check_latent(self, latent: int) -> int:
        if not 0 <= latent < self.d_sae:
            raise ConfigError(f"There is no latent {latent}: the SAE has {self.d_sae}.")
        return latent

    def distributions(self) -> Distribution:
        """All values of `n_dists` latents; none if there are no distributions."""
        import scipy.sparse

        if not self._has(files.DISTRIBUTIONS, self._recorded("dist_latents", [])):
            shape = (int(self.metrics["n_tokens"]), 0)
            return Distribution(np.empty(0, np.int64), scipy.sparse.csr_matrix(shape))
        with self.folder.reader(files.DISTRIBUTIONS) as reader:
            members = Members(reader, files.REMEDY)
            latents = members.array("latents", ["<i8"], (-1,))
            if len(latents) and not 0 <= latents.min() <= latents.max() < self.d_sae:
                raise CorruptDataError(
                    f"{members.url} names a latent that the SAE does not have. {files.REMEDY}"
                )
            return Distribution(latents, self._matrix(members, len(latents)))

    def _has(self, name: str, expected: object) -> bool:
        """Whether an object belongs to the results.

        Args:
            name: of the object.
            expected: for results of an earlier version, which have no list of files: true if they
                say elsewhere that the object was written.

        Raises:
            CorruptDataError: results of an earlier version say so, and the object is missing.
        """
        place = storage.join(self.url, name)
        is_there = self.folder.has(name)
        if not is_there and self.folder.files is None and expected:
            raise CorruptDataError(
                f"{place} is missing, though these results say that it was written. {files.REMEDY}"
            )
        return is_there

    @property
    def _config(self) -> dict[str, tp.Any]:
        """config.json; empty if an earlier version wrote no such file."""
        if not self.folder.has(files.CONFIG):
            return {}
        if self.folder.files is None:
            place = storage.join(self.url, files.CONFIG)
            return storage.read_sealed(place, remedy=files.REMEDY).record
        found = self.folder.read_json(files.CONFIG)
        return found if isinstance(found, dict) else {}

    def _recorded(self, key: str, default: tp.Any) -> tp.Any:
        """A value of config.json; ``default`` if an earlier version wrote no such file or key."""
        return self._config.get(key, default)

    def _has_codes(self) -> bool:
        config = self._recorded("config", {})
        return self._has(files.TOKEN_ACTS, isinstance(config, dict) and config.get("save", False))

    @property
    def _without_codes(self) -> str:
        """The flag that left out token_acts.npz."""
        config = self._recorded("config", {})
        has_tables = isinstance(config, dict) and config.get("save") and not config.get("npz", True)
        return "--no-npz" if has_tables else "--no-save"

    def _need_codes(self) -> None:
        if not self._has_codes():
            raise StorageError(
                f"{storage.join(self.url, files.TOKEN_ACTS)} does not exist: inference ran with "
                f"{self._without_codes}. Run it again without that flag."
            )

    @functools.cached_property
    def _top_examples(self) -> dict[str, np.ndarray]:
        """Arrays of top_examples.safetensors, checked so that all indices lie inside the arrays."""
        t = self._tensors(files.TOP_EXAMPLES)
        n_entries, n_tokens = len(t["example_idx"]), len(t["token_idx"])
        tokens, examples = t["token_idx"], t["example_idx"]
        if not (
            len(t["value"]) == n_entries
            and len(t["token_indptr"]) == n_entries + 1
            and len(t["token_value"]) == n_tokens
            and _is_indptr(t["indptr"], n_entries)
            and _is_indptr(t["token_indptr"], n_tokens)
            and _within(tokens, -1, self.content_tokens)
            and _within(examples, 0, _MAX_COUNT)
        ):
            raise CorruptDataError(
                f"{storage.join(self.url, files.TOP_EXAMPLES)} has indices outside its arrays. "
                f"{files.REMEDY}"
            )
        return t

    def _tensors(self, name: str) -> dict[str, np.ndarray]:
        if name not in self._loaded:
            expected = {
                key: (dtype, (self.d_sae + n,) if n is not None else (-1,))
                for key, (dtype, n) in _ARRAYS[name].items()
            }
            self._loaded[name] = storage.parse_tensors(
                self.folder.read_bytes(name),
                storage.join(self.url, name),
                expected,
                remedy=files.REMEDY,
            )
        return self._loaded[name]

    def _matrix(self, members: Members, n_columns: int) -> "scipy.sparse.csr_matrix":
        import scipy.sparse

        n_rows = int(self.metrics["n_tokens"])
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


def _current(run: str, found: tp.Sequence[Results], shards_url: str) -> list[Results]:
    """Of several results, those that this version of saev makes, if possible the usual ones."""
    from saev.inference.job import current_keys  # needs torch, and reads the SAE

    recorded: dict[str, dict[str, tp.Any]] = {}
    for results in found:
        place = storage.join(results.url, files.CONFIG)
        raw = results._config
        if isinstance(raw.get("config"), dict) and "key" in raw:
            recorded[results.url] = raw
            shards_url = shards_url or _named_shards(raw["config"], place)
    if not shards_url:
        return []
    usual, current = current_keys(run, shards_url, recorded)
    of = {url: [r for r in found if r.url == url] for url in current}
    first = [r for url in current if recorded[url]["key"] == usual for r in of[url]]
    return first or [r for url in current for r in of[url]]


def _named_shards(config: dict[str, tp.Any], place: str) -> str:
    """URL of the shards that results name; "" if they are not there any more."""
    data = config.get("data")
    url = data.get("shards") if isinstance(data, dict) else None
    with contextlib.suppress(SaevError):
        url = storage.recorded_folder(url, place, "")
        return url if storage.exists(url) else ""
    return ""


_ARRAYS: dict[str, dict[str, tuple[str, int | None]]] = {
    files.SPARSITY: {"sparsity": ("f4", 0), "frequency": ("f8", 0), "counts": ("i8", 0)},
    files.MEAN_VALUES: {"mean_values": ("f8", 0), "max_values": ("f4", 0)},
    files.TOP_EXAMPLES: {
        "indptr": ("i8", 1), "example_idx": ("i8", None), "value": ("f4", None),
        "token_indptr": ("i8", None), "token_idx": ("i4", None), "token_value": ("f4", None),
    },
}  # fmt: skip
"""dtype of each array, and its length minus d_sae; None allows any length."""

_COUNTS = ("d_model", "d_sae", "content_tokens", "n_tokens", "n_examples", "n_latents", "layer",
           "n_dead", "n_almost_dead", "n_dense", "n_classes")  # fmt: skip
_NEEDED = ("d_sae", "content_tokens", "n_tokens", "shards_hash")
_MAX_CONTENT_TOKENS = 1 << 20
_MAX_COUNT = 1 << 48


def _check_metrics(metrics: tp.Mapping[str, tp.Any], place: str) -> None:
    """Check that figures are numbers, and that counts which decide sizes are not absurd."""
    for key in _NEEDED:
        if key not in metrics:
            raise CorruptDataError(
                f"{place} holds no metrics of `saev inference`: it has no {key}. {files.REMEDY}"
            )
    for key, value in metrics.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in _COUNTS:
            most = _MAX_CONTENT_TOKENS if key == "content_tokens" else _MAX_COUNT
            fits = isinstance(value, int) and is_number and 0 <= value <= most
        elif key in ("shards_hash", "tokens"):
            fits = isinstance(value, str)
        elif key in _FIGURES:
            fits = is_number or value is None
        else:
            continue
        if not fits:
            raise CorruptDataError(
                f"{place}: {key} is {value!r:.60}, expected "
                f"{'a text' if key in ('shards_hash', 'tokens') else 'a number'}. {files.REMEDY}"
            )


_FIGURES = ("normalized_mse", "explained_variance", "mse_per_token", "mse_per_dim", "l0", "l1",
            "dense_share", "dense_above", "mean_average_precision", "purity_at_16",
            "coverage_at_0.3", "probe_r")  # fmt: skip


def _is_indptr(indptr: np.ndarray, n: int) -> bool:
    """Whether ``indptr`` goes from 0 to ``n`` and never falls."""
    return bool(indptr[0] == 0 and indptr[-1] == n and (np.diff(indptr) >= 0).all())


def _within(values: np.ndarray, low: int, stop: int) -> bool:
    return not len(values) or bool(low <= values.min() and values.max() < stop)
