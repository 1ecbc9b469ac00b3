"""The shards stage: records the activations of an image dataset into a folder.

An item is one shard. It writes its activations, and then a small record under parts/, which marks
the shard as done. Publishing merges the records into the files of the folder and writes
shards.json.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import typing as tp
from collections.abc import Callable, Sequence

import numpy as np
import torch

from saev import driver, known, storage, vit
from saev.config import ShardsConfig
from saev.device import choose_device, computes_in_bfloat16
from saev.errors import ConfigError, CorruptDataError, IncompleteError
from saev.images import Decoded, ImageDataset, Unreadable, iter_examples, open_dataset
from saev.once import say_once
from saev.progress import Progress
from saev.shards import earlier, parts, protocol
from saev.shards.forward import Forward
from saev.shards.parts import ExampleRow, Part, Skipped
from saev.shards.protocol import Metadata, shard_name
from saev.shards.reader import TORCH_DTYPES, Shards
from saev.shards.writer import ShardWriter
from saev.stage import Context, DoneMeanwhileError, Item, Job, Result

logger = logging.getLogger(__name__)

_LIBRARIES = ("saev", "torch", "timm", "open_clip_torch", "numpy", "pillow")
_HOW = ("shards_root", "batch_size", "n_workers", "device", "part", "data")
"""Keys of a config that do not affect the activations, and `data`, which is compared separately."""


def run(cfg: ShardsConfig, progress: Progress | None = None) -> str:
    """Record the missing shards and publish. With `cfg.part`, record only that part.

    Returns:
        URL of the shards folder.

    Raises:
        ConfigError, ModelError: the images or the model are not as configured.
        ImageError: an image cannot be decoded, and `skip_unreadable` is off.
        StorageError: something cannot be read or written, or a shard is damaged. Finished shards
            are kept, and the same call continues from there.
    """
    return driver.run_job(Recording(cfg), cfg.part, progress).urls[0]


class Recording(Job):
    """The job of the shards stage: a config with its dataset, model and metadata.

    Args:
        cfg: the config.
    """

    name = "shards"
    opening = "load the model, list the images"
    unit = "img"

    def __init__(self, cfg: ShardsConfig):
        self.cfg = cfg

    @functools.cached_property
    def dataset(self) -> ImageDataset:
        """The images."""
        return open_dataset(self.cfg.data)

    @functools.cached_property
    def device(self) -> torch.device:
        """Device of the model."""
        return choose_device(self.cfg.device)

    @functools.cached_property
    def model(self) -> vit.VisionModel:
        """The model, after comparing its sizes with those in the config."""
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
        """Metadata of this recording, as this version of saev writes them."""
        cfg, dataset, model, data = self.cfg, self.dataset, self.model, self._data
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

    @property
    def _data(self) -> dict[str, tp.Any]:
        """The dataset's config, with absolute paths instead of relative ones."""
        data = earlier.located(self.cfg.data.identity())
        if not data.get("version"):
            data.pop("version", None)  # keeps the hash of data without a version
        return data

    @functools.cached_property
    def _question(self) -> known.Question | None:
        """All inputs of the folder's name that are known without loading the model."""
        weights = vit.identity(self.cfg.family, self.cfg.ckpt)
        if weights is None:
            return None
        dataset = self.dataset
        config = {k: v for k, v in self.cfg.identity().items() if k not in _HOW}
        images = [self._data, dataset.digest, len(dataset), dataset.has_masks, dataset.pixel_agg]
        return {"config": config, "weights": weights, "images": images, "versions": versions()}

    @functools.cached_property
    def _known(self) -> Shards | None:
        """The complete folder that an equal config has made before; None if there is none."""
        root = self.cfg.shards_root
        entries = storage.list_dir(root) if storage.is_dir(root) else []
        folders = [entry.url for entry in entries if entry.is_dir]
        question = self._question if folders else None
        found = known.find(folders, question) if question is not None else None
        if found is None or not storage.exists(storage.join(found.url, protocol.SHARDS)):
            return None
        shards = Shards.open(found.url)
        return shards if shards.metadata.hash == found.key else None

    @functools.cached_property
    def _folder(self) -> tuple[str, Metadata]:
        """URL and metadata of the folder. A matching folder of version 0.1.0 is used if there is
        one."""
        if self._known is not None:
            return self._known.url, self._known.metadata
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
    def urls(self) -> tuple[str, ...]:
        return (self.url,)

    @property
    def key(self) -> str:
        return storage.name(self.url)

    @property
    def metadata(self) -> Metadata:
        """The folder's metadata."""
        return self._folder[1]

    @property
    def _weights(self) -> str | None:
        """Checksum of weights that the records of all shards must have. None for untrained weights,
        which are identified by the network's name."""
        return None if self.wanted.is_random else self.model.weights

    def published(self) -> bool:
        is_there = storage.exists(storage.join(self.url, protocol.SHARDS))
        return is_there and self._complete is not None

    @functools.cached_property
    def _complete(self) -> Shards:
        """The published folder. Raises CorruptDataError if its lists or file sizes are wrong."""
        return self._known or Shards.open(self.url)

    def result(self) -> Result:
        shards = self._complete
        figures = {
            "n_examples": shards.n_examples,
            "n_tokens": shards.n_examples * shards.tokens_per_example,
            "n_layers": len(shards.metadata.layers),
            "d_model": shards.metadata.d_model,
            "n_shards": len(shards.infos),
            "gigabytes": sum(info.n_bytes or 0 for info in shards.infos) / 1e9,
        }
        return Result(self.urls, figures)

    def items(self) -> list[Item]:
        """One per shard."""
        return [self.item(shard) for shard in range(self.metadata.n_shards)]

    def item(self, shard: int) -> Item:
        """One shard. Raises ConfigError if there is no such shard."""
        if not 0 <= shard < self.metadata.n_shards:
            raise ConfigError(f"There is no shard {shard}: there are {self.metadata.n_shards}.")
        start, stop = self.metadata.shard_range(shard)
        spec = {"shard": shard, "start": start, "stop": stop}
        return Item(shard_name(shard), stop - start, spec)

    def outlook(self, todo: Sequence[Item]) -> list[str]:
        meta = self.metadata
        n = round(sum(item.cost for item in todo))
        n_vectors = n * meta.tokens_per_example * len(meta.layers)
        n_bytes = n_vectors * meta.d_model * TORCH_DTYPES[meta.dtype].itemsize
        layers = ", ".join(map(str, meta.layers))
        lines = [
            f"Recording {n:,} images: {n * meta.content_tokens_per_example:,} patches, "
            f"layer{'s' * (len(meta.layers) > 1)} {layers}, {n_bytes / 1e6:,.1f} MB."
        ]
        if self.device.type == "cpu" and not meta.amp and computes_in_bfloat16():
            lines.append(
                "This CPU computes in bfloat16 itself: --amp (amp = true under [shards] of a "
                "config) records faster, rounds more, and makes shards of their own."
            )
        return lines

    def begin(self, todo: Sequence[Item] = ()) -> None:
        """Write the metadata, which fails at once if the folder is not writable."""
        place = storage.join(self.url, protocol.METADATA)
        if not storage.exists(place):
            storage.write_json(place, self.metadata.to_dict())
        for folder in (self.url, storage.join(self.url, protocol.PARTS)):
            storage.clean_temporary(folder)

    def done(self, item: Item) -> bool:
        """Whether a shard and its record exist and fit together. A damaged shard is not done."""
        shard = item.spec["shard"]
        try:
            parts.read_part(self.url, shard, self.metadata, self._weights)
        except CorruptDataError as err:
            logger.warning("Recording %s again: %s", shard_name(shard), err)
            return False
        except IncompleteError:
            return False
        return True

    def work(self, item: Item, context: Context) -> None:
        if not self.published():
            part = self._write_shard(item, lambda n, b: context.bar.advance(n, n_bytes=b))
            parts.write_part(self.url, item.spec["shard"], part)

    def _write_shard(self, item: Item, advance: Callable[[int, int], None]) -> Part:
        meta = self.metadata
        shard, start, stop = (item.spec[key] for key in ("shard", "start", "stop"))
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
                advance(len(examples) + len(skipped) - n_reported, acts.nbytes)
                n_reported = len(examples) + len(skipped)
            # Another worker's shard must not be replaced: on a GPU its bytes may differ from ours.
            if self.published() or self.done(item):
                raise DoneMeanwhileError
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
        """Decoded images in order. Unreadable images are added to ``skipped``."""
        records = iter_examples(
            self.dataset,
            range(start, stop),
            self.model.spec,
            grid=self.model.grid,
            n_workers=self.cfg.n_workers,
            # While a GPU processes a batch, the next batch is decoded.
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

    def publish(self, progress: Progress) -> None:
        n = self.metadata.n_shards
        with progress.task("verify", total=n, unit="shard") as task:
            parts.publish(
                self.url,
                self.metadata,
                n,
                self._weights,
                ready=progress.publish_point,
                seen=task.advance,
            )

    def tidy(self, items: Sequence[Item]) -> None:
        for note in self.dataset.notes():
            say_once(logger, note)
        if not self.published():
            return
        storage.clean_up(storage.join(self.url, protocol.PARTS), recursive=True)
        storage.clean_temporary(self.url)
        if self._known is None and self._question is not None:
            known.note(self.url, self._question, self.metadata.hash)

    def close(self) -> None:
        self.__dict__.pop("model", None)  # frees its memory for the next stage


def versions() -> dict[str, str]:
    """Versions of saev and of the libraries that affect activations."""
    found = {}
    for package in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _stack(labels: list[np.ndarray], n_tokens: int) -> np.ndarray:
    return np.stack(labels) if labels else np.zeros((0, n_tokens), np.uint8)
