"""The HTML file of the explorer: data, pictures, script and style in one."""

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import json
import logging
import math
import typing as tp
from collections.abc import Sequence

import numpy as np

from saev import storage
from saev.config import VisualsConfig
from saev.config.pages import ReportConfig
from saev.errors import ConfigError
from saev.explorer import pictures
from saev.explorer.data import NONE, Measured
from saev.explorer.pictures import Album
from saev.images.decode import decode_image
from saev.inference import provenance
from saev.progress import Progress
from saev.secrets import redact
from saev.visuals import heading
from saev.visuals.pictures import Pictures
from saev.visuals.views import Images

logger = logging.getLogger(__name__)

_REMEDY = "Say which activations with --shards URL."


class Block(tp.NamedTuple):
    """Bytes in the file."""

    kind: str
    """dtype of numpy, or "" for pictures."""
    data: bytes

    @classmethod
    def of(cls, values: tp.Any, kind: str) -> tp.Self:
        """An array, flat and little-endian."""
        array = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<"))
        return cls(kind, array.tobytes())

    @property
    def text(self) -> str:
        """As base64."""
        return base64.b64encode(self.data).decode()


class Part(tp.NamedTuple):
    """One SAE in the file."""

    facts: dict[str, tp.Any]
    """Plain JSON."""
    blocks: dict[str, Block]

    @property
    def n_bytes(self) -> int:
        """What it takes in the file."""
        text = len(_json(self.facts).encode())
        return text + sum(math.ceil(pictures.encoded(len(b.data))) for b in self.blocks.values())


def write(cfg: ReportConfig, progress: Progress | None = None) -> str:
    """Write one HTML file with all latents of some SAEs.

    Returns:
        URL of the file.

    Raises:
        ConfigError: results are missing or do not fit the shards, or the file cannot be as small as
            it should be.
        ImageError: an original image cannot be decoded or is not the recorded one.
        StorageError: something is missing, or the file cannot be written.
    """
    progress = progress or Progress(quiet=True)
    room = (cfg.max_mb * 1e6 - len(_frame([]).encode())) / len(cfg.run)
    images = Images()
    try:
        parts = [_part(cfg, storage.normalize(run), images, room, progress) for run in cfg.run]
    finally:
        images.close()
    text = _frame(parts)
    if len(text) > cfg.max_mb * 1e6:
        raise ConfigError(
            f"The numbers of all latents alone take {len(text) / 1e6:.1f} MB, and --max-mb is "
            f"{cfg.max_mb:g}. Raise it, or give fewer runs."
        )
    url = storage.normalize(cfg.out)
    progress.publish_point()
    storage.write_text(url, text)
    return url


def _part(cfg: ReportConfig, run: str, images: Images, room: float, progress: Progress) -> Part:
    of_run = VisualsConfig(
        run=run, shards=cfg.shards or _shards_of(run), data=cfg.data,
        allow_other_model=cfg.allow_other_model,
    )  # fmt: skip
    opened = Pictures(of_run, images)
    source = opened.source
    measured = Measured(opened.results, opened.shards, run, source.class_names)
    with progress.doing("reading results"):
        part = Part(_facts(measured, opened, run), _numbers(measured))
    album = pictures.collect(measured, source, room - part.n_bytes, progress)
    return _with_pictures(part, measured, album)


def _shards_of(run: str) -> str:
    """The shards that a run was trained on."""
    trained = provenance.read_run(run)
    if trained is None or not trained.train_data.shards:
        raise ConfigError(f"{run} does not say which activations it was trained on. {_REMEDY}")
    place = storage.join(run, "config.json")
    return storage.recorded_folder(trained.train_data.shards, place, _REMEDY)


def _facts(measured: Measured, opened: Pictures, run: str) -> dict[str, tp.Any]:
    """All but the numbers of latents, and the pictures."""
    title, subtitle, metrics = heading.of(run, opened.results, opened.shards, opened.activations)
    return {
        "title": redact(title),
        "subtitle": redact(subtitle),
        "metrics": [dataclasses.astuple(metric) for metric in metrics],
        "warnings": [redact(text) for text in opened.other_model],
        "activations": redact(opened.activations.described),
        "results": redact(opened.results.url),
        "nLatents": measured.d_sae,
        "nTokens": measured.n_tokens,
        "grid": list(measured.grid),
        "hasCodes": measured.n_images is not None,
        "classes": [redact(name) for name in measured.classes],
        "imagesByClass": measured.images_by_class.tolist(),
        "found": [[one, [list(f) for f in rows]] for one, rows in measured.found.items()],
        "concepts": [
            [redact(name), row["n_tokens"], row["latent"], row["average_precision"],
             row["purity_at_16"]]
            for name, row in measured.concepts
        ],
    }  # fmt: skip


def _numbers(measured: Measured) -> dict[str, Block]:
    """One number, or a few, of each latent."""
    results = measured.results
    usual, purity = measured.usual
    bins = measured.histogram
    heights = np.sqrt(bins / np.maximum(bins.max(axis=1, keepdims=True), 1)) * 255
    blocks = {
        "count": Block.of(results.counts, "f8"),
        "mean": Block.of(np.where(results.counts > 0, results.mean_values, 0), "f4"),
        "max": Block.of(results.max_values, "f4"),
        "order": Block.of(measured.order, "u4"),
        "usual": Block.of(usual, "i2" if len(measured.classes) < 1 << 15 else "i4"),
        "purity": Block.of(purity, "f4"),
        "bins": Block.of(np.ceil(heights), "u1"),
    }
    if measured.n_images is not None:
        blocks["images"] = Block.of(measured.n_images, "u4")
    if measured.shares is not None:
        blocks["shareClass"] = Block.of(measured.shares.classes, "i4")
        blocks["shareImages"] = Block.of(measured.shares.n_images, "u4")
    if measured.neighbours is not None:
        which, cosines = measured.neighbours
        blocks["near"] = Block.of(which, "u4")
        blocks["cosine"] = Block.of(np.round(cosines * 32767), "i2")
    return blocks


def _with_pictures(part: Part, measured: Measured, album: Album) -> Part:
    """Add pictures, and what images each latent has."""
    number = {image: i for i, image in enumerate(album.images)}
    class_of = {name: i for i, name in enumerate(measured.classes)}
    thumb = np.full(measured.d_sae, NONE)
    for latent, image in album.thumbs.items():
        thumb[latent] = number[image]
    padded = [data + bytes(-len(data) % 3) for data in album.images.values()]
    latents = sorted(album.examples)
    examples = [(latent, e) for latent in latents for e in album.examples[latent]]
    n_of = np.zeros(measured.d_sae, dtype=np.int64)
    n_of[latents] = [len(album.examples[latent]) for latent in latents]
    high = measured.results.max_values
    levels = [np.clip(np.ceil(e.values / high[i] * 255), 1, 255) for i, e in examples]
    is_small = measured.shards.content_tokens <= 1 << 16
    blocks = {
        "thumb": Block.of(thumb, "i4"),
        "pictureBytes": Block.of([len(data) for data in album.images.values()], "u4"),
        "pictures": Block("", b"".join(padded)),
        "examples": Block.of(n_of, "u1"),
        "image": Block.of([number[e.example] for _, e in examples], "u4"),
        "range": Block.of([e.kind for _, e in examples], "u1"),
        "value": Block.of([e.value for _, e in examples], "f4"),
        "patches": Block.of([len(e.patches) for _, e in examples], "u4"),
        "patch": Block.of(
            np.concatenate([np.zeros(0), *(e.patches for _, e in examples)]),
            "u2" if is_small else "u4",
        ),
        "level": Block.of(np.concatenate([np.zeros(0), *levels]), "u1"),
    }
    sizes = (
        decode_image(next(iter(album.images.values())), "a picture").size
        if album.images
        else (1, 1)
    )
    facts = {
        "files": [redact(measured.files[i]) for i in album.images],
        "labels": [class_of.get(measured.image_label(i), NONE) for i in album.images],
        "aspect": sizes[0] / sizes[1],
        "nPictured": len(album.thumbs),
        "nDetailed": len(album.examples),
        "nFiring": int((measured.results.counts > 0).sum()),
    }
    return Part(part.facts | facts, part.blocks | blocks)


def _json(value: tp.Any) -> str:
    """JSON that may stand in a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _frame(parts: Sequence[Part]) -> str:
    """The text of the file."""
    script, style = (_static(f"explorer.{kind}") for kind in ("js", "css"))
    titles = " · ".join(part.facts["title"] for part in parts) or "saev"
    kinds = [{name: block.kind for name, block in part.blocks.items()} for part in parts]
    runs = [{**part.facts, "kinds": kind} for part, kind in zip(parts, kinds, strict=True)]
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(titles)}: all latents</title>",
        f"<style>{style}</style>",
        "</head>",
        '<body><div id="app"><p class="loading">Reading the latents …</p></div>',
        '<noscript><p class="loading">This page needs its script, which is inside of it. Allow '
        "scripts for this file, or look at the picture book that <code>saev visuals</code> "
        "writes.</p></noscript>",
        f'<script type="application/json" id="runs">{_json(runs)}</script>',
    ]
    for number, part in enumerate(parts):
        lines += [
            f'<script type="application/octet-stream" id="b{number}-{name}">{block.text}</script>'
            for name, block in part.blocks.items()
        ]
    lines += [f"<script>{script}</script>", "</body>", "</html>", ""]
    return "\n".join(lines)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _static(name: str) -> str:
    folder = importlib.resources.files("saev.explorer").joinpath("static")
    return folder.joinpath(name).read_text("utf-8")
