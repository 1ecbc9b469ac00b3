"""Reading an inference folder. Needs numpy and safetensors, scipy for sparse codes, no torch."""

import contextlib
import typing as tp

import numpy as np
import safetensors
import safetensors.numpy

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

if tp.TYPE_CHECKING:
    import scipy.sparse  # at run time where it is used: steps that read figures do without it


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

    def __init__(self, url: str, metrics: dict[str, tp.Any]):
        self.url = url
        self.metrics = metrics
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
        metrics = storage.read_json(place)
        if not isinstance(metrics, dict) or "d_sae" not in metrics:
            raise CorruptDataError(f"{place} holds no metrics of `saev inference`.")
        return cls(url, metrics)

    @classmethod
    def find(cls, run: str, shards_hash: str, shards_url: str = "") -> "Results":
        """The results of a run on a shards folder (`Metadata.hash`).

        Of several, those that `saev inference` makes of this run today, without further flags; if
        there are none, the only ones that this version of saev would take for its own.

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
        """In what the activations differ from those of training, if that was allowed."""
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
        if not 0 <= latent < self.d_sae:
            raise ConfigError(f"There is no latent {latent}: the SAE has {self.d_sae}.")
        t = self._tensors(files.TOP_EXAMPLES)
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
        place = storage.join(self.url, files.CONCEPTS)
        return storage.read_json(place) if storage.exists(place) else []

    def codes(self) -> "scipy.sparse.csr_matrix":
        """All sparse codes, [tokens, d_sae], rows in dataset order.

        Raises:
            StorageError: they were not saved (--no-save).
        """
        place = storage.join(self.url, files.TOKEN_ACTS)
        if not storage.exists(place):
            raise StorageError(f"{place} does not exist: inference ran with --no-save.")
        return self._load_npz(place)

    def code_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Which token each row of `codes` is: example_idx int64 and token_idx int32, [tokens]."""
        with storage.open_read(storage.join(self.url, files.TOKEN_ACTS)) as handle:
            arrays = np.load(handle, allow_pickle=False)
            return arrays["example_idx"], arrays["token_idx"]

    def distributions(self) -> Distribution:
        """All values of `n_dists` latents; none if there are no distributions."""
        import scipy.sparse

        place = storage.join(self.url, files.DISTRIBUTIONS)
        if not storage.exists(place):
            shape = (int(self.metrics["n_tokens"]), 0)
            return Distribution(np.empty(0, np.int64), scipy.sparse.csr_matrix(shape))
        with storage.open_read(place) as handle:
            latents = np.load(handle, allow_pickle=False)["latents"]
        return Distribution(latents, self._load_npz(place))

    def _tensors(self, name: str) -> dict[str, np.ndarray]:
        if name not in self._loaded:
            place = storage.join(self.url, name)
            try:
                self._loaded[name] = safetensors.numpy.load(storage.read_bytes(place))
            except safetensors.SafetensorError as err:
                raise CorruptDataError(f"{place} is damaged: {err}. Run inference again.") from err
        return self._loaded[name]

    @staticmethod
    def _load_npz(place: str) -> "scipy.sparse.csr_matrix":
        import scipy.sparse

        with storage.open_read(place) as handle:
            return scipy.sparse.load_npz(handle)


def _current(run: str, found: tp.Sequence[Results], shards_url: str) -> list[Results]:
    """Those of several results that this version of saev makes, the usual ones before others."""
    from saev.inference.job import current_keys  # needs torch, and reads the SAE

    recorded: dict[str, dict[str, tp.Any]] = {}
    for results in found:
        place = storage.join(results.url, files.CONFIG)
        raw = storage.read_json(place) if storage.exists(place) else None
        if isinstance(raw, dict) and isinstance(raw.get("config"), dict) and "key" in raw:
            recorded[results.url] = raw
            shards_url = shards_url or _named_shards(raw["config"], place)
    if not shards_url:
        return []
    usual, current = current_keys(run, shards_url, recorded)
    of = {url: [r for r in found if r.url == url] for url in current}
    first = [r for url in current if recorded[url]["key"] in usual for r in of[url]]
    return first or [r for url in current for r in of[url]]


def _named_shards(config: dict[str, tp.Any], place: str) -> str:
    """URL of the shards that results name; "" if they are not there any more."""
    data = config.get("data")
    url = data.get("shards") if isinstance(data, dict) else None
    with contextlib.suppress(SaevError):
        url = storage.recorded_folder(url, place, "")
        return url if storage.exists(url) else ""
    return ""
