"""The pictures and the page of one SAE."""

import base64
import concurrent.futures
import dataclasses
import functools
import importlib.resources
import logging
import typing as tp

import numpy as np

from saev import storage
from saev.config import VisualsConfig
from saev.config.source import ActivationSource, check
from saev.errors import ConfigError, CorruptDataError, IncompleteError
from saev.inference.results import Results, TopExamples
from saev.progress import Progress
from saev.shards import protocol
from saev.visuals import heading, overview, page, render
from saev.visuals.choose import Choice, choose
from saev.visuals.records import (
    DONE,
    RECORD,
    ClassShare,
    ExamplePictures,
    Histogram,
    LatentRecord,
    folder_name,
)
from saev.visuals.source import Source, View
from saev.visuals.views import Images, Shown, Views

logger = logging.getLogger(__name__)

FORMAT = 2
"""Goes up when the pictures change, so that old ones are drawn again. Version 1 did not compare the
images' names and labels with what was recorded."""
INDEX = "index.html"

_REMEDY = f"Delete the {RECORD} of its latent and run the same command again."

_N_READERS = 16
"""Records that are read at a time."""
VALUE_BINS = 32
_MAX_CODES_BYTES = 256 << 20
_SMALLEST_SHARE = 0.005  # classes that cover less of a picture are left out of its legend


class Firing(tp.NamedTuple):
    """What is shown of a latent that fires."""

    top: TopExamples
    """Its best images."""
    values: Histogram | None
    """Its values."""


class _Drawn(tp.NamedTuple):
    """A latent that is drawn and up to date."""

    record: LatentRecord
    listed: storage.Listed
    """Of the record's bytes."""


class Pictures:
    """The pictures and the page of one SAE. Images are opened when a latent is to be drawn.

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
        self.shards = images.shards(cfg.shards)
        self.results = self._open_results()
        self.inference_url = self.results.url
        self.other_model = self._check_model()
        self.out = storage.normalize(cfg.out or storage.join(self.inference_url, "report"))
        self.index_url = storage.join(self.out, INDEX)

    def _open_results(self) -> Results:
        shards_hash = self.shards.metadata.hash
        if not self.cfg.inference:
            run = storage.normalize(self.cfg.run)
            return Results.find(run, shards_hash, self.shards.url)
        results = Results.open(self.cfg.inference)
        found = results.metrics.get("shards_hash")
        if found != shards_hash:
            raise ConfigError(
                f"{results.url} was measured on shards {found}, but --shards {self.shards.url} are "
                f"{shards_hash}. Give the shards that inference ran on."
            )
        return results

    def _check_model(self) -> tuple[str, ...]:
        """In what the activations differ from those of training, where that was allowed."""
        trained_on = self.results.trained_on(self.cfg.run)
        if trained_on is None:
            return ()
        return check(
            trained_on, self.activations, sae=f"The SAE at {storage.normalize(self.cfg.run)}",
            shards=self.shards.url, allow=self.cfg.allow_other_model,
        )  # fmt: skip

    @property
    def activations(self) -> ActivationSource:
        """What was measured on."""
        metrics = self.results.metrics
        return self.shards.metadata.source(metrics.get("layer"), metrics.get("tokens"))

    @functools.cached_property
    def choice(self) -> Choice:
        return choose(self.cfg, self.results.frequency, self.results.mean_values)

    @property
    def source(self) -> Source:
        """The images. They are opened when this is asked for first, for any SAE."""
        return self._images.source(self.shards, self.cfg.data)

    @functools.cached_property
    def _pictures_key(self) -> str:
        """Hash of everything that a latent's pictures depend on, the choice of latents apart."""
        return _hash(
            {
                "format": FORMAT,
                "inference": self.results.folder.checksum,
                "shards": self.shards.metadata.hash,
                "n_top": self.cfg.n_top,
                "image_size": self.cfg.image_size,
                "data": self._other_data,
            }
        )

    @property
    def _other_data(self) -> tp.Any:
        """The dataset's config in the key: None if it is the recorded one, wherever it lies."""
        given = self.cfg.identity()["data"]
        if given is None or self.shards.metadata.data_digest is None:
            return given
        plain, recorded = map(_without_place, (given, self.shards.metadata.data))
        return None if plain == recorded else plain

    @functools.cached_property
    def key(self) -> str:
        """Hash of everything that the page depends on."""
        folder = importlib.resources.files("saev.visuals").joinpath("templates")
        templates = {file.name: _hash(file.read_text("utf-8")) for file in folder.iterdir()}
        cfg = {**self.cfg.identity(), "data": None}  # the pictures' key has what matters of it
        return _hash({"pictures": self._pictures_key, "templates": templates, "config": cfg})

    def published(self) -> bool:
        """Whether the whole report is there and up to date."""
        done = storage.join(self.out, DONE)
        if not (storage.exists(done) and storage.exists(self.index_url)):
            return False
        try:
            folder = storage.Folder.open(self.out, DONE)
            if folder.files is not None:
                folder.read_bytes(INDEX)
        except CorruptDataError as err:
            logger.warning("%s The page is written again.", err)
            return False
        return folder.record.get("key") == self.key

    # --- Work ------------------------------------------------------------------------------

    def prepare(self, latents: tp.Sequence[int]) -> dict[int, Firing]:
        """Read what pages show of latents, before threads draw them. Those that never fire are left
        out."""
        storage.check_writable(self.out)
        _ = self._pictures_key
        firing = [latent for latent in latents if self.results.frequency[latent] > 0]
        if not firing:
            return {}
        results = Results.open(self.results.url)  # its arrays are large, and needed only here
        tops = {latent: results.top(latent) for latent in firing}
        values = _all_values(results, firing)
        return {n: Firing(top, _histogram(values.get(n), top)) for n, top in tops.items()}

    def views(self, latents: tp.Iterable[Firing]) -> Views:
        """What gives the images of latents, each of which is going to be asked for."""
        examples = (int(e) for one in latents for e in one.top.example_idx[: self.cfg.n_top])
        return self._images.views(self.shards, self.cfg, examples)

    def draw(self, latent: int, firing: Firing | None, views: Views) -> None:
        """Write a latent's pictures, and its record last.

        Args:
            latent: its number.
            firing: what is shown of it, from :meth:`prepare`; None if it never fires.
            views: gives these images.
        """
        frequency = float(self.results.frequency[latent])
        max_value = float(self.results.max_values[latent])
        examples: list[ExamplePictures] = []
        listed: dict[str, storage.Listed] = {}
        if firing is not None:
            top = firing.top
            for rank in range(min(self.cfg.n_top, len(top.example_idx))):
                shown = views.get(int(top.example_idx[rank]))
                examples.append(self._draw_example(latent, rank, top, max_value, shown, listed))
        mean = float(self.results.mean_values[latent])
        record = LatentRecord(
            key=self._pictures_key,
            latent=latent,
            frequency=frequency,
            mean_value=mean if frequency > 0 and np.isfinite(mean) else None,
            max_value=max_value if frequency > 0 else 0.0,
            values=firing.values if firing else None,
            examples=tuple(examples),
        )
        place = self._record_url(latent)
        storage.clean_temporary(storage.parent(place))  # of a process that was killed
        storage.write_json(place, storage.seal(record.to_dict(), listed))

    def _find_all(self, latents: tp.Sequence[int]) -> list[_Drawn | None]:
        """The records of latents; None for one that is not drawn or not up to date."""
        _ = self._pictures_key  # opens what threads would otherwise open once each
        with concurrent.futures.ThreadPoolExecutor(_N_READERS, "saev-records") as pool:
            return list(pool.map(self.find_drawn, latents))

    def find_drawn(self, latent: int) -> _Drawn | None:
        url = self._record_url(latent)
        found = storage.find_sealed(url, remedy=_REMEDY)
        if found is None or found.record.get("key") != self._pictures_key:
            return None
        try:
            record = LatentRecord.from_dict(found.record, source=url)
        except ConfigError as err:
            raise CorruptDataError(f"{err}. Delete it and run the same command again.") from err
        if record.latent != latent:
            raise CorruptDataError(
                f"{url} is of latent {record.latent}, expected {latent}. Delete it and run the "
                "same command again."
            )
        return _Drawn(record, found.listed)

    def _record_url(self, latent: int) -> str:
        return storage.join(self.out, folder_name(latent), RECORD)

    def _draw_example(
        self,
        latent: int,
        rank: int,
        top: TopExamples,
        max_value: float,
        shown: Shown,
        listed: dict[str, storage.Listed],
    ) -> ExamplePictures:
        """Write the pictures of one image, which are added to ``listed``."""
        example = int(top.example_idx[rank])
        view, plain = shown.view, shown.plain
        acts = np.asarray(top.token_acts[rank]).reshape(self.shards.metadata.grid_shape)
        highlight = render.highlight(plain, acts, max_value)
        pictures = {"plain": shown.data}
        pictures["highlight"] = shown.data if highlight is plain else render.encode(highlight)
        if view.mask is not None:
            segmentation = render.segmentation(plain, view.mask, acts)
            pictures["segmentation"] = render.encode(segmentation)
        names = {}
        for kind, data in pictures.items():
            names[kind] = f"{rank:02d}-{kind}.webp"
            url = storage.join(self.out, folder_name(latent), names[kind])
            storage.write_bytes(url, data)
            listed[names[kind]] = storage.Listed.of(data)
        return ExamplePictures(
            rank=rank,
            example=example,
            index=view.index,
            name=view.name,
            label=view.label,
            value=float(top.value[rank]),
            n_firing=int(np.count_nonzero(acts)),
            n_patches=acts.size,
            firing_label=self._firing_label(view, acts),
            plain=names["plain"],
            highlight=names["highlight"],
            segmentation=names.get("segmentation"),
            classes=self._classes(view.mask),
            height=plain.height,
            width=plain.width,
        )

    def _firing_label(self, view: View, acts: np.ndarray) -> str:
        if view.token_labels is None or not acts.any():
            return ""
        label = int(view.token_labels.flat[int(acts.argmax())])
        # A bare number says less than the image's own class.
        return self.source.class_names.get(label, "" if view.label else f"class {label}")

    def _classes(self, mask: np.ndarray | None) -> tuple[ClassShare, ...]:
        if mask is None:
            return ()
        shares = np.bincount(mask.ravel(), minlength=256) / mask.size
        order = np.argsort(-shares, kind="stable")
        return tuple(
            ClassShare(
                label=int(label),
                name=self.source.class_name(int(label)),
                share=round(float(shares[label]), 4),
            )
            for label in order
            if shares[label] >= _SMALLEST_SHARE
        )

    # --- Finish ----------------------------------------------------------------------------

    def publish(self, progress: Progress) -> None:
        drawn = self._drawn()
        report = self._report([record for record, _ in drawn], self._note())
        report = dataclasses.replace(report, home=overview.home_of(self.out))
        text = page.build(report).encode()
        progress.publish_point()
        storage.write_bytes(self.index_url, text)
        listed = {INDEX: storage.Listed.of(text)}
        for record, row in drawn:
            listed[f"{folder_name(record.latent)}/{RECORD}"] = row
        done = {
            "key": self.key,
            "config": self.cfg.to_dict(),
            "latents": list(self.choice.latents),
        }
        storage.clean_temporary(self.out)
        progress.publish_point()
        storage.write_json(storage.join(self.out, DONE), storage.seal(done, listed))

    def _drawn(self) -> list[_Drawn]:
        """What is known of all latents, which have to be drawn."""
        latents = self.choice.latents
        found = self._find_all(latents)
        if None in found:
            raise IncompleteError(
                f"{self.out} is incomplete: latent {latents[found.index(None)]} was not drawn. Run "
                "the same command again; what is done is kept."
            )
        return [drawn for drawn in found if drawn is not None]

    def _report(self, records: list[LatentRecord], note: str) -> page.Report:
        return page.Report(
            **heading.of(self.cfg.run, self.results, self.shards, self.activations)._asdict(),
            records=records,
            explicit=self.choice.explicit,
            frequency=self.results.frequency,
            other_model=self.other_model,
            activations=f"Activations: {self.activations.described}",
            note=note,
        )

    def book(self, max_bytes: int) -> str:
        records = [record for record, _ in self._drawn()]
        pictures: dict[str, str] = {}
        shown: list[LatentRecord] = []
        n_bytes = 0
        for record in records:
            found = self._inlined(record)
            n_bytes += sum(map(len, found.values()))
            if shown and n_bytes > max_bytes:
                break
            shown.append(record)
            pictures |= found
        note = self._note()
        if len(shown) < len(records):
            note = (
                f"The first {len(shown)} of {len(records)} latents; all of them are in "
                f"{self.index_url}."
            )
        return page.build(self._report(shown, note), pictures.__getitem__)

    def _inlined(self, record: LatentRecord) -> dict[str, str]:
        """Pictures of a latent as data URIs, by their path in the report."""
        names = _pictures(record)
        if not names:
            return {}
        place = storage.join(self.out, folder_name(record.latent))
        folder = storage.Folder.open(place, RECORD, _REMEDY)
        return {f"{folder_name(record.latent)}/{name}": _inline(folder, name) for name in names}

    def _note(self) -> str:
        if self.choice.latents:
            return ""
        low, high = self.cfg.log_freq_range
        return (
            f"No latent has a log10 frequency between {low:g} and {high:g} and a log10 mean value "
            f"between {self.cfg.log_value_range[0]:g} and {self.cfg.log_value_range[1]:g}. Widen "
            "--log-freq-range or --log-value-range, or name latents with --latents."
        )


def _inline(folder: storage.Folder, name: str) -> str:
    """A picture as a data URI."""
    url = storage.inside(folder.url, name)
    data = folder.read_bytes(name)
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise CorruptDataError(
            f"{url} is not a WebP picture. Delete {RECORD} beside it and run the same command "
            "again."
        )
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def _pictures(record: LatentRecord) -> list[str]:
    """File names of a latent's pictures."""
    return [n for e in record.examples for n in (e.plain, e.highlight, e.segmentation) if n]


def _without_place(data: tp.Any) -> tp.Any:
    """A dataset's config without what the images' digest covers, or where they lie."""
    plain = protocol.without_place(data)
    if not isinstance(plain, dict):
        return plain
    return {k: v for k, v in plain.items() if k not in ("name", "version")}


def _hash(obj: tp.Any) -> str:
    return storage.content_hash(obj, 16)


def _all_values(results: Results, latents: tp.Sequence[int]) -> dict[int, np.ndarray]:
    """All values of latents, as far as inference kept them in a size to load."""
    chosen = np.array(latents, dtype=np.int64)
    if 0 < results.codes_bytes <= _MAX_CODES_BYTES:
        columns = results.codes()[:, chosen].tocsc()
    else:
        kept = results.distributions()
        is_chosen = np.isin(kept.latents, chosen)
        chosen, columns = kept.latents[is_chosen], kept.values.tocsc()[:, is_chosen]
    return {
        int(latent): columns.data[columns.indptr[i] : columns.indptr[i + 1]]
        for i, latent in enumerate(chosen)
    }


def _histogram(known: np.ndarray | None, top: TopExamples) -> Histogram | None:
    """Of the values of a latent.

    Args:
        known: all of them; None if only those of its best images are known.
        top: its best images.
    """
    if known is not None:
        values, source = known, "all tokens"
    else:
        values = top.token_acts[top.token_acts != 0]
        source = f"tokens of its top {len(top.token_acts)} images"
    if not len(values):
        return None
    low, high = min(0.0, float(values.min())), float(values.max())
    if not low < high:
        return None
    counts, _ = np.histogram(values, bins=VALUE_BINS, range=(low, high))
    return Histogram(low=low, high=high, counts=tuple(int(c) for c in counts), source=source)
