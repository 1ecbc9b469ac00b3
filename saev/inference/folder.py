"""The folder that inference wrote: whether it is complete and sound, and which objects it has."""

import contextlib
import typing as tp

from saev import storage
from saev.errors import ConfigError, CorruptDataError, IncompleteError, SaevError, StorageError
from saev.inference import files

_COUNTS = ("d_model", "d_sae", "content_tokens", "n_tokens", "n_examples", "n_latents", "layer",
           "n_dead", "n_almost_dead", "n_dense", "n_classes")  # fmt: skip
_FIGURES = ("normalized_mse", "explained_variance", "mse_per_token", "mse_per_dim", "l0", "l1",
            "dense_share", "dense_above", "mean_average_precision", "purity_at_16",
            "coverage_at_0.3", "probe_r")  # fmt: skip
_TEXTS = ("shards_hash", "tokens")
_NEEDED = ("d_sae", "content_tokens", "n_tokens", "shards_hash")
_MAX_CONTENT_TOKENS = 1 << 20
_MAX_COUNT = 1 << 48


class ResultsFolder:
    """A complete inference folder. Use :meth:`open`.

    Results of version 0.1.0 have no list of their files. Whether they have an object is then found
    in storage, and compared with what they say elsewhere.
    """

    def __init__(self, listed: storage.Folder):
        self.listed = listed
        """The folder as it is stored, with the list of its files."""
        self.url = listed.url
        self.metrics = listed.record
        """Contents of metrics.json."""

    @classmethod
    def open(cls, url: str) -> tp.Self:
        """Open a folder.

        Raises:
            StorageError: it does not exist.
            IncompleteError: inference has not finished.
            CorruptDataError: its figures are damaged.
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
        listed = storage.Folder.open(url, files.METRICS, files.REMEDY)
        _check(listed.record, place)
        return cls(listed)

    def place(self, name: str) -> str:
        """URL of an object."""
        return storage.join(self.url, name)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.metrics["d_sae"])

    @property
    def content_tokens(self) -> int:
        """Content tokens per example."""
        return int(self.metrics["content_tokens"])

    @property
    def n_tokens(self) -> int:
        """Tokens that were measured."""
        return int(self.metrics["n_tokens"])

    @property
    def record(self) -> dict[str, tp.Any]:
        """Contents of config.json; empty if an earlier version wrote no such file."""
        if not self.listed.has(files.CONFIG):
            return {}
        if self.listed.files is None:
            return storage.read_sealed(self.place(files.CONFIG), remedy=files.REMEDY).record
        found = self.listed.read_json(files.CONFIG)
        return found if isinstance(found, dict) else {}

    @property
    def config(self) -> dict[str, tp.Any]:
        """The config that inference ran with; empty if an earlier version did not write it."""
        found = self.record.get("config")
        return found if isinstance(found, dict) else {}

    def has(self, name: str, expected: object) -> bool:
        """Whether an object belongs to the results.

        Args:
            name: of the object.
            expected: for results without a list of files: true if they say elsewhere that the
                object was written.

        Raises:
            CorruptDataError: results without a list say so, and the object is missing.
        """
        is_there = self.listed.has(name)
        if not is_there and self.listed.files is None and expected:
            raise CorruptDataError(
                f"{self.place(name)} is missing, though these results say that it was written. "
                f"{files.REMEDY}"
            )
        return is_there

    def has_codes(self) -> bool:
        """Whether token_acts.npz was written."""
        return self.has(files.TOKEN_ACTS, self.config.get("save", False))

    def need_codes(self) -> None:
        """Raise StorageError if token_acts.npz was not written."""
        if self.has_codes():
            return
        flag = "--no-save"
        if self.config.get("save") and not self.config.get("npz", True):
            flag = "--no-npz"
        raise StorageError(
            f"{self.place(files.TOKEN_ACTS)} does not exist: inference ran with {flag}. Run it "
            "again without that flag."
        )


def _check(metrics: tp.Mapping[str, tp.Any], place: str) -> None:
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
        elif key in _TEXTS:
            fits = isinstance(value, str)
        elif key in _FIGURES:
            fits = is_number or value is None
        else:
            continue
        if not fits:
            raise CorruptDataError(
                f"{place}: {key} is {value!r:.60}, expected "
                f"{'a text' if key in _TEXTS else 'a number'}. {files.REMEDY}"
            )


# --- Finding the results of a run ----------------------------------------------------------


def find(run: str, shards_hash: str, shards_url: str = "") -> ResultsFolder:
    """The results of a run on a shards folder; see :meth:`saev.inference.results.Results.find`."""
    place = storage.join(run, "inference")
    entries = storage.list_dir(place) if storage.exists(place) else []
    complete = [e.url for e in entries if storage.exists(storage.join(e.url, files.METRICS))]
    opened = [ResultsFolder.open(url) for url in complete]
    found = [one for one in opened if one.metrics["shards_hash"] == shards_hash]
    if not found:
        raise ConfigError(
            f"{run} has no inference results on shards {shards_hash}. Run `saev inference` "
            "with this run and these shards first."
        )
    if len(found) > 1:
        found = _current(run, found, shards_url) or found
    if len(found) > 1:
        urls = ", ".join(one.url for one in found)
        raise ConfigError(
            f"{run} has several inference results on shards {shards_hash}: {urls}. Say which "
            "one with --inference."
        )
    return found[0]


def _current(run: str, found: tp.Sequence[ResultsFolder], shards_url: str) -> list[ResultsFolder]:
    """Those of several results that this version of saev would make, if possible the usual ones."""
    from saev.inference.job import current_keys  # needs torch, and reads the SAE

    recorded: dict[str, dict[str, tp.Any]] = {}
    for one in found:
        record = one.record
        if isinstance(record.get("config"), dict) and "key" in record:
            recorded[one.url] = record
            shards_url = shards_url or _named_shards(record["config"], one.place(files.CONFIG))
    if not shards_url:
        return []
    usual, current = current_keys(run, shards_url, recorded)
    of = {url: [one for one in found if one.url == url] for url in current}
    first = [one for url in current if recorded[url]["key"] == usual for one in of[url]]
    return first or [one for url in current for one in of[url]]


def _named_shards(config: dict[str, tp.Any], place: str) -> str:
    """URL of the shards that results name; "" if they are not there any more."""
    data = config.get("data")
    url = data.get("shards") if isinstance(data, dict) else None
    with contextlib.suppress(SaevError):
        url = storage.recorded_folder(url, place, "")
        return url if storage.exists(url) else ""
    return ""
