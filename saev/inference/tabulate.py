"""Write the tables of an inference folder, from what its parts left; `tables.json` last."""

import typing as tp
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saev import parquet, storage
from saev.inference import blocks, decoder, embeddings, files, npz, sides, sums
from saev.inference.blocks import Block
from saev.inference.coactivation import Coactivation
from saev.inference.codes import Piece, StoredCodes
from saev.inference.job import Pass
from saev.inference.labels import ImageLabels
from saev.inference.monosemanticity import Embedded
from saev.inference.part import PartStats
from saev.inference.ranked import Ranked
from saev.inference.scores import ALL, SIDES, Classes, Scores, measure
from saev.parquet import schema
from saev.parquet.writer import TableWriter

MAX_ENTRIES = 1 << 21
"""Entries of tokens held at a time; of images, which take twice the memory, half as many."""
_WRITE_ROWS = 1 << 18
MAX_CELLS = 1 << 22
"""Most pairs of latents and classes that are scored at a time."""


def write(
    job: Pass,
    stats: PartStats,
    acts: StoredCodes,
    labels: ImageLabels,
    masks: Scores | None,
    codes: StoredCodes,
) -> dict[str, storage.Listed]:
    """Write all tables.

    Args:
        job: what was done.
        stats: of all parts.
        acts: values of whole images.
        labels: of the images.
        masks: what the labels of patches say.
        codes: of all tokens; may have no files.

    Returns:
        Sizes and checksums of the files.
    """
    return _Tabulation(job, stats, acts, labels, masks, codes).write()


class _Tabulation:
    def __init__(
        self, job: Pass, stats: PartStats, acts: StoredCodes, labels: ImageLabels,
        masks: Scores | None, codes: StoredCodes,
    ):  # fmt: skip
        self._job, self._stats, self._acts, self._labels = job, stats, acts, labels
        self._d_sae, self._masks, self._codes = job.sae.d_sae, masks, codes
        n = job.shards.n_examples
        self._side = job.sides(np.arange(n))
        self._ranked = Ranked(stats, self._d_sae)
        peak = max(float(stats.sums.peaks().max(initial=0.0)), self._ranked.largest)
        self._value = schema.value_type(peak)
        self._floor = np.float32(job.cfg.image_floor) * stats.sums.peaks()
        selected = stats.images.example_idx
        class_of = np.full(n, -1, dtype=np.int64)
        class_of[selected] = labels.class_of[selected]
        self._class_of = class_of
        classes = Classes.of("image", labels.targets, labels.names, class_of, self._side)
        self._classes = Scores(classes, 0, self._d_sae)
        held_out = self._side == sides.HELD_OUT
        self._embedded = {ALL: Embedded(embeddings.sample(selected), stats.embeddings, n)}
        if held_out.any():
            self._embedded[sides.HELD_OUT] = self._embedded[ALL].only(held_out)
        self._columns: dict[str, list[np.ndarray]] = {}
        self._coactive: tuple[list[np.ndarray], list[np.ndarray], int] | None = None
        self._tables: dict[str, parquet.TableEntry] = {}
        self._listed: dict[str, storage.Listed] = {}

    def write(self) -> dict[str, storage.Listed]:
        by_latent = schema.image_acts(self._value, "latent")
        with self._open(schema.IMAGE_ACTS_BY_LATENT, by_latent) as writer:
            for block in self._blocks():
                self._describe(block)
                self._write_acts(writer, block)
            self._close(schema.IMAGE_ACTS_BY_LATENT, writer)
        by_image = schema.image_acts(self._value, "example")
        with self._open(schema.IMAGE_ACTS_BY_IMAGE, by_image) as writer:
            for piece in self._acts:
                writer.write(self._by_image(piece))
            self._close(schema.IMAGE_ACTS_BY_IMAGE, writer)
        if self._job.cfg.save:
            self._write_tokens_by_latent()
        if self._codes.infos:
            self._write_tokens_by_image()
        self._whole(
            schema.EXAMPLES,
            schema.examples(self._value),
            self._ranked.rows(self._side, self._value),
        )
        self._whole(schema.IMAGES, schema.images(), self._images())
        self._write_embeddings()
        self._whole(schema.CLASSES, schema.classes(), self._class_rows())
        self._whole(schema.LATENTS, schema.latents(), self._latents())
        index = parquet.Index(self._tables, self._facts())
        data = storage.canonical_json(index.to_dict()).encode()
        storage.write_bytes(self._job.place(parquet.TABLES), data)
        return {**self._listed, parquet.TABLES: storage.Listed.of(data)}

    # --- Files -----------------------------------------------------------------------------

    def _open(self, name: str, columns: pa.Schema) -> TableWriter:
        return TableWriter(self._job.url, name, columns, columns.names[0])

    def _close(self, name: str, writer: TableWriter) -> None:
        self._tables[name] = writer.close()
        self._listed |= writer.listed

    def _whole(self, name: str, columns: pa.Schema, rows: tp.Mapping[str, tp.Any]) -> None:
        with self._open(name, columns) as writer:
            if rows:
                writer.write(rows)
            self._close(name, writer)

    # --- Values of images ------------------------------------------------------------------

    def _blocks(self) -> Iterator[Block]:
        n_classes = max(1, len(self._labels.targets))
        counts = self._stats.sums.image_counts
        for start, stop in blocks.ranges(counts, MAX_ENTRIES // 2, max(1, MAX_CELLS // n_classes)):
            yield blocks.read_images(self._acts, counts, start, stop)

    def _describe(self, block: Block) -> None:
        n = block.stop - block.start
        label, side = self._class_of[block.examples], self._side[block.examples]
        if self._classes.classes.sides:
            found = measure(block.latents, block.values, label, side, n, self._classes.classes)
            self._classes.add(block.start, found)
        self._ranked.add(block)
        for one, ending in ((ALL, ""), (sides.HELD_OUT, SIDES[sides.HELD_OUT])):
            mine = np.ones(len(side), dtype=bool) if one == ALL else side == one
            self._keep(f"class_entropy{ending}", self._entropy(block, mine))
            if one in self._embedded:
                found_here = self._embedded[one].monosemanticity(
                    block.latents[mine], block.examples[mine], block.values[mine], n
                )
            else:
                found_here = np.full(n, np.nan)
            self._keep(f"monosemanticity{ending}", found_here)
        dropped = block.values < self._floor[block.start + block.latents]
        self._keep("n_image_acts_dropped", np.bincount(block.latents[dropped], minlength=n))

    def _keep(self, name: str, values: np.ndarray) -> None:
        self._columns.setdefault(name, []).append(values)

    def _entropy(self, block: Block, mine: np.ndarray) -> np.ndarray:
        """Entropy of the classes, weighted by value, in nats; NaN without labels or values."""
        n, n_classes = block.stop - block.start, len(self._labels.targets)
        label = self._class_of[block.examples]
        mine = mine & (label >= 0) & (block.values > 0)
        cell = block.latents[mine] * n_classes + label[mine]
        weights = block.values[mine].astype(np.float64)
        mass = np.bincount(cell, weights=weights, minlength=n * n_classes).reshape(n, n_classes)
        total = mass.sum(axis=1)
        p = mass / np.where(total > 0, total, np.nan)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(p > 0, -p * np.log(p), 0.0)
        return np.where(total > 0, terms.sum(axis=1), np.nan)

    def _write_acts(self, writer: TableWriter, block: Block) -> None:
        keep = block.values >= self._floor[block.start + block.latents]
        writer.write(
            {
                "latent": (block.start + block.latents[keep]).astype(np.int32),
                "example": block.examples[keep].astype(np.int32),
                "max": self._stored(block.values[keep]),
                "mean": self._stored(block.means[keep]),
            }
        )

    def _by_image(self, piece: Piece) -> dict[str, np.ndarray]:
        columns, means = piece.columns(), piece.array("means")
        order = columns.row_order(piece.info.n_rows)
        latents = columns.latents
        keep = columns.values >= self._floor[latents]
        if not keep.all():
            order = order[keep[order]]
        return {
            "example": piece.array("example_idx")[columns.rows[order]].astype(np.int32),
            "latent": latents[order].astype(np.int32),
            "max": self._stored(columns.values[order]),
            "mean": self._stored(means[order]),
        }

    def _stored(self, values: np.ndarray) -> np.ndarray:
        return values.astype(np.float16) if self._value == pa.float16() else values

    # --- Values of tokens ------------------------------------------------------------------

    def _write_tokens_by_latent(self) -> None:
        columns = schema.token_acts(self._value, "latent")
        counts = self._stats.sums.counts
        with self._open(schema.TOKEN_ACTS_BY_LATENT, columns) as writer:
            for start, stop in blocks.ranges(counts, MAX_ENTRIES, self._d_sae):
                if stop == start + 1:  # maybe too long for memory; pieces are in order already
                    for part in blocks.read_tokens(self._codes, start, stop):
                        self._write_codes(writer, np.full(len(part.fields[0]), start), *part.fields)
                else:
                    fields = blocks.join_tokens(self._codes, counts, start, stop)
                    latents = np.repeat(np.arange(start, stop, dtype=np.int32), counts[start:stop])
                    self._write_codes(writer, latents, *fields)
            self._close(schema.TOKEN_ACTS_BY_LATENT, writer)

    def _write_tokens_by_image(self) -> None:
        """All that needs the codes by token, so that each piece is turned at most twice."""
        rows = self._stats.images
        together = Coactivation(rows.example_idx, rows.n_tokens, self._d_sae)

        def count(piece: Piece, rows: npz.ByRow) -> None:
            example_idx = piece.array("example_idx")
            if together.wants(example_idx):
                together.add(example_idx, *rows[:2])

        if self._job.cfg.save:
            columns = schema.token_acts(self._value, "example")
            with self._open(schema.TOKEN_ACTS_BY_IMAGE, columns) as writer:

                def write(piece: Piece, rows: npz.ByRow) -> None:
                    count(piece, rows)
                    row_nnz, latents, values = rows
                    example, patch = (
                        np.repeat(piece.array(name).astype(np.int32, copy=False), row_nnz)
                        for name in ("example_idx", "token_idx")
                    )
                    self._write_codes(writer, latents, example, patch, values)

                self._each_by_row(write)
                self._close(schema.TOKEN_ACTS_BY_IMAGE, writer)
        else:  # only the labels of patches needed the codes
            self._each_by_row(count)
        self._coactive = together.result()

    def _each_by_row(self, seen: Callable[[Piece, npz.ByRow], None]) -> None:
        """Give codes by row, and write `token_acts.npz` if it is wanted."""
        if self._job.cfg.save and self._job.cfg.npz:
            place = self._job.place(files.TOKEN_ACTS)
            self._listed[files.TOKEN_ACTS] = npz.write_codes(place, self._codes, seen=seen)
            return
        for _ in npz.by_row(self._codes, seen):
            pass

    def _write_codes(
        self, writer: TableWriter, latents: np.ndarray, example: np.ndarray, patch: np.ndarray,
        values: np.ndarray,
    ) -> None:  # fmt: skip
        """Append rows, some at a time, because the writer copies what it is given."""
        for start in range(0, len(values), _WRITE_ROWS):
            some = slice(start, start + _WRITE_ROWS)
            writer.write(
                {
                    "latent": latents[some].astype(np.int32, copy=False),
                    "example": example[some],
                    "patch": patch[some],
                    "value": self._stored(values[some]),
                }
            )

    def _coactive_columns(self) -> dict[str, tp.Any]:
        """Columns of `latents.parquet`; null if codes were not kept."""
        if self._coactive is None:
            nothing = [None] * self._d_sae
            return {"coactive": nothing, "coactive_cosines": nothing}
        return {"coactive": self._coactive[0], "coactive_cosines": self._coactive[1]}

    # --- Tables ----------------------------------------------------------------------------

    def _images(self) -> dict[str, tp.Any]:
        rows, labels = self._stats.images, self._labels
        at = rows.example_idx
        metrics = self._stats.metrics
        n = metrics.n_tokens
        spread = float(metrics.sq_norm) - float(metrics.total.square().sum()) / n
        mse = rows.sq_error / rows.n_tokens
        return {
            "example": at,
            "index": labels.indices[at],
            "path": labels.paths.take(pa.array(at)),
            "label": pc.if_else(
                pa.array(self._class_of[at] >= 0), labels.labels.take(pa.array(at)), None
            ),
            "class_idx": _nullable(self._class_of[at]),
            "side": sides.names(self._side[at]),
            "n_tokens": rows.n_tokens,
            "l0": (rows.n_active / rows.n_tokens).astype(np.float32),
            "mse": mse.astype(np.float32),
            "normalized_mse": _floats(mse / (spread / n) if spread > 0 else mse * np.nan),
        }

    def _write_embeddings(self) -> None:
        vectors, at = self._stats.embeddings, embeddings.sample(self._stats.images.example_idx)
        value = schema.value_type(float(np.abs(vectors).max(initial=0.0)))
        with self._open(schema.EMBEDDINGS, schema.embeddings(value)) as writer:
            for rows in embeddings.rows(at, vectors, value):
                writer.write(rows)
            self._close(schema.EMBEDDINGS, writer)

    def _class_rows(self) -> dict[str, tp.Any]:
        found = [scores.rows() for scores in self._all_scores()]
        found = [rows for rows in found if rows]
        if not found:
            return {}
        joined: dict[str, tp.Any] = {}
        for field in schema.classes():
            parts = [rows[field.name] for rows in found]
            joined[field.name] = (
                [text for part in parts for text in part]
                if pa.types.is_string(field.type)
                else _floats(np.concatenate(parts))
                if pa.types.is_floating(field.type)
                else np.concatenate(parts)
            )
        return joined

    def _all_scores(self) -> list[Scores]:
        return [self._classes, *([self._masks] if self._masks else [])]

    def _latents(self) -> dict[str, tp.Any]:
        found = decoder.directions(self._job.sae)
        columns: dict[str, tp.Any] = {
            "latent": np.arange(self._d_sae),
            "name": pa.nulls(self._d_sae, pa.string()),
            "stability": pa.nulls(self._d_sae, pa.float32()),
            "decoder_norm": found.norms,
            "neighbours": list(found.neighbours),
            "neighbour_cosines": list(found.cosines),
            "x": found.layout[:, 0],
            "y": found.layout[:, 1],
            **self._coactive_columns(),
            **_sums(self._stats.sums, ""),
            **_sums(self._stats.held_out, "_held_out"),
            **{k: np.concatenate(v) for k, v in self._columns.items()},
        }
        for name in self._columns:
            if name != "n_image_acts_dropped":
                columns[name] = _floats(columns[name])
        for kind, scores in (("class", self._classes), ("mask", self._masks)):
            columns |= _best(f"best_{kind}", scores, self._d_sae)
        return columns

    def _facts(self) -> dict[str, tp.Any]:
        """What `tables.json` says beside the list."""
        numbers = ("n_tokens", "n_images")
        return {
            "d_sae": self._d_sae,
            "content_tokens": self._job.shards.content_tokens,
            "all": {name: getattr(self._stats.sums, name) for name in numbers},
            "held_out": {name: getattr(self._stats.held_out, name) for name in numbers},
            "quantiles": list(sums.QUANTILES),
            "histogram": {
                "bins_per_octave": sums.BINS_PER_OCTAVE,
                "low_exponent": sums.LOW_EXPONENT,
                "n_bins": sums.N_BINS,
            },
            "image_floor": self._job.cfg.image_floor,
            "n_image_acts": int(self._stats.sums.image_counts.sum()),
            "n_embeddings": self._embedded[ALL].n_images,
            "n_coactivation_tokens": self._coactive[2] if self._coactive else 0,
            "n_image_classes": len(self._labels.targets),
        }


def _sums(found: sums.LatentSums, ending: str) -> dict[str, tp.Any]:
    """Columns of `latents.parquet` of one side; empty if the side has no tokens."""
    names = ("n_tokens", "frequency", "n_images", "image_share", "mean", "max", "quantiles",
             "histogram_first", "histogram")  # fmt: skip
    if not found.n_tokens:
        return {name + ending: [None] * len(found.counts) for name in names}
    fires = found.counts > 0
    first, last = _bounds(found.histogram)
    values = (
        found.counts,
        found.counts / found.n_tokens,
        found.image_counts,
        found.image_counts / found.n_images,
        _floats(np.where(fires, found.means(), np.nan)),
        _floats(np.where(fires, found.peaks(), np.nan)),
        [row if ok else None for row, ok in zip(found.quantiles(), fires, strict=True)],
        pa.array(first, mask=~fires),
        [
            row[a:b] if ok else None
            for row, a, b, ok in zip(found.histogram, first, last, fires, strict=True)
        ],
    )
    return {name + ending: column for name, column in zip(names, values, strict=True)}


def _bounds(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First bin that is not empty, and the one after the last."""
    filled = histogram > 0
    return filled.argmax(axis=1), histogram.shape[1] - filled[:, ::-1].argmax(axis=1)


def _best(prefix: str, scores: Scores | None, d_sae: int) -> dict[str, tp.Any]:
    if scores is None:
        names = ("", "_name", "_support", *(f"_ap{ending}" for ending in SIDES.values()))
        return {prefix + name: [None] * d_sae for name in names}
    best = scores.best
    chosen = best["class"]
    names_of = scores.names(chosen)
    return {
        prefix: _nullable(chosen),
        f"{prefix}_name": names_of,
        f"{prefix}_support": pa.array(best["support"], mask=chosen < 0),
        **{f"{prefix}_ap{ending}": _floats(best[f"ap{ending}"]) for ending in SIDES.values()},
    }


def _nullable(numbers: np.ndarray) -> pa.Array:
    """Where a number is negative, null."""
    return pa.array(numbers, mask=numbers < 0)


def _floats(values: np.ndarray) -> pa.Array:
    """float32, null where a value is not defined."""
    return pa.array(values.astype(np.float32), mask=np.isnan(values))
