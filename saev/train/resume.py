"""Resume points: the whole state of a group of runs at one step.

    <runs_root>/resume/<group>/
        step-000000001000.safetensors    weights, moments, counters
        step-000000001000.curves.jsonl   the curves of every run up to that step
        step-000000001000.json           sizes and checksums of both; written last
        generation-2.json                why training began anew, if all points were damaged
        generation-2/step-…              the points since then
        set-aside-1/<run_id>/…           the curves until then

A point is used if every byte of it is as it was written. Only proven damage passes it over; an
error that says nothing about its bytes is waited for. Version 0.1.0 wrote points without curves;
theirs are in the run folders. The folder is deleted when the group's runs are published.
"""

import json
import logging
import re
import typing as tp
from collections.abc import Callable, Iterator
from time import monotonic, sleep

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from saev import storage
from saev.errors import CorruptDataError, StorageError

logger = logging.getLogger(__name__)

FOLDER = "resume"
"""Below the runs' root."""
N_KEPT = 2

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Row = dict[str, float | int | None]
_T = tp.TypeVar("_T")


class CurveRows(tp.NamedTuple):
    """The curves of one run until a step."""

    metrics: list[Row]
    timings: list[Row]


class ResumePoint(tp.NamedTuple):
    """A state that training can go on from."""

    step: int
    """Steps done."""
    tensors: dict[str, Tensor]
    """On the CPU."""
    meta: dict[str, tp.Any]
    """Plain JSON that was saved with them: `run_ids`, `rules`, `loader`."""
    curves: dict[str, CurveRows] | None = None
    """By run id; None in a point of version 0.1.0, whose `meta` counts the rows (`n_rows`)."""


class Patience(tp.NamedTuple):
    """How long to wait for a storage that does not answer as it should."""

    total_s: float = 600.0
    """In all."""
    pause_s: float = 30.0
    """Between two tries, each of which is said."""


PATIENCE = Patience()
_GENERATION = re.compile(r"generation-(\d+)\.json")


def folder(runs_root: str, group: str) -> str:
    """Where the resume points of a group are."""
    return storage.join(runs_root, FOLDER, group)


def patiently(read: Callable[[], _T], url: str, patience: Patience | None = None) -> _T:
    """What ``read`` returns, tried again for as long as the storage fails.

    Args:
        read: reads something.
        url: what it is, for the log.
        patience: how long; by default PATIENCE.

    Raises:
        CorruptDataError: as soon as ``read`` does: waiting does not mend bytes.
        StorageError: what ``read`` raised last.
    """
    total_s, pause_s = patience or PATIENCE
    start = monotonic()
    while True:
        try:
            return read()
        except CorruptDataError:
            raise
        except StorageError as err:
            left = total_s - (monotonic() - start)
            if left <= 0:
                raise StorageError(
                    f"{err} It was tried for {total_s / 60:g} minutes. Nothing is lost: the same "
                    "command continues from the last resume point once it can be read."
                ) from err
            logger.warning("Waiting for %s, up to %.1f minutes more: %s", url, left / 60, err)
        sleep(min(pause_s, max(left, 0.0)))


class Points:
    """The resume points of a group.

    Args:
        url: their folder.
        patience: how long to wait for a storage that fails; by default PATIENCE.
    """

    def __init__(self, url: str, patience: Patience | None = None):
        self.url = url
        self.generation = 1
        """How often training began from the start."""
        self.set_aside: list[dict[str, tp.Any]] = []
        """What became of the generations before, as plain JSON."""
        self._patience = patience

    @property
    def _place(self) -> str:
        """Folder of the points of this generation."""
        return _place(self.url, self.generation)

    def load(self, run_urls: tp.Sequence[str] = ()) -> ResumePoint | None:
        """The newest intact point; None if training is to begin from the start.

        Damaged points are passed over with a warning. If none is intact, they stay where they are,
        the runs' curves are copied beside them, and a new generation begins.

        Args:
            run_urls: run folders of the group.

        Raises:
            StorageError: something could not be read for a long time; nothing was changed.
        """

        def read() -> tuple[ResumePoint | None, list[dict[str, tp.Any]]]:
            self._find_generation()
            return _newest(self._place)

        point, damaged = patiently(read, self.url, self._patience)
        if point is None and damaged:
            self._begin_anew(damaged, run_urls)
        return point

    def save(self, point: ResumePoint) -> None:
        """Publish a point, and delete all but this one and the one before it."""
        stem = _stem(point.step)
        url = storage.join(self._place, stem)
        storage.clean_temporary(self._place)
        # What is deleted was there before anything is written.
        before = [e for e in storage.list_dir(self._place, missing_ok=True) if not e.is_dir]
        for entry in before:
            if entry.name == f"{stem}.json":  # it must not come to stand for new tensors
                storage.delete(entry.url)
        curves = point.curves or {}
        written = {
            **self._write(f"{stem}.safetensors", lambda out: _write_tensors(out, point.tensors)),
            **self._write(f"{stem}.curves.jsonl", lambda out: _write_curves(out, curves)),
        }
        pointer: dict[str, tp.Any] = {"step": point.step, "objects": written, "meta": point.meta}
        storage.write_json(f"{url}.json", pointer | {"checksum": _own_checksum(pointer)})
        try:
            _delete_older(before, stem)
        except StorageError as err:  # the next point deletes them
            logger.warning("Older resume points stay for now: %s", err)

    def _write(
        self, name: str, write: Callable[[storage.ChecksumWriter], None]
    ) -> dict[str, dict[str, tp.Any]]:
        """Publish an object; returns what the pointer says of it."""
        with storage.open_write(storage.join(self._place, name)) as raw:
            out = storage.ChecksumWriter(raw)
            write(out)
        return {name: {"n_bytes": out.n_bytes, "checksum": out.checksum}}

    def history(self) -> dict[str, tp.Any]:
        """What run.json says of the generations."""
        told: dict[str, tp.Any] = {"generation": self.generation}
        if self.generation > 1:
            told["set_aside"] = self.set_aside
        return told

    def clear(self) -> None:
        """Delete all points of a finished group, and the folder of all groups if it is empty."""
        clear(self.url)

    def _find_generation(self) -> None:
        names = [e.name for e in storage.list_dir(self.url, missing_ok=True) if not e.is_dir]
        numbers = [int(found[1]) for found in map(_GENERATION.fullmatch, names) if found]
        self.generation = max(numbers, default=1)
        self.set_aside = []
        if numbers:
            place = storage.join(self.url, f"generation-{self.generation}.json")
            try:
                self.set_aside = _checked(storage.read_json(place), place)["set_aside"]
            except CorruptDataError as err:  # that it is there says enough
                logger.warning("%s", err)

    def _begin_anew(self, damaged: list[dict[str, tp.Any]], run_urls: tp.Sequence[str]) -> None:
        number, kept = self.generation, f"set-aside-{self.generation}"

        def copy() -> None:
            for run_url in run_urls:
                for entry in storage.list_dir(run_url, missing_ok=True):
                    if entry.name.endswith(".jsonl"):
                        place = storage.join(self.url, kept, storage.name(run_url), entry.name)
                        storage.write_bytes(place, storage.read_bytes(entry.url))

        patiently(copy, self.url, self._patience)
        self.set_aside.append({"generation": number, "points": damaged, "curves": kept})
        record = {"generation": number + 1, "set_aside": self.set_aside}
        place = storage.join(self.url, f"generation-{number + 1}.json")
        storage.write_json(place, record | {"checksum": _own_checksum(record)})
        logger.warning(
            "All resume points in %s are damaged. They are set aside with their curves (%s), and "
            "training begins from the start.",
            *(self._place, storage.join(self.url, kept)),
        )
        self.generation = number + 1


def _delete_older(before: tp.Sequence[storage.Entry], newest: str) -> None:
    """Delete what there was before the newest point was written, but for the one below it."""
    others = [e for e in before if e.name.startswith("step-") and _stem_of(e.name) != newest]
    lower = {_stem_of(e.name) for e in others if _is_pointer(e.name)}
    kept = sorted(stem for stem in lower if stem < newest)[1 - N_KEPT :]
    # Pointers go first: a pointer without tensors would look like damage.
    for entry in sorted(others, key=lambda e: not _is_pointer(e.name)):
        if _stem_of(entry.name) not in kept:
            storage.delete(entry.url)


def clear(url: str) -> None:
    """Delete the resume points of a finished group, and the folder of all groups if it is empty."""
    storage.delete(url, recursive=True)
    storage.remove_empty(storage.parent(url))


class Flight(tp.NamedTuple):
    """Which runs a group in flight is of."""

    run_ids: tuple[str, ...]
    rules: int


def flight(url: str) -> Flight:
    """The runs of the newest point in a group's folder; none if no pointer is intact.

    Raises:
        StorageError: a pointer cannot be read.
    """
    points = Points(url)
    points._find_generation()
    places = [_place(url, g) for g in range(points.generation, 0, -1)]
    for place in places:
        for entry in _pointers(storage.list_dir(place, missing_ok=True)):
            try:
                meta = _read_pointer(entry)["meta"]
                return Flight(tuple(map(str, meta["run_ids"])), meta.get("rules", 1))
            except (CorruptDataError, KeyError, TypeError):
                continue
    return Flight((), 1)


# --- One point ---------------------------------------------------------------------------------


def _place(url: str, generation: int) -> str:
    return url if generation == 1 else storage.join(url, f"generation-{generation}")


def _stem(step: int) -> str:
    return f"step-{step:012d}"


def _stem_of(name: str) -> str:
    return name.partition(".")[0]


def _is_pointer(name: str) -> bool:
    return name.startswith("step-") and name.endswith(".json")


def _pointers(entries: tp.Iterable[storage.Entry]) -> list[str]:
    """URLs of the pointers, newest first."""
    names = [e for e in entries if not e.is_dir and _is_pointer(e.name)]
    return [e.url for e in sorted(names, key=lambda e: e.name, reverse=True)]


def _newest(place: str) -> tuple[ResumePoint | None, list[dict[str, tp.Any]]]:
    """The newest intact point of a folder, and the damaged ones before it, with the reasons."""
    damaged: list[dict[str, tp.Any]] = []
    for url in _pointers(storage.list_dir(place, missing_ok=True)):
        try:
            return _twice(url), damaged
        except CorruptDataError as err:
            logger.warning("Resume point passed over: %s", err)
            name = storage.name(url)
            damaged.append({"point": name.removesuffix(".json"), "reason": str(err)})
    return None, damaged


def _twice(url: str) -> ResumePoint:
    """A point, read again if it seems to be damaged: bytes may have changed on their way."""
    try:
        return _load_one(url)
    except CorruptDataError:
        return _load_one(url)


def _load_one(url: str) -> ResumePoint:
    pointer = _read_pointer(url)
    meta, curves = pointer["meta"], None
    place, stem = storage.parent(url), storage.name(url).removesuffix(".json")
    listed = pointer.get("objects") or {  # version 0.1.0
        f"{stem}.safetensors": {key: pointer.get(key) for key in ("n_bytes", "checksum")}
    }
    sizes = {entry.name: entry.size for entry in storage.list_dir(place)}
    for name, info in listed.items():
        if name not in sizes:
            sizes = {entry.name: entry.size for entry in storage.list_dir(place)}
        if name not in sizes:
            raise CorruptDataError(f"{storage.join(place, name)} is missing; {url} lists it.")
        if sizes[name] != info["n_bytes"]:
            raise CorruptDataError(
                f"{storage.join(place, name)} is damaged: it has {sizes[name]} bytes, expected "
                f"{info['n_bytes']}."
            )
    if f"{stem}.curves.jsonl" in listed:
        name = f"{stem}.curves.jsonl"
        curves = _parse_curves(_read(place, name, listed[name]), storage.join(place, name))
    name = f"{stem}.safetensors"
    data = _read(place, name, listed[name])
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as err:
        raise CorruptDataError(f"{storage.join(place, name)} is damaged: {err}.") from err
    return ResumePoint(pointer["step"], tensors, meta, curves)


def _read_pointer(url: str) -> dict[str, tp.Any]:
    pointer = _checked(storage.read_json(url), url)
    meta, listed = pointer.get("meta"), pointer.get("objects", {"": pointer})
    sound = (
        isinstance(meta, dict)
        and {"run_ids", "loader", "rules" if "objects" in pointer else "n_rows"} <= meta.keys()
        and isinstance(meta["run_ids"], list)
        and isinstance(pointer.get("step"), int)
        and storage.name(url) == f"{_stem(pointer['step'])}.json"
        and isinstance(listed, dict)
        and all(isinstance(i, dict) and {"n_bytes", "checksum"} <= i.keys() for i in listed.values())
    )
    if not sound:
        raise CorruptDataError(f"{url} is damaged: it is not the pointer of a resume point.")
    return pointer


def _read(place: str, name: str, info: tp.Mapping[str, tp.Any]) -> bytes:
    url = storage.join(place, name)
    data = storage.read_bytes(url)
    found = storage.format_checksum(storage.crc32c(data))
    if (len(data), found) != (info["n_bytes"], info["checksum"]):
        raise CorruptDataError(
            f"{url} is damaged: {len(data)} bytes with {found}, expected {info['n_bytes']} with "
            f"{info['checksum']}."
        )
    return data


def _checked(raw: tp.Any, url: str) -> dict[str, tp.Any]:
    """An object without its own checksum, which objects of version 0.1.0 do not have."""
    if not isinstance(raw, dict):
        raise CorruptDataError(f"{url} holds a {type(raw).__name__}, expected an object.")
    if "objects" not in raw and "set_aside" not in raw:
        return raw
    content = {key: value for key, value in raw.items() if key != "checksum"}
    expected = _own_checksum(content)
    if raw.get("checksum") != expected:
        raise CorruptDataError(
            f"{url} is damaged: its content has checksum {expected}, it says {raw.get('checksum')}."
        )
    return content


def _own_checksum(obj: tp.Mapping[str, tp.Any]) -> str:
    return storage.format_checksum(storage.crc32c(storage.canonical_json(obj).encode()))


# --- Curves ------------------------------------------------------------------------------------


def _write_curves(out: storage.ChecksumWriter, curves: tp.Mapping[str, CurveRows]) -> None:
    """One line per row of each run: its id, the row, and its timing. Keys keep their order."""
    for run_id, rows in curves.items():
        for row, timing in zip(rows.metrics, rows.timings, strict=True):
            line = json.dumps([run_id, row, timing], allow_nan=False) + "\n"
            out.write(line.encode())


def _parse_curves(data: bytes, url: str) -> dict[str, CurveRows]:
    curves: dict[str, CurveRows] = {}
    for run_id, row, timing in _lines(data, url):
        rows = curves.setdefault(run_id, CurveRows([], []))
        rows.metrics.append(row)
        rows.timings.append(timing)
    return curves


def _lines(data: bytes, url: str) -> Iterator[tuple[str, Row, Row]]:
    try:
        for line in data.splitlines():
            run_id, row, timing = json.loads(line)
            yield run_id, row, timing
    except ValueError as err:
        raise CorruptDataError(f"{url} is damaged: {err}.") from err


# --- Tensors -----------------------------------------------------------------------------------


def _write_tensors(out: storage.ChecksumWriter, tensors: tp.Mapping[str, Tensor]) -> None:
    """Write the safetensors format tensor by tensor: the state may be most of the memory there is.

    Format: https://huggingface.co/docs/safetensors (length of the header as little-endian u64, the
    header as JSON padded with spaces, the buffers in the header's order).
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little"))
    out.write(text)
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            out.write(flat.view(torch.uint8).numpy().data)
