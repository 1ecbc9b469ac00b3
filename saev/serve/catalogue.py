"""Which SAEs a root has, and their figures: what the explorer shows first."""

import dataclasses
import logging
import threading
import time
import typing as tp

from saev import storage, tables
from saev.config import TrainConfig
from saev.errors import ConfigError, SaevError
from saev.secrets import redact
from saev.serve.problems import Problem
from saev.visuals.rows import SIDES

logger = logging.getLogger(__name__)

FRESH_SECONDS = 20.0
"""After so long, the root is looked at again when somebody asks."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One SAE on one shards folder."""

    key: str
    """In addresses: RUN, or RUN.RESULTS if it was measured."""
    figures: dict[str, tp.Any]
    """A row of :func:`saev.tables.saes`."""
    config: dict[str, tp.Any]
    """Of training."""

    @property
    def results(self) -> str:
        """URL of what inference measured, "" if it did not."""
        return self.figures["inference"] or ""

    def to_dict(self) -> dict[str, tp.Any]:
        """As JSON."""
        shown = {k: redact(v) if isinstance(v, str) else v for k, v in self.figures.items()}
        return {
            "key": self.key,
            "measured": bool(self.results),
            **shown,
            "images": SIDES[self.figures["side"]].images,
            "config": self.config,
        }


class Catalogue:
    """The SAEs of a root, or one run.

    Args:
        root: URL of the root; "" for a run.
        runs: URLs of run folders to look at; None for all of the root.
    """

    def __init__(self, root: str, runs: tp.Sequence[str] | None = None):
        self.root = root
        self._runs = runs
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self._entries: dict[str, Entry] = {}
        self._problems: list[str] = []
        self._configs: dict[str, dict[str, tp.Any]] = {}

    @classmethod
    def of(cls, url: str) -> tp.Self:
        """The SAEs of a root, of one run, or of what was measured of one.

        Raises:
            ConfigError: the URL is neither.
            StorageError: the storage cannot be read.
        """
        url = storage.normalize(url).rstrip("/")
        if storage.exists(storage.join(url, "metrics.json")):
            url = storage.parent(storage.parent(url))
        if storage.exists(storage.join(url, "run.json")):
            return cls(storage.parent(storage.parent(url)), [url])
        if any(storage.is_dir(storage.join(url, name)) for name in ("runs", "shards")):
            return cls(url)
        if not storage.exists(url):
            raise ConfigError(f"There is nothing at {url}. Check the URL of the root or the run.")
        raise ConfigError(
            f"{url} is neither a root nor a run: it has no folder runs, no folder shards and no "
            "run.json. Give the folder that `saev run --root` filled, or a run in it."
        )

    def entries(self) -> list[Entry]:
        """All SAEs, after another look at the root if the last one is long ago."""
        with self._lock:
            if time.monotonic() - self._looked > FRESH_SECONDS:
                self._look()
                self._looked = time.monotonic()
            return list(self._entries.values())

    def find(self, key: str) -> Entry:
        """The SAE of a key. A key is looked up, and never a part of a path.

        Raises:
            Problem: there is none.
        """
        with self._lock:
            found = self._entries.get(key)
        if found is None:
            found = {entry.key: entry for entry in self.entries()}.get(key)
        if found is None:
            raise Problem(
                404, f"There is no SAE {key[:80]!r} here.", "Start from the list of SAEs."
            )
        return found

    def to_dict(self) -> dict[str, tp.Any]:
        """The list of SAEs as JSON."""
        entries = self.entries()
        return {
            "root": redact(self.root),
            "one": self._runs is not None,
            "saes": [entry.to_dict() for entry in entries],
            "problems": self._problems,
        }

    def _look(self) -> None:
        runs = self._runs
        try:
            rows, self._problems = tables.saes(self.root, runs).to_pylist(), []
        except SaevError:  # one damaged run does not hide the others
            rows, self._problems = self._one_by_one(runs)
        entries = [Entry(_key(row), row, self._config(row["run"])) for row in rows]
        self._entries = {entry.key: entry for entry in entries}

    def _one_by_one(
        self, runs: tp.Sequence[str] | None
    ) -> tuple[list[dict[str, tp.Any]], list[str]]:
        good, said = [], []
        if runs is None:
            listed = storage.list_dir(storage.join(self.root, "runs"))
            runs = [entry.url for entry in listed if entry.is_dir]
        for run in runs:
            try:
                tables.saes(self.root, [run])
                good.append(run)
            except SaevError as err:
                logger.warning("%s", err)
                said.append(str(err))
        return tables.saes(self.root, good).to_pylist(), said

    def _config(self, run: str) -> dict[str, tp.Any]:
        if run not in self._configs:
            self._configs[run] = _redacted(TrainConfig.of_run(run).to_dict())
        return self._configs[run]


def _key(row: tp.Mapping[str, tp.Any]) -> str:
    run = storage.name(row["run"])
    return f"{run}.{storage.name(row['inference'])}" if row["inference"] else run


def _redacted(value: tp.Any) -> tp.Any:
    if isinstance(value, dict):
        return {k: _redacted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_redacted(v) for v in value]
    return redact(value) if isinstance(value, str) else value
