"""Reading an inference folder. Needs numpy and safetensors, scipy for sparse codes, no torch."""

import functools
import typing as tp

import numpy as np

from saev import storage
from saev.config.source import ActivationSource
from saev.errors import ConfigError, CorruptDataError, StorageError
from saev.inference import files, folder, provenance
from saev.inference.arrays import Arrays, Distribution, TopExamples
from saev.inference.folder import ResultsFolder

if tp.TYPE_CHECKING:
    import pyarrow as pa
    import scipy.sparse  # at run time where it is used: steps that read figures do without it

    from saev.parquet import Tables

__all__ = ["Distribution", "Results", "TopExamples"]


class Results:
    """A complete inference folder. Use :meth:`open`; everything is read when it is asked for."""

    def __init__(self, opened: ResultsFolder):
        self.url = opened.url
        self.folder = opened.listed
        """The folder of the results, with the list of its files."""
        self.metrics = opened.metrics
        """Scalar figures, see docs/metrics.md."""
        self._opened = opened
        self._arrays = Arrays(opened)

    @classmethod
    def open(cls, url: str) -> "Results":
        """Open a folder.

        Raises:
            StorageError: it does not exist.
            IncompleteError: inference has not finished.
        """
        return cls(ResultsFolder.open(url))

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
        return cls(folder.find(run, shards_hash, shards_url))

    def trained_on(self, run: str) -> ActivationSource | None:
        """What the SAE was trained on, as inference recorded it, or else as the run says now."""
        if "trained_on" in self.metrics:
            raw = self.metrics["trained_on"]
            place = self._opened.place(files.METRICS)
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
        return self._opened.d_sae

    @property
    def content_tokens(self) -> int:
        """Content tokens per example."""
        return self._opened.content_tokens

    @property
    def frequency(self) -> np.ndarray:
        """Share of tokens on which each latent fires, float64 [d_sae]."""
        return self._arrays.tensors(files.SPARSITY)["frequency"]

    @property
    def counts(self) -> np.ndarray:
        """Tokens on which each latent fires, int64 [d_sae]."""
        return self._arrays.tensors(files.SPARSITY)["counts"]

    @property
    def mean_values(self) -> np.ndarray:
        """Mean value over the tokens on which each latent fires, float64 [d_sae]; 0 if none."""
        return self._arrays.tensors(files.MEAN_VALUES)["mean_values"]

    @property
    def max_values(self) -> np.ndarray:
        """Largest value of each latent, float32 [d_sae]; 0 if it never fires."""
        return self._arrays.tensors(files.MEAN_VALUES)["max_values"]

    def top(self, latent: int) -> TopExamples:
        """The best examples of a latent.

        Raises:
            ConfigError: there is no such latent.
        """
        return self._arrays.top(self._check_latent(latent))

    @property
    def concepts(self) -> list[dict[str, tp.Any]]:
        """Per class its best latent and figures; empty where tokens have no labels."""
        if not self._opened.has(files.CONCEPTS, "n_classes" in self.metrics):
            return []
        from saev.inference.concepts import ClassAlignment

        rows = self.folder.read_json(files.CONCEPTS)
        place = self._opened.place(files.CONCEPTS)
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
        self._opened.need_codes()
        return self._arrays.codes()

    @property
    def codes_bytes(self) -> int:
        """Size of the saved codes; 0 if none were saved."""
        if not self._opened.has_codes():
            return 0
        listed = self.folder.listed(files.TOKEN_ACTS)
        return (
            storage.size(self._opened.place(files.TOKEN_ACTS)) if listed is None else listed.n_bytes
        )

    def code_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Which token each row of `codes` is: example_idx int64 and token_idx int32, [tokens]."""
        self._opened.need_codes()
        return self._arrays.code_tokens()

    def distributions(self) -> Distribution:
        """All values of `n_dists` latents; none if there are no distributions."""
        expected = self._opened.record.get("dist_latents")
        if self._opened.has(files.DISTRIBUTIONS, expected):
            return self._arrays.distributions()
        import scipy.sparse

        nothing = scipy.sparse.csr_matrix((self._opened.n_tokens, 0))
        return Distribution(np.empty(0, np.int64), nothing)

    # --- Tables ----------------------------------------------------------------------------

    @property
    def has_tables(self) -> bool:
        """Whether there are tables; an earlier version of saev wrote none."""
        return self.folder.has(files.TABLES)

    @functools.cached_property
    def tables(self) -> "Tables":
        """The Parquet tables; docs/formats.md describes their columns.

        Raises:
            StorageError: an earlier version of saev wrote the results, without tables.
        """
        from saev.parquet import Tables  # needs pyarrow

        if not self.has_tables:
            raise StorageError(
                f"{self.url} has no tables, because an earlier version of saev wrote it. To have "
                "them, delete this folder and run the same `saev inference` command again."
            )
        return Tables.open(self.url, self.folder.read_bytes(files.TABLES), files.REMEDY)

    def latents(self, columns: tp.Sequence[str] | None = None) -> "pa.Table":
        """One row for each latent: `latents.parquet`, or some of its columns."""
        return self.tables.read("latents", columns)

    def images(self, columns: tp.Sequence[str] | None = None) -> "pa.Table":
        """One row for each image: `images.parquet`, or some of its columns."""
        return self.tables.read("images", columns)

    def embeddings(self) -> "pa.Table":
        """One vector for each image, which images are compared by: `embeddings.parquet`."""
        return self.tables.read("embeddings")

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
