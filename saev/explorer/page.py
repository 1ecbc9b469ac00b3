"""The HTML file of the explorer: data, pictures, script and style in one."""

import base64
import dataclasses
import gzip
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
from saev.config.images import ImageData
from saev.config.pages import ReportConfig
from saev.errors import ConfigError
from saev.explorer import columns, matches, summary
from saev.explorer import pictures as album
from saev.explorer.data import NONE, Kind, Measured
from saev.explorer.pictures import Album
from saev.images.decode import decode_image
from saev.inference import provenance
from saev.inference.results import Results
from saev.progress import Progress
from saev.secrets import redact
from saev.shards import Shards
from saev.visuals import heading
from saev.visuals.files import REPORT
from saev.visuals.opening import Opened
from saev.visuals.stored import Pictures
from saev.visuals.views import Images

logger = logging.getLogger(__name__)

_U2, _U4 = 1 << 16, 1 << 32
_LARGEST, _NAN = (1 << 15) - 1, -(1 << 15)
_REMEDY = "Say which activations with --shards URL."


class Block(tp.NamedTuple):
    """Bytes in the file."""

    kind: str
    """dtype of numpy, or "" for pictures."""
    data: bytes
    """As they are in the file: numbers are compressed, pictures are already."""
    scale: float = 1.0
    """What integers are multiplied by. The lowest one stands for NaN then."""

    @classmethod
    def of(cls, values: tp.Any, kind: str, scale: float = 1.0) -> tp.Self:
        """An array, flat and little-endian."""
        array = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<"))
        return cls(kind, gzip.compress(array.tobytes(), 6, mtime=0), scale)

    @classmethod
    def scaled(cls, values: np.ndarray) -> tp.Self:
        """Floats as int16, for figures of which two or three digits are shown."""
        largest = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
        scale = largest / _LARGEST
        found = np.where(np.isnan(values), _NAN, np.round(values / scale))
        return cls.of(found, "i2", scale)

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
        return text + sum(math.ceil(album.encoded(len(b.data))) for b in self.blocks.values())


class Sae(tp.NamedTuple):
    """One SAE that the file shows."""

    run: str
    """URL of its run folder."""
    results: Results
    """What inference measured."""
    shards: Shards
    """What it was measured on."""
    pictures: album.Images
    """Gives the images."""
    class_names: tp.Mapping[int, str]
    """Names of the values of masks."""
    other_model: tp.Sequence[str] = ()
    """In what the activations differ from those of training."""
    chosen: tp.Sequence[int] = ()
    """Latents that somebody asked for. They are marked, and have pictures first."""
    home: str = ""
    """Link to the page of all SAEs, "" if there is none."""


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
    made = text(
        cfg.run, shards=cfg.shards, data=cfg.data, allow_other_model=cfg.allow_other_model,
        max_mb=cfg.max_mb, progress=progress,
    )  # fmt: skip
    url = storage.normalize(cfg.out)
    progress.publish_point()
    storage.write_text(url, made)
    return url


def text(
    runs: Sequence[str],
    *,
    shards: str = "",
    data: ImageData | None = None,
    allow_other_model: bool = False,
    max_mb: float = 15.0,
    progress: Progress | None = None,
) -> str:
    """The text of the file of some SAEs.

    Args:
        runs: URLs of run folders that were measured.
        shards: URL of the shards folder that inference ran on; "" for that of training.
        data: the images, if they have moved.
        allow_other_model: show SAEs also on activations of another model than that of training.
        max_mb: most megabytes.
        progress: where to tell how far it is.

    Raises:
        SaevError: as :func:`write`.
    """
    images = Images()
    try:
        saes = []
        for run in map(storage.normalize, runs):
            of_run = VisualsConfig(
                run=run, shards=shards or _shards_of(run), data=data,
                allow_other_model=allow_other_model,
            )  # fmt: skip
            saes.append(_open(of_run, images))
        return render(saes, max_mb, progress)
    finally:
        images.close()


def render(
    saes: Sequence[Sae], max_mb: float, progress: Progress | None = None, *, strict: bool = True
) -> str:
    """The text of the file. As many pictures are in it as fit.

    Args:
        saes: what it shows; they share the room.
        max_mb: most megabytes.
        progress: where to tell how far it is.
        strict: whether it is an error if the numbers alone are larger. If not, the file is larger
            than asked for, without pictures.

    Raises:
        ConfigError: the numbers alone are larger.
        StorageError: results have no tables, or an image is gone.
    """
    progress = progress or Progress(quiet=True)
    room = (max_mb * 1e6 - len(_frame([]).encode())) / len(saes)
    found = _matches(saes)
    parts = [_part(sae, room, progress, found.get(i, {})) for i, sae in enumerate(saes)]
    text = _frame(parts)
    if strict and len(text.encode()) > max_mb * 1e6:
        raise ConfigError(
            f"The numbers of all latents alone take {len(text) / 1e6:.1f} MB, and --max-mb is "
            f"{max_mb:g}. Raise it, or give fewer runs."
        )
    return text


def _open(cfg: VisualsConfig, images: Images) -> Sae:
    opened = Opened(cfg, images)
    stored = Pictures.find(storage.join(opened.results.url, REPORT))
    originals = album.Originals(opened)
    found = originals if stored is None else album.StoredOrOriginal(stored, originals)
    return Sae(
        cfg.run, opened.results, opened.shards, found, opened.mask_names(), opened.other_model
    )


def _matches(saes: Sequence[Sae]) -> dict[int, dict[str, Block]]:
    """The same latents in the other SAEs of the file that were measured on the same activations."""
    blocks: dict[int, dict[str, Block]] = {}
    spaces = [(sae.shards.metadata.hash, sae.results.metrics.get("layer")) for sae in saes]
    found = matches.find([sae.run for sae in saes]) if len(set(spaces)) < len(saes) else {}
    for (one, other), (latents, cosines) in found.items():
        if spaces[one] == spaces[other]:
            mine = blocks.setdefault(one, {})
            mine[f"match{other}"] = Block.of(latents, "u4")
            mine[f"match{other}Cosine"] = Block.scaled(cosines)
    return blocks


def _part(sae: Sae, room: float, progress: Progress, found: tp.Mapping[str, Block]) -> Part:
    measured = Measured(sae.results, sae.shards, sae.class_names)
    with progress.doing("reading results"):
        part = numbers(sae, measured)
    part = Part(part.facts, {**part.blocks, **found})
    taken = album.collect(measured, sae.pictures, room - part.n_bytes, progress, sae.chosen)
    return with_pictures(part, measured, taken)


def _shards_of(run: str) -> str:
    """The shards that a run was trained on."""
    trained = provenance.read_run(run)
    if trained is None or not trained.train_data.shards:
        raise ConfigError(f"{run} does not say which activations it was trained on. {_REMEDY}")
    place = storage.join(run, "config.json")
    return storage.recorded_folder(trained.train_data.shards, place, _REMEDY)


def numbers(sae: Sae, measured: Measured) -> Part:
    """All but the pictures, and what depends on them."""
    shown, blocks = _columns(measured)
    metrics = sae.results.metrics
    activations = sae.shards.metadata.source(metrics.get("layer"), metrics.get("tokens"))
    title, subtitle, figures = heading.of(sae.run, sae.results, sae.shards, activations)
    facts = {
        "title": redact(title),
        "subtitle": redact(subtitle),
        "metrics": [dataclasses.astuple(metric) for metric in figures],
        "warnings": [redact(text) for text in sae.other_model],
        "activations": redact(activations.described),
        "results": redact(sae.results.url),
        "dataset": storage.name(redact(sae.shards.metadata.dataset).rstrip("/")),
        "summary": summary.of(sae.run, sae.results),
        "nLatents": measured.d_sae,
        "nTokens": measured.n_measured("n_tokens"),
        "nImages": measured.n_measured("n_images"),
        "nFiring": int((measured.n_tokens > 0).sum()),
        "grid": list(measured.grid),
        "columns": shown,
        "classes": [one._replace(name=redact(one.name))._asdict() for one in measured.classes],
        "side": "held-out images" if measured.has_held_out else "all images",
    }
    if sae.home:
        facts["home"] = sae.home
    if sae.chosen:
        is_chosen = np.isin(np.arange(measured.d_sae), sae.chosen)
        blocks["chosen"] = Block.of(is_chosen, "u1")
    if any(measured.names):
        facts["names"] = [redact(name) for name in measured.names]
    return Part(facts, blocks | _lists(measured))


def _columns(measured: Measured) -> tuple[list[dict[str, tp.Any]], dict[str, Block]]:
    """The figures that lists show: what they are, and their numbers."""
    shown, blocks = [], {}
    for column in columns.COLUMNS:
        held_out = column.has_sides and measured.has_held_out
        values = measured.column(column, held_out=held_out)
        if np.isnan(values).all():
            continue
        facts: dict[str, tp.Any] = {
            "key": column.key, "name": column.name, "hint": column.hint, "unit": column.unit,
            "log": column.is_log,
        }  # fmt: skip
        blocks[column.key] = _figure(column, values)
        if held_out:
            facts["all"] = f"{column.key}_all"
            blocks[facts["all"]] = _figure(column, measured.column(column, held_out=False))
        shown.append(facts)
    return shown, blocks


def _figure(column: columns.Column, values: np.ndarray) -> Block:
    return Block.scaled(values) if column.unit == "ratio" else Block.of(values, "f4")


def _lists(measured: Measured) -> dict[str, Block]:
    """What of latents no list shows."""
    n_classes, number = len(measured.classes), "u2" if measured.d_sae < _U2 else "u4"
    of_class = "i2" if n_classes < 1 << 15 else "i4"
    histograms, findings = measured.histograms, measured.findings
    per_latent = np.bincount(findings.latent, minlength=measured.d_sae)
    blocks = {
        "order": Block.of(measured.order, number),
        "tokens": Block.of(measured.n_tokens, "f8"),
        "class": Block.of(measured.best("class"), of_class),
        "mask": Block.of(measured.best("mask"), of_class),
        "x": Block.scaled(measured.layout[:, 0]),
        "y": Block.scaled(measured.layout[:, 1]),
        "binFirst": Block.of(histograms.first, "u1"),
        "binCount": Block.of([len(row) for row in histograms.counts], "u1"),
        "bins": Block.of(_joined(map(_heights, histograms.counts)), "u1"),
        "findings": Block.of(per_latent, "u1" if per_latent.max(initial=0) < 256 else "u2"),
        "findingClass": Block.of(findings.number, of_class),
        "findingAp": Block.scaled(findings.ap),
        "findingApAll": Block.scaled(findings.ap_all),
        "findingInside": Block.of(findings.inside, "f4"),
        "findingOutside": Block.of(findings.outside, "f4"),
    }
    if (rates := measured.rates()) is not None:
        blocks["rates"] = Block.of(np.round(rates * (_U2 - 1)), "u2", 1 / (_U2 - 1))
    for kind in tp.get_args(Kind):
        which, cosines = measured.nearest(kind)
        if which.size:
            none = _U2 - 1 if number == "u2" else _U4 - 1
            blocks[kind] = Block.of(np.where(which < 0, none, which), number)
            blocks[f"{kind}Cosine"] = Block.scaled(cosines)
    return blocks


def _heights(counts: np.ndarray) -> np.ndarray:
    """Square roots of counts, the largest of which is 255."""
    return np.ceil(np.sqrt(counts / max(1, counts.max(initial=0))) * 255)


def _joined(parts: tp.Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *parts])


def with_pictures(part: Part, measured: Measured, taken: Album) -> Part:
    """Add pictures, and what images each latent has."""
    number = {image: i for i, image in enumerate(taken.images)}
    thumb = np.full(measured.d_sae, NONE)
    for latent, image in taken.thumbs.items():
        thumb[latent] = number[image]
    padded = [data + bytes(-len(data) % 3) for data in taken.images.values()]
    latents = sorted(taken.examples)
    examples = [(latent, e) for latent in latents for e in taken.examples[latent]]
    n_of = np.zeros(measured.d_sae, dtype=np.int64)
    n_of[latents] = [len(taken.examples[latent]) for latent in latents]
    levels = [np.clip(np.ceil(e.values / measured.peak[i] * 255), 1, 255) for i, e in examples]
    is_small = measured.shards.content_tokens <= _U2
    labels = list(dict.fromkeys(measured.label(i) for i in taken.images))
    blocks = {
        "thumb": Block.of(thumb, "i4"),
        "pictureBytes": Block.of([len(data) for data in taken.images.values()], "u4"),
        "pictures": Block("", b"".join(padded)),
        "row": Block.of(list(taken.images), "u4"),
        "examples": Block.of(n_of, "u1"),
        "image": Block.of([number[e.example] for _, e in examples], "u4"),
        "kind": Block.of([e.kind for _, e in examples], "u1"),
        "value": Block.of([e.value for _, e in examples], "f4"),
        "quantile": Block.scaled(np.array([e.quantile for _, e in examples])),
        "side": Block.of([e.side for _, e in examples], "u1"),
        "patches": Block.of([len(e.patches) for _, e in examples], "u4"),
        "patch": Block.of(_joined(e.patches for _, e in examples), "u2" if is_small else "u4"),
        "level": Block.of(_joined(levels), "u1"),
    }
    sizes = (
        decode_image(next(iter(taken.images.values())), "a picture").size
        if taken.images
        else (1, 1)
    )
    facts = {
        "files": [redact(measured.file(i)) for i in taken.images],
        "labelNames": [redact(label) for label in labels],
        "labels": [labels.index(measured.label(i)) for i in taken.images],
        "aspect": sizes[0] / sizes[1],
        "nPictured": len(taken.thumbs),
        "nDetailed": len(taken.examples),
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
    kinds = [
        {name: [block.kind, block.scale] for name, block in part.blocks.items()} for part in parts
    ]
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
        "scripts for this file, or read its numbers with <code>saev.inference</code> "
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
