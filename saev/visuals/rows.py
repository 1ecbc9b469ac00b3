"""Rows of figures: an SAE, its figures, and the images on which each figure is measured.

Reports, the page of a root, the table in Kubeflow's UI and the lines on the terminal are made from
these rows. So all of them show the same figures of an SAE.
"""

import contextlib
import dataclasses
import math
import typing as tp

from saev import storage
from saev.config import TrainConfig
from saev.config.train import RUN, open_run
from saev.errors import SaevError
from saev.inference.results import Results

NO_NUMBER = "–"
"""Stands for a figure that is not known."""

HELD_OUT, ELSEWHERE, ALL, TRAINING = "held-out", "elsewhere", "all", "training"
"""The sides: which images a figure is measured on."""


class Side(tp.NamedTuple):
    """The texts that people read about a side."""

    name: str
    """Its name in headings."""
    images: str
    """The images that belong to it."""


SIDES = {
    HELD_OUT: Side("held out", "images that training has not seen"),
    ELSEWHERE: Side("other images", "images of another folder than that of training"),
    ALL: Side("all images", "all images of the folder, also those of training"),
    TRAINING: Side("training", "images that training has seen"),
}


class Figures(tp.NamedTuple):
    """An SAE's main figures. None stands for unknown, or not a number (see docs/metrics)."""

    nmse: float | None = None
    l0: float | None = None
    n_dead: int | None = None

    @classmethod
    def of(cls, raw: tp.Mapping[str, tp.Any]) -> tp.Self:
        """Take them from the metrics that training or inference stored."""
        return cls(raw.get("normalized_mse"), raw.get("l0"), raw.get("n_dead"))

    @property
    def order(self) -> float:
        """The key for sorting by NMSE. An unknown NMSE comes last."""
        return math.inf if self.nmse is None else self.nmse


@dataclasses.dataclass(frozen=True)
class Row:
    """One SAE with the metrics that were measured on one shards folder."""

    run: str
    """URL of the run folder."""
    report: str
    """URL of the report's first page, "" if the report is not complete."""
    config: TrainConfig
    """The resolved training config."""
    metrics: tp.Mapping[str, tp.Any]
    """Metrics of inference on the whole shards folder; empty if inference did not run."""
    held_out: tp.Mapping[str, tp.Any] = dataclasses.field(default_factory=dict)
    """Metrics at the end of training, on images that it had not seen; empty if there are none."""
    trained_on: tp.Mapping[str, tp.Any] = dataclasses.field(default_factory=dict)
    """The same on images that it had seen; empty for runs of version 0.1.0."""
    name: str = ""
    """The name that tells the SAE from the others of its section."""
    other_model: tp.Sequence[str] = ()
    """How the activations differ from those of training, if such a difference was allowed."""
    on_front: bool = False
    """Whether no other SAE of the section has both a lower L0 and a lower NMSE."""
    elsewhere: bool = False
    """Whether the folder is another one than that of training."""
    results: str = ""
    """URL of the folder of inference's results; "" if there is none."""

    @classmethod
    def of_run(cls, run: str) -> tp.Self:
        """An SAE as training published it, without metrics of inference.

        Args:
            run: URL of the run folder.

        Raises:
            CorruptDataError: config.json or run.json is damaged.
            StorageError: one of them is missing.
        """
        folder = open_run(run)
        held_out, trained_on = (
            folder.record.get(key) or {} for key in ("metrics", "train_metrics")
        )
        return cls(run, "", TrainConfig.of_folder(folder), {}, held_out, trained_on)

    @classmethod
    def find(cls, run: str) -> tp.Self | None:
        """As :meth:`of_run`, but None if there is no run.json."""
        return cls.of_run(run) if storage.exists(storage.join(run, RUN)) else None

    def on(self, results: Results, report: str = "") -> tp.Self:
        """The same SAE with the metrics of inference on a shards folder.

        Args:
            results: of inference.
            report: URL of the first page of their report, "" if there is none.
        """
        of_training = storage.name(self.config.train_data.shards)
        return dataclasses.replace(
            self, report=report, metrics=results.metrics, results=results.url,
            other_model=results.other_model,
            elsewhere=results.metrics["shards_hash"] != of_training,
        )  # fmt: skip

    @property
    def side(self) -> str:
        """The side of the headline: HELD_OUT if its figures are known, else ELSEWHERE or ALL."""
        if self.elsewhere:
            return ELSEWHERE
        return HELD_OUT if self.held_out else ALL

    def of_side(self, side: str) -> tp.Mapping[str, tp.Any]:
        """The metrics of a side. Training measured HELD_OUT, and inference ALL or ELSEWHERE."""
        return self.held_out if side == HELD_OUT else self.metrics

    @property
    def headline(self) -> Figures:
        """The figures of :attr:`side`."""
        return Figures.of(self.of_side(self.side))

    @property
    def training(self) -> Figures:
        """The figures of the training side."""
        return Figures.of(self.trained_on)


def last_logged(run: str, name: str) -> dict[str, tp.Any]:
    """The last row of a file of curves in a run folder; empty if it is missing or damaged.

    Args:
        run: URL of the run folder.
        name: ``metrics.jsonl`` or ``timings.jsonl``.
    """
    place = storage.join(run, name)
    with contextlib.suppress(SaevError, IndexError):
        row = storage.parse_json(storage.read_bytes(place).splitlines()[-1], place)
        return row if isinstance(row, dict) else {}
    return {}


def number(value: float | None, form: str) -> str:
    """A figure as text.

    Args:
        value: the figure; None if it is not known.
        form: how it is formatted, such as ".4f".
    """
    return NO_NUMBER if value is None else format(value, form)
