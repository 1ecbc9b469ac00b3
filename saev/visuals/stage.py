"""The visuals stage: it stores the images on which latents of an SAE fire, and makes its page.

An item is a part of the images of one SAE. An image that several SAEs show is decoded once for all
of them. An SAE whose pictures cannot be drawn fails alone.
"""

import concurrent.futures
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
from saev.visuals.report import Report
from saev.visuals.stored import Stored
from saev.visuals.views import Images, Views


def plan(cfg: VisualsConfig) -> list[dict[str, tp.Any]]:
    """The work items, ``{"part": number}``.

    Raises:
        ConfigError: a latent does not exist, or shards and inference do not fit together.
        StorageError: one of them is missing.
    """
    return [item.spec for item in Drawing(cfg).items()]


def work(cfg: VisualsConfig, item: tp.Mapping[str, tp.Any]) -> None:
    """Draw one part of the images, unless it is drawn. See :func:`run` for all of them.

    Raises:
        ImageError: an original image cannot be decoded or is not the recorded one.
        StorageError: one is gone, or the result cannot be written.
    """
    job = Drawing(cfg)
    driver.do_items(job, [job.item(int(item["part"]))])


def finish(cfg: VisualsConfig) -> str:
    """Write the page and publish it. Does nothing if that was done.

    Returns:
        URL of index.html.

    Raises:
        IncompleteError: a part of the images was not drawn.
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


def book(cfg: VisualsConfig, max_bytes: int = 5_000_000) -> str:
    """The HTML text of a finished report in another size.

    Args:
        cfg: the config of the report.
        max_bytes: about its size; as many pictures are in it as fit.

    Raises:
        IncompleteError: the report is not finished.
    """
    return _book(cfg, max_bytes)


def run(cfg: VisualsConfig, progress: Progress | None = None) -> str:
    """Draw all parts that are not drawn, then :func:`finish`.

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
    """The pages of SAEs.

    Args:
        cfg: of one SAE, or of each.
        failed: the errors of further SAEs, which have no config.
    """

    name = "visuals"
    unit = "img"

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
        self._views: dict[int, Views] = {}

    @functools.cached_property
    def _opened(self) -> dict[int, Report]:
        """The report of each config, by the number of the config."""
        found = {}
        for number, cfg in enumerate(self._cfgs):
            with self._failures.of(number):
                found[number] = Report(cfg, self._images)
        return found

    @property
    def _sound(self) -> dict[int, Report]:
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

    def _published(self) -> dict[int, Report]:
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

    def items(self) -> list[Item]:
        """One for each part of each SAE's images."""
        found = []
        for number, one in self._sound.items():
            with self._failures.of(number):
                found += [self.item(part, number) for part in one.parts()]
        return found

    def item(self, part: int, number: int = 0) -> Item:
        """A part of an SAE's images."""
        cost = len(self._opened[number].sheet.examples(part))
        if len(self._cfgs) == 1:
            return Item(f"part {part + 1} of the pictures", cost, {"part": part})
        name = f"part {part + 1} of the pictures of SAE {number + 1}"
        return Item(name, cost, {"part": part, "sae": number})

    def done(self, item: Item) -> bool:
        number, part = _place(item)
        if number in self._failures:
            return True
        with self._failures.of(number):
            return self._opened[number].sheet.find(part) is not None
        return True

    def begin(self, todo: Sequence[Item]) -> None:
        for number, one in self._sound.items():
            parts = [item.spec["part"] for item in todo if _place(item)[0] == number]
            if parts:
                with self._failures.of(number):
                    self._views[number] = one.views(parts)
                _ = one.opened.source  # images that cannot be opened are an error of all SAEs

    def work(self, item: Item, context: Context) -> None:
        number, part = _place(item)
        if number in self._failures:
            return
        with self._alone(number, item, context.progress):
            sheet = self._opened[number].sheet
            sheet.write(part, self._drawn(self._views[number], sheet.examples(part), context))

    def _drawn(self, views: Views, examples: Sequence[int], context: Context) -> Iterator[Stored]:
        """The images of a part, in order, made in threads."""
        pool = concurrent.futures.ThreadPoolExecutor(cores.available(), "saev-pictures")
        try:
            for image in pool.map(views.get, examples):
                context.progress.safe_point()
                context.bar.advance(1)
                yield image
        finally:
            pool.shutdown(cancel_futures=True)

    @contextlib.contextmanager
    def _alone(self, number: int, item: Item, progress: Progress) -> Iterator[None]:
        """A block about a part, whose errors end the work for its SAE only."""
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
        self._views.clear()
        self._images.close()


def _place(item: Item) -> tuple[int, int]:
    """The number of the SAE of an item, and the part."""
    return int(item.spec.get("sae", 0)), int(item.spec["part"])


def _book(cfg: VisualsConfig, max_bytes: int) -> str:
    with contextlib.closing(Images()) as images:
        return Report(cfg, images).book(max_bytes)
