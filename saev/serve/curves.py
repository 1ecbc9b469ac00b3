"""The curves of training."""

import concurrent.futures
import typing as tp
from collections.abc import Iterable

import numpy as np

from saev import tables
from saev.errors import SaevError
from saev.serve.cache import ByteCache
from saev.serve.catalogue import Entry

MAIN = (
    "train/normalized_mse", "train/l0", "train/n_dead", "val/normalized_mse", "val/l0",
)  # fmt: skip
MAX_POINTS = 200
_N_READERS = 8


def whole(run: str) -> dict[str, list[tp.Any]]:
    """All logged figures of a run by name, null where one was not finite.

    Raises:
        StorageError: there are none.
    """
    return tp.cast(dict[str, list[tp.Any]], tables.curves(run).to_pydict())


def of_all(entries: Iterable[Entry], cache: ByteCache) -> dict[str, tp.Any]:
    """The MAIN curves of some SAEs by key, in at most MAX_POINTS points each: steps and values."""
    chosen = list(entries)

    def one(entry: Entry) -> dict[str, tp.Any]:
        run = entry.figures["run"]
        return cache.get(("curves", run), lambda: _few(run))

    with concurrent.futures.ThreadPoolExecutor(_N_READERS) as pool:
        return dict(zip((entry.key for entry in chosen), pool.map(one, chosen), strict=True))


def _few(run: str) -> dict[str, tp.Any]:
    try:
        table = tables.curves(run)
    except SaevError:  # an SAE of elsewhere, or one that never logged
        return {}
    steps, found = table["step"].to_numpy(), {}
    for name in MAIN:
        if name not in table.column_names:
            continue
        values = table[name].to_numpy().astype(np.float64)
        has = np.flatnonzero(np.isfinite(values))
        kept = has[np.unique(np.linspace(0, max(0, len(has) - 1), MAX_POINTS).round().astype(int))]
        if len(has):
            found[name] = [steps[kept].tolist(), values[kept].tolist()]
    return found
