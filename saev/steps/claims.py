"""Claims in storage: they say which run processes a dataset. A claim has one owner at a time.

Claims are numbered objects, and the one with the highest number counts. It is held until it is
released or expires. To take a claim over, to renew it or to release it, a worker creates the object
with the next number. Only one of several workers can create it, and no number is written twice. So
a late heartbeat changes nothing. The clocks of different machines may differ, but by much less time
than a claim lasts.
"""

import contextlib
import datetime
import logging
import threading
import time
import typing as tp
import uuid
from collections.abc import Iterator

from saev import storage
from saev.errors import ConfigError, CorruptDataError, StorageError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 600.0
_KEPT = 10
"""How many of the newest claims are kept; older ones are deleted."""
_LOOKS = 10
"""How often the claims are read again when somebody else changes them at the same time."""


class Claim(tp.NamedTuple):
    """One claim object."""

    url: str
    number: int
    owner: str
    expires: datetime.datetime
    hours: float
    """Hours for which it holds after each renewal."""
    released: bool
    tries: int
    """How often it has been taken, by any owner."""
    retries: int = 0
    """How often the owner's run was started again since it was taken."""

    @property
    def is_held(self) -> bool:
        """Whether other owners have to wait."""
        return not self.released and _now() < self.expires

    def describe(self) -> str:
        """The owner and the time of expiry, for messages."""
        return f"run {self.owner} (until {self.expires:%Y-%m-%d %H:%M} UTC unless it renews)"


def current(folder: str) -> Claim | None:
    """The claim that counts in a folder of claims; None if there never was one.

    Raises:
        CorruptDataError: the claim is damaged.
    """
    for look in range(_LOOKS):
        names = _names(folder)
        if not names:
            return None
        try:
            return _read(storage.join(folder, names[-1]))
        except CorruptDataError:
            raise
        except StorageError as err:
            # Either a newer claim came and this one was deleted, or it is still being written.
            if not isinstance(err.__cause__, FileNotFoundError):
                raise
            time.sleep(0.02 * look)
    raise StorageError(f"The claims in {folder} change faster than they can be read. Try again.")


def _names(folder: str) -> list[str]:
    """Names of the claim objects. The last one counts."""
    entries = storage.list_dir(folder, missing_ok=True)
    return sorted(e.name for e in entries if not e.is_dir and e.name.endswith(".json"))


def take(folder: str, owner: str, hours: float, *, force: bool = False) -> Claim | None:
    """Take a claim.

    Args:
        folder: URL of the folder that holds the claims, and nothing else.
        owner: the run that takes it. It may take its own claim again, as a retried step does.
        hours: how long the claim holds without renewal.
        force: also take a claim that another owner holds.

    Returns:
        The claim, or None if another owner holds it or was faster.
    """
    found = current(folder)
    if found is not None and found.is_held:
        if found.owner == owner:
            return renew(found) or current(folder)
        if not force:
            return None
        logger.warning(
            "The claim of %s is taken over. That run stops at its next safe point.",
            found.describe(),
        )
    return take_from(folder, found, owner, hours)


def take_from(folder: str, before: Claim | None, owner: str, hours: float) -> Claim | None:
    """Take a claim from any owner, unless it changed since ``before`` was read.

    Args:
        folder: as in :func:`take`.
        before: the result of :func:`current`.
        owner: the run that takes it.
        hours: how long the claim holds without renewal.

    Returns:
        The claim, or None if another claim counts by now.
    """
    before = before or Claim("", 0, owner, _now(), hours, released=True, tries=0)
    return _create_next(folder, before, owner=owner, hours=hours, tries=before.tries + 1, retries=0)


def hand_over(before: Claim, owner: str, hours: float, *, again: bool = False) -> Claim | None:
    """Give a claim to another owner, unless it changed since ``before`` was read.

    Args:
        before: the result of :func:`current`.
        owner: the new owner, which continues the work.
        hours: how long the claim holds without renewal.
        again: whether the new owner's run is retried; the claim counts these retries.

    Returns:
        The new owner's claim, or None if another claim counts by now.
    """
    retries = before.retries + 1 if again else before.retries
    folder = storage.parent(before.url)
    return _create_next(folder, before, owner=owner, hours=hours, retries=retries)


def renew(claim: Claim) -> Claim | None:
    """Renew a claim. Returns the renewed claim, or None if another claim counts by now."""
    return _create_next(storage.parent(claim.url), claim, owner=claim.owner, hours=claim.hours)


def release(folder: str, owner: str) -> bool:
    """Release a claim. Returns whether the owner held it."""
    for _ in range(_LOOKS):  # a heartbeat may create the next claim at the same time
        found = current(folder)
        if found is None or found.owner != owner or found.released:
            return False
        if _create_next(folder, found, released=True) is not None:
            return True
    raise StorageError(f"The claim in {folder} could not be released: it is renewed all the time.")


def _create_next(folder: str, before: Claim, **changes: tp.Any) -> Claim | None:
    """Create the claim with the next number. Returns None if somebody else was faster."""
    number = before.number + 1
    claim = before._replace(
        url=storage.join(folder, f"{number:06d}.json"),
        number=number,
        **{"released": False, **changes},
    )
    claim = claim._replace(expires=_now() + datetime.timedelta(hours=claim.hours))
    if not storage.create(claim.url, _encode(claim, nonce=uuid.uuid4().hex)):
        return None
    for name in _names(folder):
        if int(name.removesuffix(".json")) <= number - _KEPT:
            storage.clean_up(storage.join(folder, name))
    return claim


class Holding:
    """A claim that is renewed in the background; see :func:`held`.

    Args:
        folder: URL of the folder that holds the claims.
        owner: the run that holds the claim.
    """

    def __init__(self, folder: str, owner: str):
        self._folder, self._owner = folder, owner
        self._lost: ConfigError | None = None

    def check(self) -> None:
        """Raise ConfigError if the claim is known to be lost. Then nothing more may be written."""
        if self._lost is not None:
            raise self._lost

    def look(self) -> Claim:
        """Read the claim from storage.

        Raises:
            ConfigError: the claim is lost.
            StorageError: the claims cannot be read.
        """
        self.check()
        found = current(self._folder)
        if found is None or found.owner != self._owner or found.released:
            self._lost = _not_ours(self._folder, self._owner, found)
            raise self._lost
        return found


@contextlib.contextmanager
def held(folder: str, owner: str) -> Iterator[Holding]:
    """Renew a claim regularly while the block runs.

    If this owner released the claim and nobody else took it, it is taken back at the start, because
    a run that has ended may be retried. A heartbeat never takes a claim back.

    Yields:
        The :class:`Holding` that tells whether the claim is lost.

    Raises:
        ConfigError: another owner has the claim, because this one did not renew it in time. The
            claim is also read at the end of the block.
    """
    claim = _take_back(folder, owner)
    stop, holding = threading.Event(), Holding(folder, owner)

    def beat() -> None:
        while not stop.wait(min(HEARTBEAT_SECONDS, claim.hours * 3600 / 4)):
            try:
                renew(holding.look())  # None means that another process of this owner renewed it
            except ConfigError as lost:
                logger.error("%s This work stops at its next safe point.", lost)
                return
            except StorageError as err:  # the next heartbeat may succeed
                logger.warning("The claim could not be renewed: %s", err)

    thread = threading.Thread(target=beat, name="claim", daemon=True)
    thread.start()
    try:
        yield holding
    finally:
        stop.set()
        thread.join()
    holding.look()


def _take_back(folder: str, owner: str) -> Claim:
    for _ in range(_LOOKS):
        found = current(folder)
        if found is None or found.owner != owner:
            raise _not_ours(folder, owner, found)
        renewed = renew(found)
        if renewed is not None:
            return renewed
    raise StorageError(f"The claim in {folder} could not be renewed: others do so all the time.")


def _not_ours(folder: str, owner: str, found: Claim | None) -> ConfigError:
    holder = "nobody" if found is None or found.released else found.describe()
    return ConfigError(
        f"Run {owner} no longer has the claim in {folder}; {holder} has it. Its work is on "
        "storage: submit the dataset again to go on from there."
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _encode(claim: Claim, **more: str) -> bytes:
    raw = {
        "owner": claim.owner,
        "expires": claim.expires.isoformat(timespec="seconds"),
        "hours": claim.hours,
        "released": claim.released,
        "tries": claim.tries,
        "retries": claim.retries,
        **more,
    }
    return storage.canonical_json(storage.seal(raw)).encode()


def _read(url: str) -> Claim:
    raw = storage.read_sealed(url, remedy="Delete it.").record
    try:
        return Claim(
            url,
            int(storage.name(url).removesuffix(".json")),
            str(raw["owner"]),
            datetime.datetime.fromisoformat(raw["expires"]),
            float(raw["hours"]),
            bool(raw["released"]),
            int(raw.get("tries", storage.name(url).removesuffix(".json"))),
            int(raw.get("retries", 0)),
        )
    except (KeyError, TypeError, ValueError) as err:
        raise CorruptDataError(f"{url} is no claim ({err}). Delete it.") from err
