"""Finds datasets that are complete and not processed yet. It reads listings, and no image.

<root>/datasets/<name>-<hash of the URL>/
    seen/<fingerprint>.json       a state of the dataset: digest of its listing, and its version
    claims/<key>/<number>.json    who processes this state with this config, see `claims`
    processed/<key>.json          written last: this state was processed with this config
<root>/datasets/runs/<owner>.json     datasets of a pipeline run, and how and why the run ended
"""

import datetime
import hashlib
import itertools
import logging
import time
import typing as tp
from collections.abc import Callable, Iterator

from saev import storage
from saev.config.run import RunFile
from saev.config.stages import images_of
from saev.errors import ConfigError, CorruptDataError, StorageError
from saev.launch import outcomes
from saev.steps import claims

logger = logging.getLogger(__name__)

FOLDER = "datasets"
Seen = Callable[[int], object]
"""A progress callback. It gets the number of files that were listed since the last call."""
_RESTORE = (
    "Restore it from a copy. Without one, delete it: if files were replaced by others of equal "
    "size, the dataset is then recorded again."
)
_CLAIMS_EXPIRE = "Restore it from a copy, or delete it: the claims of this run then expire."
_DIGITS = 16


class Dataset(tp.NamedTuple):
    """One dataset in one state. Steps pass it on to each other."""

    name: str
    """Name of its folder."""
    url: str
    """URL of its folder; "" if the config itself names the images."""
    fingerprint: str
    """Hash of keys, sizes and entity tags of its files."""
    key: str
    """Hash of the fingerprint and the config. "Processed" is recorded for this key."""
    version: str
    """A part of the shards' identity if files were replaced under the same names and sizes."""
    marker: str
    """Name of the object that says that the dataset is complete; "" if there is none. It does not
    belong to the dataset."""

    @classmethod
    def from_dict(cls, raw: tp.Any) -> tp.Self:
        """Read a record. Raises ConfigError if something is missing or wrong."""
        if not isinstance(raw, dict) or not all(isinstance(raw.get(f), str) for f in cls._fields):
            raise ConfigError(
                f"A dataset is recorded as {raw!r}; expected an object with the texts "
                f"{', '.join(cls._fields)}."
            )
        for field in ("name", "fingerprint", "key"):  # file names are made of them
            if not storage.is_file_name(raw[field]):
                raise ConfigError(
                    f"A dataset is recorded with the {field} {raw[field]!r}; expected a name "
                    "without slashes, as `saev step discover` gives it."
                )
        return cls(**{field: raw[field] for field in cls._fields})


class Found(tp.NamedTuple):
    """A folder's listing."""

    name: str
    url: str
    objects: list[storage.Object]


def one(
    root: str,
    dataset: str,
    file: RunFile,
    owner: str,
    hours: float,
    seen: Seen = lambda n: None,
) -> Dataset:
    """Find and claim the dataset that a person names.

    The claim is taken from any other holder. It does not matter whether the dataset was processed.

    Args:
        root: URL of the storage root.
        dataset: URL of the dataset; "" takes the images that the config names.
        file: the config.
        owner: the run that claims it; "" claims nothing.
        hours: how long the claim holds without renewal.
        seen: progress callback of the listing.

    Raises:
        StorageError: the dataset does not exist or cannot be listed.
        ConfigError: it holds no files, or the config names no images.
    """
    images_of(file, dataset)
    if dataset:
        url = storage.normalize(dataset)
        found = Found(storage.name(url), url, sorted(storage.walk(url, seen=seen)))
        if not found.objects:
            raise ConfigError(f"The dataset {url} holds no files.")
    elif file.data is None:
        raise ConfigError("No images: give a dataset, or a config with a [data] table.")
    else:
        found = Found(file.data.kind, "", [])
    chosen = _identify(root, found, file, "")
    _claim_by_force(root, chosen, owner, hours)
    remember(root, owner, [chosen])
    return chosen


def take_over(
    root: str, claim: tp.Any, dataset: str, file: RunFile, owner: str, hours: float
) -> Dataset:
    """Take over the claim of the firing that started this run. Returns the dataset.

    Args:
        root: URL of the storage root.
        claim: the firing's description of its claim, see :func:`claim_for`.
        dataset: URL of the dataset.
        file: the config.
        owner: this run.
        hours: how long the claim holds.

    Raises:
        ConfigError: the claim is for another dataset or config, another run has it by now, or the
            dataset has changed.
    """
    chosen, firing = Dataset.from_dict(claim), claim.get("run")
    key = _hash({"fingerprint": chosen.fingerprint, "config": plain_numbers(file.identity())})
    if not isinstance(firing, str) or chosen.url != storage.normalize(dataset) or chosen.key != key:
        raise ConfigError(
            f"The parameter claim is for {chosen.url} with another config, or for another dataset "
            f"than {dataset}. Leave it out, as `make submit` does, to process this one."
        )
    folder = claims_of(root, chosen)
    while True:
        found = claims.current(folder)
        if found is not None and found.owner in (firing, owner):
            taken = claims.hand_over(found, owner, hours)
        elif found is None or not found.is_held:  # the run that took it over has ended
            taken = claims.take_from(folder, found, owner, hours)
        else:
            raise ConfigError(
                f"{chosen.name} is being processed by {found.describe()}, which took over the "
                f"claim of the firing {firing} that started this run. This run has nothing to do."
            )
        if taken is not None:
            break
    remember(root, owner, [chosen])
    check_unchanged(chosen)
    return chosen


def claim_for(dataset: Dataset, firing: str) -> dict[str, str]:
    """The description of a firing's claim, for the run that the firing starts."""
    return {"run": firing, **dataset._asdict()}


def candidates(
    root: str,
    prefix: str,
    file: RunFile,
    *,
    marker: str,
    settle_minutes: float,
    seen: Seen = lambda n: None,
) -> list[Dataset]:
    """Datasets below a prefix that are complete and not processed with this config.

    Datasets that were tried less often come first. So datasets that always fail do not block the
    others.

    Args:
        root: URL of the storage root. If it lies below the prefix, it does not count as a dataset.
        prefix: URL of the folder whose folders are the datasets.
        file: the config.
        marker: name of the object that says that a dataset is complete; "" uses settle_minutes.
        settle_minutes: a dataset is complete when nothing in it has changed for so long.
        seen: progress callback of the listing.

    Returns:
        The datasets. The list is empty if nothing is below the prefix, because a schedule may
        exist before the first dataset.

    Raises:
        StorageError: the bucket does not exist, or cannot be listed.
    """
    images_of(file, storage.normalize(prefix))
    found = []
    for folder in _folders(root, prefix, seen):
        reason = _incomplete(folder, marker, settle_minutes)
        if reason:
            logger.info("%s is not complete: %s.", folder.name, reason)
            continue
        dataset = _identify(root, folder, file, marker)
        if is_processed(root, dataset):
            logger.info("%s is processed already.", folder.name)
            continue
        n_bytes = sum(o.size for o in folder.objects)
        logger.info(
            "%s is new: %d files, %.1f MB.", folder.name, len(folder.objects), n_bytes / 1e6
        )
        claim = claims.current(claims_of(root, dataset))
        found.append((claim.tries if claim else 0, dataset))
    return [dataset for _, dataset in sorted(found)]


def check_unchanged(dataset: Dataset, seen: Seen = lambda n: None) -> None:
    """Raise ConfigError if a dataset has changed since it was discovered.

    Args:
        dataset: the dataset as it was discovered.
        seen: progress callback of the listing.
    """
    if not dataset.url:
        return
    found = Found(dataset.name, dataset.url, sorted(storage.walk(dataset.url, seen=seen)))
    if _fingerprint(_without(found, dataset.marker)) != dataset.fingerprint:
        raise ConfigError(
            f"The dataset {dataset.url} has changed since it was discovered, so what was recorded "
            "may be a mixture. Submit it again when it is complete; a schedule does so by itself."
        )


def mark_processed(root: str, dataset: Dataset, owner: str, details: dict[str, tp.Any]) -> None:
    """Record that a dataset is processed. The end of the run releases its claim."""
    record = {**dataset._asdict(), "owner": owner, "finished": _timestamp(), **details}
    storage.write_json(_processed(root, dataset), storage.seal(record))


def end(root: str, owner: str, status: tp.Any) -> dict[str, tp.Any]:
    """Record how a pipeline run ended, and release the claims that it still holds.

    Returns:
        The record, which lists the datasets that are done and those that are not.
    """
    place = outcomes.record_of(root, owner)
    found = storage.find_sealed(place, remedy=_CLAIMS_EXPIRE)
    record = found.record if found else {"datasets": []}
    datasets = [Dataset.from_dict(raw) for raw in record["datasets"]]
    done = [d.name for d in datasets if is_processed(root, d)]
    failed = [d.name for d in datasets if d.name not in done]
    for dataset in datasets:
        claims.release(claims_of(root, dataset), owner)
    failures = [failure._asdict() for failure in outcomes.last_words(root, owner)]
    record |= {"done": done, "failed": failed, "failures": failures}
    record |= {"status": status, "finished": _timestamp()}
    storage.write_json(place, storage.seal(record))
    storage.clean_up(outcomes.folder_of(root, owner), recursive=True)
    return record


def end_again(root: str, owner: str) -> None:
    """Do the same as :func:`end` for a run that had ended and was retried.

    Kubeflow does not run the exit handler of such a run again, so its last step calls this.
    Otherwise the claim would be held for hours, and the run would count as unfinished.
    """
    found = storage.find_sealed(outcomes.record_of(root, owner), remedy=_CLAIMS_EXPIRE)
    if found is not None and "finished" in found.record:
        end(root, owner, found.record["status"])


def claims_of(root: str, dataset: Dataset) -> str:
    """URL of the folder with the claims of a dataset's state and config."""
    return storage.join(folder_of(root, dataset), "claims", dataset.key)


def folder_of(root: str, dataset: Dataset) -> str:
    """URL of the folder with a dataset's records."""
    return storage.join(root, FOLDER, dataset.name + ending(dataset.url or dataset.fingerprint))


def ending(place: str) -> str:
    """The end of a folder's name: a hash of the place, because datasets may share a name."""
    return "-" + hashlib.sha256(place.encode()).hexdigest()[:8]


# --- Which folders, and whether they are complete ------------------------------------------------


def _folders(root: str, prefix: str, seen: Seen) -> Iterator[Found]:
    """The datasets below a prefix with their files. The prefix is listed once."""
    base = storage.normalize(prefix)
    own = storage.normalize(root) + "/"
    objects = sorted(storage.walk(base, missing_ok=True, seen=seen))
    if not objects:
        logger.info("Nothing is below %s yet.", base)
    for name, group in itertools.groupby(objects, key=lambda o: o.key.split("/", 1)[0]):
        url = storage.join(base, name)
        inside = [o._replace(key=o.key.split("/", 1)[1]) for o in group if "/" in o.key]
        if name.startswith(".") or not inside or own.startswith(url + "/"):
            continue
        yield Found(name, url, inside)


def _incomplete(found: Found, marker: str, settle_minutes: float) -> str:
    """Why a dataset is not complete; "" if it is complete."""
    if not _without(found, marker):
        return "it holds no files"
    if marker:
        has_marker = any(o.key == marker for o in found.objects)
        return "" if has_marker else f"it has no {marker}"
    age = (time.time() - max(o.modified for o in found.objects)) / 60
    if age < settle_minutes:
        return f"it changed {max(0.0, age):.0f} minutes ago, less than {settle_minutes:g}"
    return ""


def _without(found: Found, marker: str) -> list[storage.Object]:
    """The objects of a dataset, without hidden files and without the marker."""
    return [
        o
        for o in found.objects
        if o.key != marker and not any(part.startswith(".") for part in o.key.split("/"))
    ]


# --- What identifies a state of a dataset --------------------------------------------------------


def _identify(root: str, found: Found, file: RunFile, marker: str) -> Dataset:
    """Compute fingerprint and key of a dataset, and record that this state was seen."""
    config = plain_numbers(file.identity())
    if not found.url:
        fingerprint = _hash(config["data"])
        key = _hash({"fingerprint": fingerprint, "config": config})
        return Dataset(found.name, "", fingerprint, key, "", "")
    counted = _without(found, marker)
    fingerprint = _fingerprint(counted)
    key = _hash({"fingerprint": fingerprint, "config": config})
    dataset = Dataset(found.name, found.url, fingerprint, key, "", marker)
    return dataset._replace(version=_version(root, dataset, counted))


def _fingerprint(objects: list[storage.Object]) -> str:
    return _hash([[o.key, o.size, o.etag] for o in objects])


def _version(root: str, dataset: Dataset, objects: list[storage.Object]) -> str:
    """The version of a dataset's state: "" for the first state with these names and sizes.

    The identity of shards has only names and sizes of the files, so that equal data in two places
    has the same shards. If files were replaced by others of equal size, the version (the start of
    the fingerprint) makes the two states different.
    """
    seen = storage.join(folder_of(root, dataset), "seen")
    place = storage.join(seen, f"{dataset.fingerprint}.json")
    if (known := storage.find_sealed(place, remedy=_RESTORE)) is not None:
        return str(known.record["version"])
    listing = _hash([[o.key, o.size] for o in objects])
    others = storage.list_dir(seen, missing_ok=True)
    records = (storage.read_sealed(other.url, remedy=_RESTORE).record for other in others)
    is_replaced = any(record["listing"] == listing for record in records)
    version = dataset.fingerprint[:12] if is_replaced else ""
    record = {
        "listing": listing,
        "version": version,
        "n_files": len(objects),
        "n_bytes": sum(o.size for o in objects),
        "first_seen": _timestamp(),
    }
    storage.write_json(place, storage.seal(record))
    return version


def plain_numbers(obj: tp.Any) -> tp.Any:
    """``obj`` with integral floats as integers, because KFP may turn a 2 into a 2.0."""
    if isinstance(obj, dict):
        return {key: plain_numbers(value) for key, value in obj.items()}
    if isinstance(obj, list):
        return [plain_numbers(value) for value in obj]
    return int(obj) if isinstance(obj, float) and obj.is_integer() else obj


# --- Records -------------------------------------------------------------------------------------


def _claim_by_force(root: str, dataset: Dataset, owner: str, hours: float) -> None:
    """Claim a dataset, also if another run holds it."""
    if not owner:
        return
    folder = claims_of(root, dataset)
    for _ in range(3):  # two people may submit the same dataset at the same time
        if claims.take(folder, owner, hours, force=True) is not None:
            return
    raise StorageError(f"The dataset {dataset.url} could not be claimed in {folder}.")


def _processed(root: str, dataset: Dataset) -> str:
    return storage.join(folder_of(root, dataset), "processed", f"{dataset.key}.json")


def is_processed(root: str, dataset: Dataset) -> bool:
    """Whether a dataset was processed in this state with this config.

    A damaged record does not count. Processing the dataset again costs little, because existing
    results are found, and it writes a new record.
    """
    place = _processed(root, dataset)
    try:
        found = storage.find_sealed(place)
    except CorruptDataError as err:
        logger.warning("%s It does not count: the dataset is processed once more.", err)
        return False
    if found is not None and found.record.get("key") != dataset.key:
        logger.warning("%s is of another dataset or config. It does not count.", place)
        return False
    return found is not None


def remember(root: str, owner: str, datasets: list[Dataset]) -> None:
    """Record a run's datasets, so that its end finds their claims without a search."""
    if not owner:
        return
    record = {"owner": owner, "started": _timestamp(), "datasets": [d._asdict() for d in datasets]}
    storage.write_json(outcomes.record_of(root, owner), storage.seal(record))


def _timestamp() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _hash(obj: tp.Any) -> str:
    return storage.content_hash(obj, _DIGITS)
