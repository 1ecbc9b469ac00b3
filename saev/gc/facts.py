"""Reads what has to be known before anything is deleted: references of the runs, and claims."""

import concurrent.futures
import logging
import typing as tp

from saev import storage
from saev.config.train import RUN
from saev.errors import SaevError
from saev.gc.scan import Folder, Snapshot
from saev.steps import claims, discover

logger = logging.getLogger(__name__)

_N_READERS = 16
CLOSING = {"shards": "shards.json", "run": RUN, "inference": "metrics.json"}
"""The closing object of each kind of folder. It is written last, so it is deleted first."""


class Inference(tp.NamedTuple):
    """A folder of results below a run."""

    folder: Folder
    complete: bool
    shards: frozenset[str]
    """Names of the shards folders that it reads; empty if they are not known."""


class Run(tp.NamedTuple):
    """A run folder."""

    folder: Folder
    complete: bool
    tag: str
    """Empty if it is not known, as for an unfinished run."""
    shards: frozenset[str]
    """Names of the shards folders that it, or an inference below it, refers to."""
    readable: bool
    """Whether all of these names are known. Those of an unfinished run may not be."""
    inference: tuple[Inference, ...]


class Held(tp.NamedTuple):
    """Claims that are held now."""

    folders: frozenset[str]
    """Names of the datasets' folders of records, NAME-HASH."""

    def of_dataset(self, url: str) -> bool:
        """Whether a claim on this dataset is held. For an unknown dataset (""): on any dataset."""
        if not url:
            return bool(self.folders)
        ending = discover.ending(storage.normalize(url))
        return any(name.endswith(ending) for name in self.folders)


class Facts(tp.NamedTuple):
    """Everything that is known of a root."""

    snapshot: Snapshot
    runs: dict[str, Run]
    """Runs by the names of their folders."""
    groups: dict[str, frozenset[str]]
    """Names of the runs of each group of resume points; empty if they are not known."""
    datasets: dict[str, str]
    """URL of the images of each shards folder; "" if it is not known."""
    held: Held


def gather(snapshot: Snapshot) -> Facts:
    """Read the small objects that name references, many at a time."""
    with concurrent.futures.ThreadPoolExecutor(_N_READERS, "saev-gc") as pool:
        runs = dict(zip(snapshot.runs, pool.map(_read_run, snapshot.runs.values()), strict=True))
        groups = pool.map(_read_group, snapshot.resume.values())
        datasets = pool.map(_read_dataset, snapshot.shards.values())
        return Facts(
            snapshot,
            runs,
            dict(zip(snapshot.resume, groups, strict=True)),
            dict(zip(snapshot.shards, datasets, strict=True)),
            _held(snapshot.claims, pool),
        )


def _read(folder: Folder, key: str, closing: str = "") -> tp.Any:
    """A JSON object of a folder, None if it is missing or damaged.

    Args:
        folder: the folder.
        key: name of the object.
        closing: name of the object that lists its checksum, if that was published.
    """
    if not folder.has(key):
        return None
    try:
        if closing and folder.has(closing):
            return storage.Folder.open(folder.url, closing).read_json(key)
        return storage.read_json(storage.join(folder.url, key))
    except SaevError as err:
        logger.warning("%s", err)
        return None


def _read_run(folder: Folder) -> Run:
    config = _read(folder, "config.json", CLOSING["run"])
    found = [_read_inference(f) for f in folder.folders("inference").values()]
    sides = [_at(config, side, "shards") for side in ("train_data", "val_data")]
    shards = {storage.name(url) for url in sides if url}
    readable = bool(sides[0]) and all(one.shards for one in found if one.complete)
    tag = _at(config, "tag")
    return Run(
        folder,
        folder.has(CLOSING["run"]),
        tag,
        frozenset(shards).union(*(one.shards for one in found)),
        readable,
        tuple(found),
    )


def _read_inference(folder: Folder) -> Inference:
    config = _read(folder, "config.json", CLOSING["inference"])
    url = _at(config, "config", "data", "shards")
    shards = {_at(config, "shards_hash"), storage.name(url) if url else ""} - {""}
    return Inference(folder, folder.has(CLOSING["inference"]), frozenset(shards))


def _read_group(folder: Folder) -> frozenset[str]:
    pointers = sorted(o.key for o in folder.objects if o.key.endswith(".json"))
    for key in reversed(pointers):
        point = _read(folder, key)
        meta = point.get("meta") if isinstance(point, dict) else None
        ids = meta.get("run_ids") if isinstance(meta, dict) else None
        if isinstance(ids, list):
            return frozenset(map(str, ids))
    return frozenset()


def _read_dataset(folder: Folder) -> str:
    return _at(_read(folder, "metadata.json", "files.json"), "data", "root")


def _at(raw: tp.Any, *keys: str) -> str:
    """A text inside of nested objects; "" if there is none. Works for configs of any version."""
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw if isinstance(raw, str) else ""


def _held(folders: dict[str, str], pool: concurrent.futures.Executor) -> Held:
    answers = pool.map(_is_held, folders)
    return Held(frozenset(n for n, held in zip(folders.values(), answers, strict=True) if held))


def _is_held(folder: str) -> bool:
    try:
        claim = claims.current(folder)
    except SaevError as err:  # if in doubt, keep
        logger.warning("%s Until then it counts as held.", err)
        return True
    return claim is not None and claim.is_held
