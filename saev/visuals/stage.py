"""The visuals stage: pictures of each latent, then a page for each SAE.

An item is one latent of one SAE. An image that several latents show is decoded once for all of
them. An SAE whose pictures cannot be drawn fails alone.
"""

import contextlib
import functools
import typing as tp
from collections.abc import Iterator, Sequence

from saev import cores, driver, storage
from saev.config.visuals import VisualsCommand, VisualsConfig
from saev.errors import IncompleteError, SaevError
from saev.failures import Failures
from saev.progress import Progress
from saev.stage import Context, Item, Job, Result
from saev.visuals.pictures import Firing, Pictures
from saev.visuals.views import Images, Views


def plan(cfg: VisualsConfig) -> list[dict[str, tp.Any]]:
    """The work items, ``{"latent": number}``.

    Raises:
        ConfigError: a latent does not exist, or shards and inference do not fit together.
        StorageError: one of them is missing.
    """
    return [item.spec for item in Drawing(cfg).items()]


def work(cfg: VisualsConfig, item: tp.Mapping[str, tp.Any]) -> None:
    """Draw one latent, unless it is drawn. Opens the images: see :func:`run` for many latents.

    Raises:
        ImageError: an original image cannot be decoded or is not the recorded one.
        StorageError: one is gone, or the result cannot be written.
    """
    job = Drawing(cfg)
    driver.do_items(job, [job.item(int(item["latent"]))])


def finish(cfg: VisualsConfig) -> str:
    """Write the page, and publish, unless that was done.

    Returns:
        URL of index.html.

    Raises:
        IncompleteError: a latent was not drawn.
    """
    return driver.finish(Drawing(cfg)).urls[0]


def find(cfg: VisualsConfig) -> str:
    """URL of the page if it is complete and up to date, else "".

    Raises:
        ConfigError: shards and inference do not fit together.
        StorageError: one of them is missing.
    """
    job = Drawing(cfg)
    return job.urls[0] if job.published() else ""


def book(cfg: VisualsConfig, max_bytes: int = 3_000_000) -> str:
    """The HTML text of a finished report with its pictures inside, for where it stands alone.

    Args:
        cfg: the config of the report.
        max_bytes: about the size of all pictures; as many latents are shown as fit.

    Raises:
        IncompleteError: the report is not finished.
    """
    return _book(cfg, max_bytes)


def run(cfg: VisualsConfig, progress: Progress | None = None) -> str:
    """All of it, in threads.

    Returns:
        URL of index.html.
    """
    return driver.run_job(Drawing(cfg), progress=progress).urls[0]


def run_all(cfgs: Sequence[VisualsConfig], progress: Progress | None = None) -> list[str]:
    """Draw several SAEs, which share the images: each is decoded once.

    Args:
        cfgs: one for each SAE. The pictures and pages are those of :func:`run`.
        progress: where progress is shown.

    Returns:
        URLs of the pages, in the order of the configs.

    Raises:
        SaevError: an SAE cannot be drawn. All others are.
    """
    return list(driver.run_job(Drawing(cfgs), progress=progress).urls) if cfgs else []


class Drawing(Job):
    """The reports of SAEs.

    Args:
        cfg: of one SAE, or of each.
        failed: the errors of further SAEs, which have no config.
    """

    name = "visuals"
    unit = "latent"

    def __init__(
        self,
        cfg: VisualsConfig | VisualsCommand | Sequence[VisualsConfig],
        failed: Sequence[SaevError] = (),
    ):
        cfgs = [cfg] if isinstance(cfg, VisualsConfig) else cfg
        cfgs = cfgs.configs() if isinstance(cfgs, VisualsCommand) else cfgs
        self._cfgs = tuple(dict.fromkeys(cfgs))
        self._asked = [self._cfgs.index(one) for one in cfgs]
        self._images = Images()
        self._failures = Failures(range(len(self._cfgs)), "SAEs", failed)
        self._firing: dict[tuple[int, int], Firing] = {}
        self._views: dict[int, Views] = {}

    @functools.cached_property
    def _opened(self) -> dict[int, Pictures]:
        """What each config is about, by its number."""
        found = {}
        for number, cfg in enumerate(self._cfgs):
            with self._failures.of(number):
                found[number] = Pictures(cfg, self._images)
        return found

    @property
    def _sound(self) -> dict[int, Pictures]:
        """The SAEs that have not failed."""
        opened = self._opened
        return {number: opened[number] for number in self._failures.left([*opened])}

    @property
    def title(self) -> str:
        n = len(self._cfgs)
        return f"{self.name} of {n} SAEs" if n > 1 else self.name

    @functools.cached_property
    def key(self) -> str:
        keys = []
        for number, one in self._sound.items():
            with self._failures.of(number):
                keys.append(one.key)
        return keys[0] if len(keys) == 1 else storage.content_hash(keys)

    @property
    def urls(self) -> tuple[str, ...]:
        sound = self._sound
        return tuple(sound[n].index_url for n in self._asked if n in sound)

    def published(self) -> bool:
        return len(self._published()) == len(self._sound)

    def there(self) -> tuple[str, ...]:
        found = self._published()
        return tuple(found[n].index_url for n in self._asked if n in found)

    def _published(self) -> dict[int, Pictures]:
        """The SAEs whose reports are complete."""
        found = {}
        for number, one in self._sound.items():
            with self._failures.of(number):
                if one.published():
                    found[number] = one
        return found

    def failure(self) -> SaevError | None:
        return self._failures.error()

    def result(self) -> Result:
        results = self.results()
        return results[0] if len(results) == 1 else Result(self.urls)

    def results(self) -> list[Result]:
        sound = self._sound
        return [
            Result((sound[n].index_url,), page=functools.partial(_book, sound[n].cfg))
            for n in self._asked
            if n in sound
        ]

    # --- Work ------------------------------------------------------------------------------

    @property
    def threads(self) -> int:
        return cores.available()

    def items(self) -> list[Item]:
        """One per latent."""
        found = []
        for number, one in self._sound.items():
            with self._failures.of(number):
                found += [self.item(latent, number) for latent in one.choice.latents]
        return found

    def item(self, latent: int, number: int = 0) -> Item:
        """A latent of an SAE."""
        if len(self._cfgs) == 1:
            return Item(f"latent {latent}", 1, {"latent": latent})
        name = f"latent {latent} of SAE {number + 1}"
        return Item(name, 1, {"latent": latent, "sae": number})

    def done(self, item: Item) -> bool:
        number, latent = _place(item)
        if number in self._failures:
            return True
        with self._failures.of(number):
            return self._opened[number].find_drawn(latent) is not None
        return True

    def begin(self, todo: Sequence[Item]) -> None:
        for number, one in self._sound.items():
            latents = [item.spec["latent"] for item in todo if _place(item)[0] == number]
            if not latents:
                continue
            firing: dict[int, Firing] = {}
            with self._failures.of(number):
                firing = one.prepare(latents)
                self._firing |= {(number, latent): found for latent, found in firing.items()}
                self._views[number] = one.views(firing.values())
            if firing:
                _ = one.source  # an error of it is one of all SAEs

    def work(self, item: Item, context: Context) -> None:
        number, latent = _place(item)
        if number in self._failures:
            return
        with self._alone(number, item, context.progress):
            firing = self._firing.get((number, latent))
            self._opened[number].draw(latent, firing, self._views[number])

    @contextlib.contextmanager
    def _alone(self, number: int, item: Item, progress: Progress) -> Iterator[None]:
        """A block about a latent, whose errors end the work for its SAE only."""
        said = f"{item.name} was drawn by another worker meanwhile"
        with (
            self._failures.of(number, progress.safe_point),
            driver.unless_done(lambda: self.done(item), said),
        ):
            yield

    def publish(self, progress: Progress) -> None:
        for number, one in self._sound.items():
            with self._failures.of(number, progress.safe_point, but=IncompleteError):
                if not one.published():
                    one.publish(progress)

    def close(self) -> None:
        self._firing.clear()
        self._views.clear()
        self._images.close()


def _place(item: Item) -> tuple[int, int]:
    """The number of the SAE of an item, and its latent."""
    return int(item.spec.get("sae", 0)), int(item.spec["latent"])


def _book(cfg: VisualsConfig, max_bytes: int) -> str:
    with contextlib.closing(Images()) as images:
        return Pictures(cfg, images).book(max_bytes)
