"""The shards stage: images in, a folder of recorded activations out.

A work item is one shard. It writes its activations, then a small record under parts/ that says the
shard is done; `finish` merges the records into the dataset's files and publishes shards.json.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import re
import typing as tp
from collections.abc import Callable

import numpy as np
import torch

from saev import storage, vit
from saev.config import ShardsConfig
from saev.device import choose_device
from saev.errors import ConfigError, CorruptDataError, IncompleteError, StorageError
from saev.images import Decoded, ImageDataset, Unreadable, iter_examples, open_dataset
from saev.progress import Progress
from saev.shards import earlier, parts, protocol
from saev.shards.forward import Forward
from saev.shards.parts import ExampleRow, Part, Skipped
from saev.shards.protocol import Metadata, shard_name
from saev.shards.reader import TORCH_DTYPES, Shards
from saev.shards.writer import ShardWriter
from saev.workers import unless_done

logger = logging.getLogger(__name__)

_LIBRARIES = ("saev", "torch", "timm", "open_clip_torch", "numpy", "pillow")

Item = dict[str, tp.Any]
"""One shard: {"shard": number, "start": first dataset index, "stop": last + 1}."""


def plan(cfg: ShardsConfig) -> list[Item]:
    """The work items, one per shard. Lists the dataset and loads the model; decodes no image.

    Raises:
        ConfigError, ModelError, StorageError: the images or the model are not as configured.
    """
    _recording.cache_clear()
    return _recording(cfg).plan()


def work(cfg: ShardsConfig, item: Item) -> None:
    """Record one shard, unless it is done.

    Raises:
        ImageError: an image cannot be decoded, and `skip_unreadable` is off.
        StorageError: something cannot be read or written.
        ModelError: an activation is not finite.
    """
    _recording(cfg).work(item)


def finish(cfg: ShardsConfig) -> str:
    """Check that all shards are there and publish; returns the URL of the folder.

    Raises:
        IncompleteError: a shard is not recorded yet.
        CorruptDataError: a shard or its record is damaged.
    """
    url = _recording(cfg).finish()
    _recording.cache_clear()  # the model's memory is for the next stage
    return url


def run(cfg: ShardsConfig, progress: Progress | None = None) -> str:
    """Do whatever is missing and publish; with `cfg.part` only that part, without publishing.

    Returns:
        URL of the shards folder.

    Raises:
        SaevError: see :func:`plan`, :func:`work` and :func:`finish`. What was finished is kept;
            the same call goes on from there.
    """
    return Recording(cfg).run(progress)


def _record(
    recording: "Recording", items: list[Item], part: tuple[int, int] | None, progress: Progress
) -> None:
    if part is not None:
        number, of = part
        items = items[len(items) * (number - 1) // of : len(items) * number // of]
    missing = [item for item in items if not recording.is_done(item["shard"])]
    total = sum(item["stop"] - item["start"] for item in items)
    done = total - sum(item["stop"] - item["start"] for item in missing)
    if done:
        logger.info("%d of %d images are recorded already.", done, total)
    with progress.task("shards", total=total, unit="img", done=done, is_main=True) as task:
        for item in missing:
            recording.work(item, lambda n, n_bytes: task.advance(n, n_bytes=n_bytes))
    for note in recording.dataset.notes():
        logger.warning(note)


def _parse_part(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= of:
        raise ConfigError(
            f"--part is {text!r}, expected I/N with I from 1 to N, such as 1/4 to 4/4."
        )
    return number, of


@functools.lru_cache(maxsize=1)
def _recording(cfg: ShardsConfig) -> "Recording":
    """So that one process loads model and dataset once for all its items."""
    return Recording(cfg)


class _DoneMeanwhileError(Exception):
    """Another worker was faster: nothing is written."""


class Recording:
    """A config with everything it refers to: dataset, model and the metadata they make.

    Args:
        cfg: the config.
    """

    def __init__(self, cfg: ShardsConfig):
        self.cfg = cfg

    @functools.cached_property
    def dataset(self) -> ImageDataset:
        """The images."""
        return open_dataset(self.cfg.data)

    @functools.cached_property
    def device(self) -> torch.device:
        """Where the model runs."""
        return choose_device(self.cfg.device)

    @functools.cached_property
    def model(self) -> vit.VisionModel:
        """The model, compared with the numbers in the config."""
        cfg = self.cfg
        model = vit.load(cfg.family, cfg.ckpt, image_size=cfg.image_size, device=self.device)
        vit.check_expectations(
            model,
            d_model=cfg.d_model,
            content_tokens_per_example=cfg.content_tokens_per_example,
        )
        return model

    @functools.cached_property
    def wanted(self) -> Metadata:
        """What this config records, with this version of saev."""
        cfg, dataset, model = self.cfg, self.dataset, self.model
        data = earlier.located(cfg.data.identity())
        if not data.get("version"):
            data.pop("version", None)  # data of no version has the name that it always had
        return Metadata(
            family=cfg.family,
            ckpt=cfg.ckpt,
            ckpt_checksum=model.ckpt_checksum,
            network=model.network,
            weights=model.weights,
            structure=model.structure,
            versions=versions(),
            layers=vit.resolve_layers(cfg.layers, model.n_layers),
            content_tokens_per_example=model.content_tokens_per_example,
            cls_token=cfg.cls_token and model.has_cls_token,
            d_model=model.d_model,
            n_examples=len(dataset),
            max_tokens_per_shard=cfg.max_tokens_per_shard,
            image_size=model.image_size,
            grid=model.grid,
            image_spec=json.loads(json.dumps(dataclasses.asdict(model.spec))),
            amp=cfg.amp,
            skip_unreadable=cfg.skip_unreadable,
            data=data,
            data_digest=dataset.digest,
            dataset=str(data.get("root") or data.get("name") or data["kind"]),
            pixel_agg=dataset.pixel_agg if dataset.has_masks else None,
            dtype=cfg.dtype,
        )

    @functools.cached_property
    def _folder(self) -> tuple[str, Metadata]:
        """Where it is recorded, and what is: in a folder of version 0.1.0 if there is one."""
        url = storage.join(self.cfg.shards_root, self.wanted.hash)
        if not storage.exists(storage.join(url, protocol.METADATA)):
            old = earlier.find(self.cfg.shards_root, self.wanted, self.model.network_before)
            if old is not None:
                return old
        return url, self.wanted

    @property
    def url(self) -> str:
        """The folder."""
        return self._folder[0]

    @property
    def metadata(self) -> Metadata:
        """The folder's metadata."""
        return self._folder[1]

    @property
    def _weights(self) -> str | None:
        """What the records of all shards must agree on; untrained weights are told by name."""
        return None if self.wanted.is_random else self.model.weights

    @property
    def published(self) -> bool:
        """Whether the folder is complete.

        Raises:
            CorruptDataError: it was published and is damaged.
        """
        return storage.exists(storage.join(self.url, protocol.SHARDS)) and self._is_intact

    @functools.cached_property
    def _is_intact(self) -> bool:
        """True; raises if the lists of the published folder, or its files' sizes, are wrong."""
        Shards.open(self.url)
        return True

    def run(self, progress: Progress | None = None) -> str:
        """See the module's :func:`run`."""
        part, progress = _parse_part(self.cfg.part), progress or Progress(quiet=True)
        with progress.doing("load the model, list the images"):
            is_published = self.published
        if not is_published:
            self.prepare()
            _record(self, self.plan(), part, progress)
            if part is not None:
                logger.info("Part %s of %s is recorded.", self.cfg.part, self.url)
                return self.url
        return self.finish(progress)

    def plan(self) -> list[Item]:
        """One work item per shard."""
        ranges = map(self.metadata.shard_range, range(self.metadata.n_shards))
        return [{"shard": i, "start": a, "stop": b} for i, (a, b) in enumerate(ranges)]

    def prepare(self) -> None:
        """Begin the folder: fails at once where nothing can be written."""
        place = storage.join(self.url, protocol.METADATA)
        if not storage.exists(place):
            storage.write_json(place, self.metadata.to_dict())
        for folder in (self.url, storage.join(self.url, protocol.PARTS)):
            storage.clean_temporary(folder)

    def is_done(self, shard: int) -> bool:
        """Whether a shard and its record are there and fit together; a damaged one is not."""
        try:
            parts.read_part(self.url, shard, self.metadata, self._weights)
        except CorruptDataError as err:
            logger.warning("Recording %s again: %s", shard_name(shard), err)
            return False
        except IncompleteError:
            return False
        return True

    def work(self, item: Item, advance: Callable[[int, int], None] | None = None) -> None:
        """Record one shard, unless it is done.

        Args:
            item: from :meth:`plan`.
            advance: told the number of images and of bytes after each batch.
        """
        shard = int(item["shard"])
        if not 0 <= shard < self.metadata.n_shards:
            raise ConfigError(f"There is no shard {shard}: there are {self.metadata.n_shards}.")
        if self.published or self.is_done(shard):
            return
        with unless_done(
            logger,
            lambda: self.published or self.is_done(shard),
            said=f"{shard_name(shard)} of {self.url} was recorded by another worker meanwhile",
            errors=(StorageError, _DoneMeanwhileError),
        ):
            self.prepare()
            parts.write_part(self.url, shard, self._write_shard(shard, advance))

    def _write_shard(self, shard: int, advance: Callable[[int, int], None] | None) -> Part:
        meta = self.metadata
        start, stop = meta.shard_range(shard)
        examples: list[ExampleRow] = []
        skipped: list[Skipped] = []
        labels: list[np.ndarray] = []
        place = storage.join(self.url, shard_name(shard))
        with contextlib.ExitStack() as stack:
            decoded = stack.enter_context(contextlib.closing(self._decode(start, stop, skipped)))
            writer = stack.enter_context(ShardWriter(place, meta, stop - start))
            batches = stack.enter_context(contextlib.closing(self._forward(decoded)))
            n_reported = 0
            for group, acts in batches:
                writer.write(acts)
                examples.extend(map(self._row, group))
                labels.extend(one.labels for one in group if one.labels is not None)
                if advance is not None:
                    advance(len(examples) + len(skipped) - n_reported, acts.nbytes)
                    n_reported = len(examples) + len(skipped)
            if self.published or self.is_done(shard):  # its bytes may differ from ours, on a GPU
                raise _DoneMeanwhileError
        return Part(
            writer.written,
            examples,
            skipped,
            None if meta.pixel_agg is None else _stack(labels, meta.content_tokens_per_example),
            self.model.weights,
        )

    def _decode(
        self, start: int, stop: int, skipped: list[Skipped]
    ) -> tp.Generator[Decoded, None, None]:
        """Decoded images in order; what is unreadable goes to ``skipped``."""
        records = iter_examples(
            self.dataset,
            range(start, stop),
            self.model.spec,
            grid=self.model.grid,
            n_workers=self.cfg.n_workers,
            # A GPU takes a batch at once: the next one is decoded meanwhile.
            look_ahead=0 if self.device.type == "cpu" else self.cfg.batch_size,
            skip_unreadable=self.cfg.skip_unreadable,
        )
        with contextlib.closing(records):
            for record in records:
                if isinstance(record, Unreadable):
                    logger.warning("Skipped: %s", record.reason)
                    skipped.append(Skipped(record.index, record.url, record.reason))
                else:
                    yield record

    @property
    def _forward(self) -> Forward[Decoded]:
        meta, model = self.metadata, self.model
        return Forward(
            lambda images: model.record(images, meta.layers, meta.cls_token),
            lambda example: example.pixels,
            device=self.device,
            dtype=TORCH_DTYPES[meta.dtype],
            batch_size=self.cfg.batch_size,
            amp=meta.amp,
        )

    def _row(self, example: Decoded) -> ExampleRow:
        info = self.dataset.example(example.index)
        digest = self.dataset.row_digest(example.index)
        return ExampleRow(
            example.index, info.url, info.label, info.target, example.height, example.width, digest
        )

    def finish(self, progress: Progress | None = None) -> str:
        """Publish, if that is still to be done, and remove what only unfinished folders need."""
        progress = progress or Progress(quiet=True)
        if not self.published:
            n = self.metadata.n_shards
            with (
                unless_done(logger, lambda: self.published),
                progress.task("verify", total=n, unit="shard") as task,
            ):
                parts.publish(
                    self.url,
                    self.metadata,
                    n,
                    self._weights,
                    ready=progress.publish_point,
                    seen=task.advance,
                )
            _ = self._is_intact
        logger.info("%s is complete.", self.url)
        storage.clean_up(storage.join(self.url, protocol.PARTS), recursive=True)
        storage.clean_temporary(self.url)
        return self.url


def versions() -> dict[str, str]:
    """Versions of what decides about activations: this package and the libraries below it."""
    found = {}
    for package in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _stack(labels: list[np.ndarray], n_tokens: int) -> np.ndarray:
    return np.stack(labels) if labels else np.zeros((0, n_tokens), np.uint8)
