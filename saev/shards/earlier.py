"""Finding folders that version 0.1.0 recorded, which have other names.

In that version the name also depended on the locations of images and weights, and metadata had no
checksum of the weights. Such a folder is used if all else is equal, so that nothing is recorded
twice.
"""

import concurrent.futures
import contextlib
import logging
import typing as tp

from saev import storage
from saev.errors import ConfigError, CorruptDataError
from saev.once import say_once
from saev.shards import protocol
from saev.shards.protocol import Metadata
from saev.vit import checkpoints

logger = logging.getLogger(__name__)

_THREADS = 16
_NOT_RECORDED = ("network", "weights", "structure", "versions")


def located(data: dict[str, tp.Any]) -> dict[str, tp.Any]:
    """A dataset's config as JSON, with absolute paths instead of relative ones."""
    data = dict(data)
    for key in ("root", "name"):
        place = data.get(key)
        is_folder = isinstance(place, str) and "://" not in place and storage.is_dir(place)
        if key in data and (key == "root" or protocol.is_place(place) or is_folder):
            data[key] = storage.normalize(data[key])
    return data


def find(root: str, wanted: Metadata, network_before: str | None) -> tuple[str, Metadata] | None:
    """Find a folder in which version 0.1.0 recorded the same activations. It may be incomplete, but
    a complete folder is preferred.

    Args:
        root: URL of the folder of shards folders.
        wanted: metadata of the recording.
        network_before: the network that version 0.1.0 built from the checkpoint, if it was another
            one. Its folders then hold other activations, and none is returned.

    Returns:
        URL and metadata of the folder, or None. A warning names the folder.
    """
    found = _same(root, wanted)
    if not found:
        return None
    complete = [f for f in found if storage.exists(storage.join(f[0], protocol.SHARDS))]
    url, metadata = (complete or found)[0]
    if network_before is not None:
        say_once(
            logger,
            f"{url} was recorded by version 0.1.0 of saev, which took {metadata.ckpt} for "
            f"{network_before}. Its activations are wrong and are recorded again, as "
            f"{wanted.network}. Delete the folder when nothing needs it any more.",
        )
        return None
    say_once(
        logger,
        f"{url} was recorded by version 0.1.0 of saev, which did not record the checksum of the "
        f"weights. It is used as a recording of {wanted.family} {wanted.ckpt}.",
    )
    return url, metadata


def _same(root: str, wanted: Metadata) -> list[tuple[str, Metadata]]:
    """Folders of version 0.1.0 below ``root`` with an equal recording."""
    if not storage.is_dir(root):
        return []
    folders = [e.url for e in storage.list_dir(root) if e.is_dir and protocol.is_hash(e.name)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = zip(folders, pool.map(_read, folders), strict=True)
        return [(url, old) for url, old in found if old is not None and _equal(old, wanted)]


def _read(url: str) -> Metadata | None:
    """Metadata of a folder of version 0.1.0; None if they are missing or damaged."""
    if not storage.exists(storage.join(url, protocol.METADATA)):
        return None
    with contextlib.suppress(ConfigError, CorruptDataError):
        metadata = Metadata.read(url)
        if metadata.protocol == "3.0" and metadata.weights is None:
            return metadata
    return None


def _equal(old: Metadata, wanted: Metadata) -> bool:
    """Whether two recordings are equal, except for locations and keys unknown to version 0.1.0."""
    return _identity(old) == _identity(wanted)


def _identity(metadata: Metadata) -> dict[str, tp.Any]:
    plain = metadata.to_dict()
    for key in ("dataset", *_NOT_RECORDED):
        del plain[key]
    plain["ckpt"] = checkpoints.without_url(metadata.ckpt, metadata.ckpt_checksum)
    data = metadata.data
    plain["data"] = protocol.without_place(located(data) if isinstance(data, dict) else data)
    return plain
