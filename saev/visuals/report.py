"""The page of one SAE and its stored images."""

import functools
import html
import importlib.resources
import logging
from collections.abc import Iterator

from saev import storage
from saev.config import VisualsConfig
from saev.errors import CorruptDataError, IncompleteError
from saev.explorer import page
from saev.explorer.pictures import StoredImages
from saev.once import say_once
from saev.parquet import TABLES, Tables, schema
from saev.progress import Progress
from saev.secrets import redact
from saev.visuals import choose, overview
from saev.visuals.files import DONE, EARLIER, INDEX, REPORT
from saev.visuals.opening import Opened
from saev.visuals.sheet import Sheet
from saev.visuals.stored import REMEDY, Pictures
from saev.visuals.views import Images, Views

logger = logging.getLogger(__name__)

FORMAT = 3
"""Raised when pages change, so that earlier ones are written again. Up to format 2, a page showed a
few chosen latents, and each of them had a folder of pictures."""


class Report:
    """The page of one SAE and its stored images.

    Args:
        cfg: the config.
        images: the images, which other SAEs show, too.

    Raises:
        ConfigError: shards and inference do not fit together.
        StorageError: one of them is missing.
    """

    def __init__(self, cfg: VisualsConfig, images: Images):
        self.cfg = cfg
        self._images = images
        self.opened = Opened(cfg, images)
        self.out = storage.normalize(cfg.out or storage.join(self.opened.results.url, REPORT))
        self.index_url = storage.join(self.out, INDEX)

    @functools.cached_property
    def key(self) -> str:
        """Hash of everything that the page depends on."""
        folder = importlib.resources.files("saev.explorer").joinpath("static")
        static = {file.name: _hash(file.read_text("utf-8")) for file in folder.iterdir()}
        cfg = {**self.cfg.identity(), "data": None}  # the pictures' key has what matters of it
        inference = self.opened.results.folder.checksum
        return _hash([FORMAT, self._pictures_key, inference, static, cfg])

    @functools.cached_property
    def _pictures_key(self) -> str:
        """Hash of everything that an image's pictures depend on."""
        opened = self.opened
        return _hash([opened.shards.metadata.hash, self.cfg.image_size, opened.other_data])

    @functools.cached_property
    def _named(self) -> choose.Images:
        return choose.images(self.cfg, self.opened.results, self.opened.choice.latents)

    @functools.cached_property
    def sheet(self) -> Sheet:
        """The images to store."""
        return Sheet(self.out, self._named.examples, self.cfg.image_size, self._pictures_key)

    @functools.cached_property
    def is_earlier(self) -> bool:
        """Whether an earlier version of saev made both the results and the report. Pages are now
        made from tables, which such results do not have. So the report stays as it is."""
        if self.opened.results.folder.has(TABLES):
            return False
        places = (storage.join(self.out, DONE), self.index_url)
        if not all(map(storage.exists, places)):
            return False
        say_once(
            logger,
            f"{self.out} stays as an earlier version of saev drew it, because the results that it "
            f"shows have no tables. For the page of this version, delete {self.opened.results.url} "
            "and run the same `saev inference` and `saev visuals` commands again.",
        )
        return True

    def published(self) -> bool:
        """Whether the report is complete and up to date."""
        if self.is_earlier:
            return True
        try:
            found = storage.find_sealed(storage.join(self.out, DONE))
            if found is None or found.record.get("key") != self.key:
                return False
            storage.Folder(self.out, DONE, found).read_bytes(INDEX)
        except CorruptDataError as err:
            logger.warning("%s The page is written again.", err)
            return False
        return True

    # --- Work ------------------------------------------------------------------------------

    def parts(self) -> range:
        """Numbers of the parts of the images."""
        return range(0 if self.is_earlier else self.sheet.n_parts)

    def views(self, parts: list[int]) -> Views:
        """A source of the images of some parts. Each image has to be taken from it once."""
        storage.check_writable(self.out)
        examples = (example for part in parts for example in self.sheet.examples(part))
        return self._images.views(self.opened.shards, self.cfg, examples)

    # --- Finish ----------------------------------------------------------------------------

    def publish(self, progress: Progress) -> None:
        """Write the list of images and the page.

        Raises:
            IncompleteError: a part of the images is missing.
        """
        tables, listed = self.sheet.join(self._named.n_named, self._missing)
        sae = self._sae(tables)._replace(home=overview.home_of(self.out))
        text = page.render([sae], self.cfg.max_mb, progress, strict=False).encode()
        before = self._before()
        progress.publish_point()
        storage.write_bytes(storage.join(self.out, TABLES), tables)
        storage.write_bytes(self.index_url, text)
        listed[INDEX] = storage.Listed.of(text)
        done = {
            "key": self.key,
            "config": self.cfg.to_dict(),
            "latents": list(self.opened.choice.latents),
            "n_latents": self.opened.results.d_sae,
            "n_pictures": len(self._named.examples),
        }
        storage.clean_temporary(self.out)
        progress.publish_point()
        storage.write_json(storage.join(self.out, DONE), storage.seal(done, listed))
        for url in self._superfluous(before, listed):
            storage.clean_up(url, recursive=True)

    def _before(self) -> storage.Sealed | None:
        """The closing object of the report that is replaced; None if there is none."""
        try:
            return storage.find_sealed(storage.join(self.out, DONE))
        except CorruptDataError:
            return None

    def _missing(self, part: int) -> IncompleteError:
        return IncompleteError(
            f"{self.out} is incomplete: part {part + 1} of {self.sheet.n_parts} of the pictures "
            "was not drawn. Run the same command again; what is done is kept."
        )

    def _superfluous(
        self, before: storage.Sealed | None, listed: dict[str, storage.Listed]
    ) -> Iterator[str]:
        """Files that the replaced report had, and that this one does not have."""
        old = set(before.files or ()) if before else set()
        if any(name.startswith(f"{EARLIER}/") for name in old):
            yield storage.join(self.out, EARLIER)
        for name in sorted(old - listed.keys()):
            if "/" not in name and name.startswith((schema.PICTURES, schema.THUMBS)):
                yield storage.join(self.out, name)

    def _sae(self, tables: bytes) -> page.Sae:
        opened = self.opened
        pictures = Pictures(Tables.open(self.out, tables, REMEDY))
        return page.Sae(
            self.cfg.run, opened.results, opened.shards, StoredImages(pictures),
            opened.mask_names(), opened.other_model, opened.choice.latents,
        )  # fmt: skip

    def book(self, max_bytes: int) -> str:
        """The page with at most so many bytes, for where it stands alone. It only says where the
        page is if the numbers of all latents take more, or if an earlier version drew it.

        Raises:
            IncompleteError: the report is not finished.
        """
        if self.is_earlier:
            return self._elsewhere("an earlier version of saev drew it")
        done = storage.find_sealed(storage.join(self.out, DONE))
        if done is None:
            raise self._missing(0)
        tables = storage.Folder(self.out, DONE, done, REMEDY).read_bytes(TABLES)
        text = page.render([self._sae(tables)], max_bytes / 1e6, strict=False)
        if len(text.encode()) <= max_bytes:
            return text
        return self._elsewhere(
            f"the numbers of its {self.opened.results.d_sae:,} latents take more than the "
            f"{max_bytes / 1e6:.1f} MB that there are here"
        )

    def _elsewhere(self, why: str) -> str:
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>saev</title>'
            f"<p>The page is not shown here, because {html.escape(why)}. It is at "
            f"<code>{html.escape(redact(self.index_url))}</code>; <code>saev open</code> shows it."
        )


def _hash(obj: object) -> str:
    return storage.content_hash(obj, 16)
