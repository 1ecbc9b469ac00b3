"""Who processes what: a claim on storage that one owner at a time can hold.

A claim is a numbered object. The one with the highest number counts; it is held until it is
released or expires. Taking one over means to create the next number, which of any number of
contenders one can do. Clocks of different machines may differ by much less than a claim lasts.
"""

import contextlib
import datetime
import logging
import threading
import typing as tp
import uuid
from collections.abc import Iterator

from saev import storage
from saev.errors import ConfigError, CorruptDataError, StorageError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 600.0


class Claim(tp.NamedTuple):
    """One claim object."""

    url: str
    number: int
    owner: str
    expires: datetime.datetime
    hours: float
    """For how long it is renewed."""
    released: bool

    @property
    def is_held(self) -> bool:
        """Whether it keeps others out."""
        return not self.released and _now() < self.expires

    def describe(self) -> str:
        """Who holds it and until when."""
        return f"run {self.owner} (until {self.expires:%Y-%m-%d %H:%M} UTC unless it renews)"


def current(folder: str) -> Claim | None:
    """The claim that counts in a folder of claims, None if there never was one.

    Raises:
        CorruptDataError: it cannot be read.
    """
    if not storage.exists(folder):
        return None
    names = [e.name for e in storage.list_dir(folder) if not e.is_dir and e.name.endswith(".json")]
    return _read(storage.join(folder, max(names))) if names else None


def take(folder: str, owner: str, hours: float, *, force: bool = False) -> Claim | None:
    """Claim something.

    Args:
        folder: URL of the folder of its claims, and of nothing else.
        owner: who asks; an owner may take what it holds again, as a step that is retried does.
        hours: how long the claim holds without renewal.
        force: take it from a holder.

    Returns:
        The claim, or None if another owner holds it or was faster.
    """
    found = current(folder)
    if found is not None and found.is_held:
        if found.owner == owner:
            return renew(found)
        if not force:
            return None
        logger.warning("The claim of %s is taken over.", found.describe())
    number = 1 if found is None else found.number + 1
    claim = _new(storage.join(folder, f"{number:06d}.json"), number, owner, hours)
    return claim if storage.create(claim.url, _encode(claim, nonce=uuid.uuid4().hex)) else None


def renew(claim: Claim) -> Claim:
    """The same claim, from now on."""
    expires = _now() + datetime.timedelta(hours=claim.hours)
    renewed = claim._replace(expires=expires, released=False)
    storage.write_bytes(claim.url, _encode(renewed))
    return renewed


def release(folder: str, owner: str) -> bool:
    """Give a claim back; returns whether the owner held it."""
    found = current(folder)
    if found is None or found.owner != owner or found.released:
        return False
    storage.write_bytes(found.url, _encode(found._replace(released=True)))
    return True


@contextlib.contextmanager
def held(folder: str, owner: str) -> Iterator[None]:
    """Renew a claim now and then while the block runs.

    One that was released is taken back, as long as nobody else took it: a run that ended may be
    retried.

    Raises:
        ConfigError: another owner has it by now, because this one was not heard of for too long.
    """
    claim = renew(_own(folder, owner))
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(min(HEARTBEAT_SECONDS, claim.hours * 3600 / 4)):
            try:
                renew(_own(folder, owner))
            except (StorageError, ConfigError) as err:  # the next beat may succeed
                logger.warning("The claim could not be renewed: %s", err)

    thread = threading.Thread(target=beat, name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _own(folder: str, owner: str) -> Claim:
    found = current(folder)
    if found is None or found.owner != owner:
        holder = "nobody" if found is None else found.describe()
        raise ConfigError(
            f"Run {owner} no longer has the claim in {folder}; {holder} has it. Its work is on "
            "storage: submit the dataset again to go on from there."
        )
    return found


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _new(url: str, number: int, owner: str, hours: float) -> Claim:
    return Claim(url, number, owner, _now() + datetime.timedelta(hours=hours), hours, False)


def _encode(claim: Claim, **more: str) -> bytes:
    raw = {
        "owner": claim.owner,
        "expires": claim.expires.isoformat(timespec="seconds"),
        "hours": claim.hours,
        "released": claim.released,
        **more,
    }
    return storage.canonical_json(raw).encode()


def _read(url: str) -> Claim:
    raw = storage.read_json(url)
    try:
        return Claim(
            url,
            int(storage.name(url).removesuffix(".json")),
            str(raw["owner"]),
            datetime.datetime.fromisoformat(raw["expires"]),
            float(raw["hours"]),
            bool(raw["released"]),
        )
    except (KeyError, TypeError, ValueError) as err:
        raise CorruptDataError(f"{url} is no claim ({err}). Delete it.") from err
