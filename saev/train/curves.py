"""The curves of one run: metrics.jsonl, TensorBoard event files, Weights & Biases.

    metrics.jsonl   one row per logged step; nothing in it depends on time or on interruptions
    timings.jsonl   wall time, speed and time spent waiting, at the same steps
    tb/             the same values for TensorBoard, one event file per flush

Object stores cannot append to an object. So all rows are kept in memory (a few hundred bytes each),
and a flush writes whole files. Resume points contain the rows, so that a resumed run can write all
files again.
"""

import importlib.util
import json
import logging
import math
import struct
import time
import typing as tp

from saev import distributions, storage
from saev.errors import ConfigError, CorruptDataError
from saev.train.point import CurveRows, Row

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
TENSORBOARD = "tb"


class Curves:
    """Rows of one run.

    Args:
        url: the run folder. The curves in it are replaced by ``rows``.
        rows: those up to the resume point, if the run is resumed.
        keep: write nothing, because the run is published already.
        hyperparameters: what TensorBoard's tab HPARAMS shows of the run.
    """

    def __init__(
        self,
        url: str,
        rows: CurveRows | None = None,
        *,
        keep: bool = False,
        hyperparameters: tp.Mapping[str, str | float] | None = None,
    ):
        self.url = url
        self._hyperparameters = hyperparameters or {}
        self._keep = keep
        self.rows, self._timings = map(list, rows or CurveRows([], []))
        self._n_flushed = 0
        if keep:
            return
        events = storage.list_dir(storage.join(url, TENSORBOARD), missing_ok=True)
        for entry in events:
            if _is_ours(entry.name):
                storage.delete(entry.url)
        if self.rows:
            self.flush()
        else:
            for name in (METRICS, TIMINGS):
                storage.delete(storage.join(url, name))

    @property
    def so_far(self) -> CurveRows:
        """All rows, for a resume point."""
        return CurveRows(self.rows, self._timings)

    def add(self, row: tp.Mapping[str, float | int], timing: tp.Mapping[str, float]) -> Row:
        """Add a row (with a `step`); returns it as stored, with null for what is not finite."""
        stored = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self.rows.append(stored)
        self._timings.append({"step": row["step"], "wall_time": time.time(), **timing})
        return stored

    @property
    def listed(self) -> dict[str, storage.Listed]:
        """metrics.jsonl with its checksum, for the run's list of files. The other files are not
        listed, because they contain wall times."""
        return {METRICS: storage.Listed.of(_lines(self.rows).encode())}

    def flush(self) -> None:
        """Publish all rows."""
        if self._keep or self._n_flushed == len(self.rows) > 0:
            return
        events = _events(
            self.rows[self._n_flushed :],
            self._timings[self._n_flushed :],
            {} if self._n_flushed else self._hyperparameters,
        )
        if self.rows:
            name = f"events.out.tfevents.{self._n_flushed:010d}.saev"
            storage.write_bytes(storage.join(self.url, TENSORBOARD, name), events)
        storage.write_text(storage.join(self.url, TIMINGS), _lines(self._timings))
        storage.write_text(storage.join(self.url, METRICS), _lines(self.rows))
        self._n_flushed = len(self.rows)

    def finish(self, step: int, sides: tp.Mapping[str, tp.Mapping[str, tp.Any]]) -> None:
        """Write the metrics of the evaluation for TensorBoard.

        Args:
            step: the last one.
            sides: metrics by the name of the images they are measured on, such as ``held_out``.
        """
        if self._keep:
            return
        tags = {f"{side}/{key}": v for side, row in sides.items() for key, v in row.items()}
        last = self._timings[-1] if self._timings else {"wall_time": time.time()}
        row, timing = {**tags, "step": step}, {"wall_time": last["wall_time"]}
        place = storage.join(self.url, TENSORBOARD, "events.out.tfevents.9999999999.saev")
        storage.write_bytes(place, _events([row], [timing]))


def _lines(rows: tp.Iterable[Row]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def of_run_folder(url: str, n_rows: int) -> CurveRows:
    """The first rows of the curves in a run folder. Resume points of version 0.1.0 have no curves.

    If rows are missing, this only logs a warning, because the weights do not depend on them.
    """
    metrics, timings = (_read_rows(storage.join(url, name), n_rows) for name in (METRICS, TIMINGS))
    n_found = min(len(metrics), len(timings))
    if n_found < n_rows:
        logger.warning(
            "%s has %d rows, but its resume point counts %d: the curve has a gap.",
            *(storage.join(url, METRICS), n_found, n_rows),
        )
    return CurveRows(metrics[:n_found], timings[:n_found])


def _read_rows(url: str, n_rows: int) -> list[Row]:
    rows: list[Row] = []
    try:
        for line in storage.read_text(url).splitlines()[:n_rows] if storage.exists(url) else ():
            rows.append(json.loads(line))
    except (CorruptDataError, ValueError) as err:
        logger.warning("%s is damaged after %d rows: %s", url, len(rows), err)
    return rows


def _is_ours(name: str) -> bool:
    """Whether an event file is one that `flush` writes."""
    parts = name.split(".")
    return len(parts) == 5 and parts[3].isdigit() and parts[4] == "saev"


def _events(
    rows: tp.Sequence[Row],
    timings: tp.Sequence[Row],
    hyperparameters: tp.Mapping[str, str | float] | None = None,
) -> bytes:
    """A TensorBoard event file: framed protocol buffers."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    first = timings[0]["wall_time"] if timings else 0.0
    events = [Event(wall_time=first, file_version="brain.Event:2")]
    if hyperparameters:
        events.append(Event(wall_time=first, summary=_session(hyperparameters)))
    for row, timing in zip(rows, timings, strict=True):
        merged = {k: v for k, v in {**timing, **row}.items() if k not in ("step", "wall_time")}
        values = [Summary.Value(tag=k, simple_value=v) for k, v in merged.items() if v is not None]
        step = int(row["step"] or 0)
        events.append(
            Event(wall_time=timing["wall_time"], step=step, summary=Summary(value=values))
        )
    return b"".join(_record(event.SerializeToString()) for event in events)


def _session(hyperparameters: tp.Mapping[str, str | float]) -> tp.Any:
    """What the plugin of TensorBoard's tab HPARAMS reads."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams import plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo()
    for key, value in hyperparameters.items():
        if isinstance(value, str):
            start.hparams[key].string_value = value
        else:
            start.hparams[key].number_value = value
    data = plugin_data_pb2.HParamsPluginData(version=0, session_start_info=start)
    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
    metadata = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag="_hparams_/session_start_info", metadata=metadata)])


def _record(data: bytes) -> bytes:
    """TFRecord framing: length, its masked CRC, data, its masked CRC.

    TensorBoard's own RecordWriter does the same, but its import takes seconds, because it imports
    the clients of cloud stores.
    """
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _masked_crc(data: bytes) -> bytes:
    crc = storage.crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


# --- Weights & Biases ---------------------------------------------------------------------------


def check_wandb(project: str) -> None:
    """Fail before training if a project is asked for and `wandb` is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"--wandb-project {project} needs Weights & Biases, which is not installed: "
            f"{distributions.install('wandb')}, or leave the flag out."
        )


class WandbRun:
    """One run on Weights & Biases, under the run's own id, so that a resumed run continues it.

    wandb keeps its files where WANDB_DIR says, or in ./wandb.
    """

    def __init__(self, project: str, run_id: str, name: str, config: dict[str, tp.Any]):
        import wandb

        self._run = wandb.init(
            project=project,
            id=run_id,
            name=name,
            config=config,
            resume="allow",
            reinit="create_new",  # this process has one run for each SAE of the group
        )

    def log(self, row: Row) -> None:
        """Add a row; steps that were logged before an interruption are ignored by the server."""
        values = {k: v for k, v in row.items() if k != "step" and v is not None}
        self._run.log(values, step=int(row["step"] or 0))

    def finish(self, summary: tp.Mapping[str, float | int | None]) -> None:
        """Close the run with its evaluation."""
        self._run.summary.update({f"eval/{k}": v for k, v in summary.items()})
        self._run.finish()
