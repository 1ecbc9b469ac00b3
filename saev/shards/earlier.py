"""Finding what version 0.1.0 recorded, whose folders have other names.

That version hashed where the images and the weights lie, and recorded no checksum of the weights.
One of its folders is used if everything else is equal, so that nothing is recorded a second time.
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
_NOT_NOTED = ("network", "weights", "structure", "versions")


def located(data: dict[str, tp.Any]) -> dict[str, tp.Any]:
    """A dataset's config as JSON, with a place that does not depend on the working directory."""
    data = dict(data)
    for key in ("root", "name"):
        place = data.get(key)
        is_folder = isinstance(place, str) and "://" not in place and storage.is_dir(place)
        if key in data and (key == "root" or protocol.is_place(place) or is_folder):
            data[key] = storage.normalize(data[key])
    return data


def find(root: str, wanted: Metadata, network_before: str | None) -> tuple[str, Metadata] | None:
    """The folder in which version 0.1.0 recorded the same, complete or not; a complete one first.

    Args:
        root: URL of the folder of shards folders.
        wanted: what is to be recorded.
        network_before: the network that version 0.1.0 made of the checkpoint, if it was another.
            The folders of that version then hold other activations, and none is returned.

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
            f"{wanted.network}; delete it when nothing needs it any more.",
        )
        return None
    say_once(
        logger,
        f"{url} was recorded by version 0.1.0 of saev, which did not note the checksum of the "
        f"weights: it is used as a recording of {wanted.family} {wanted.ckpt}.",
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
    """Metadata of a folder of version 0.1.0; None if there are none or they are damaged."""
    if not storage.exists(storage.join(url, protocol.METADATA)):
        return None
    with contextlib.suppress(ConfigError, CorruptDataError):
        metadata = Metadata.read(url)
        if metadata.protocol == "3.0" and metadata.weights is None:
            return metadata
    return None


def _equal(old: Metadata, wanted: Metadata) -> bool:
    """Whether two recordings are equal, except for places and what version 0.1.0 did not record."""
    return _identity(old) == _identity(wanted)


def _identity(metadata: Metadata) -> dict[str, tp.Any]:
    plain = metadata.to_dict()
    for key in ("dataset", *_NOT_NOTED):
        del plain[key]
    plain["ckpt"] = checkpoints.without_place(metadata.ckpt, metadata.ckpt_checksum)
    data = metadata.data
    plain["data"] = protocol.without_place(located(data) if isinstance(data, dict) else data)
    return plain
