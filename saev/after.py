"""What a person is told after a command: its figures, and the command that goes on from there.

All of it is read from what the stage has published, so that the same command says the same when the
work was done before.
"""

import dataclasses
import functools
import logging
import shlex
import typing as tp
from collections.abc import Sequence

from saev import eta, names, storage
from saev.config import (
    InferenceCommand,
    InferenceConfig,
    ShardsConfig,
    TrainConfig,
    VisualsCommand,
    VisualsConfig,
)
from saev.config.base import Config
from saev.errors import SaevError
from saev.inference import files
from saev.inference.results import Results
from saev.nn.io.load import HUB_PREFIX
from saev.shards import Shards
from saev.shards.protocol import SKIPPED
from saev.visuals import overview
from saev.visuals.files import DONE
from saev.visuals.pasted import command
from saev.visuals.rows import HELD_OUT, NO_NUMBER, SIDES, Figures, Row, last_logged, number

logger = logging.getLogger(__name__)

_MOST_ROWS = 20
"""SAEs in the table; a page has all of them."""


class Outcome:
    """What a command has made. Each stored object is read once, when it is first needed.

    Args:
        cfg: the command's config.
        urls: its results.
    """

    def __init__(self, cfg: tp.Any, urls: Sequence[str]):
        self.cfg = cfg
        self.urls = list(urls)

    def figures(self, seconds: float) -> str:
        """The figures in lines for people; "" if the command has none.

        Args:
            seconds: how long the command took now.
        """
        head, *rest = self.lines() or [""]
        return "\n".join([f"{head} ({eta.span(seconds)})", *rest]) if head else ""

    def lines(self) -> list[str]:
        """The figures, without the time."""
        return []

    def go_on(self) -> str:
        """The command that goes on from the results, ready to be pasted."""
        return _command("open", self.urls[0])

    def runs(self) -> list[str]:
        """The SAEs to which the command added something: URLs of run folders, or names of a hub."""
        return []

    def update_page(self) -> None:
        """Write the page of each root to which the command added SAEs, results or reports."""
        runs = [run for run in self.runs() if not run.startswith(HUB_PREFIX)]
        for run in {storage.parent(run): run for run in runs}.values():
            try:
                overview.update(run)
            except SaevError as err:  # the command itself has succeeded
                logger.warning("The page of the root is not up to date: %s", err)


def of(cfg: Config, urls: Sequence[str]) -> Outcome:
    """What a command has made.

    Args:
        cfg: its config.
        urls: its results.
    """
    for kinds, outcome in _OUTCOMES.items():
        if isinstance(cfg, kinds):
            return outcome(cfg, urls)
    return Outcome(cfg, urls)


def _command(name: str, *words: str) -> str:
    return shlex.join(["saev", name, *words])


def _columns(*sides: Figures) -> tp.Iterator[str]:
    """NMSE and L0 of each side, as wide as their columns."""
    for side in sides:
        yield f"{number(side.nmse, '.4f'):>8}"
        yield f"{number(side.l0, '.1f'):>6}"


# --- Shards --------------------------------------------------------------------------------------


class _Recorded(Outcome):
    cfg: ShardsConfig

    @functools.cached_property
    def _shards(self) -> Shards:
        with Shards.open(self.urls[0]) as shards:
            return shards

    def lines(self) -> list[str]:
        shards, meta = self._shards, self._shards.metadata
        megabytes = sum(info.n_bytes or 0 for info in shards.infos) / 1e6
        n_tokens = shards.n_examples * meta.content_tokens_per_example
        layers = ", ".join(map(str, meta.layers))
        lines = [
            f"Recorded {shards.n_examples:,} images: {n_tokens:,} patches of {meta.d_model} "
            f"numbers, layer{'s' * (len(meta.layers) > 1)} {layers}, {megabytes:,.1f} MB"
        ]
        if left_out := meta.n_examples - shards.n_examples:
            place = storage.join(self.urls[0], SKIPPED)
            lines.append(f"Left out {left_out:,} that cannot be decoded: {place}")
        return lines

    def go_on(self) -> str:
        layers = self._shards.metadata.layers
        flags = ["--shards", self.urls[0]]
        if len(layers) > 1:
            flags += ["--layer", str(layers[-1])]
        root = storage.normalize(self.cfg.shards_root)
        if storage.name(root) == "shards":  # its usual place beside the runs
            flags += ["--runs-root", storage.join(storage.parent(root), "runs")]
        return _command("train", *flags)


# --- Training ------------------------------------------------------------------------------------


class _Trained(Outcome):
    cfg: TrainConfig

    @functools.cached_property
    def _saes(self) -> list[Row]:
        """Best first: by the error on held-out images, then by that of training."""
        rows = [Row.of_run(url) for url in self.urls]
        named = zip(rows, names.of([row.config for row in rows]), strict=True)
        rows = [
            dataclasses.replace(row, name=name, trained_on=row.trained_on or _last_batch(row.run))
            for row, name in named
        ]
        return sorted(
            rows, key=lambda row: (Figures.of(row.held_out).order, row.training.order, row.run)
        )

    def lines(self) -> list[str]:
        n, shown = len(self._saes), self._saes[:_MOST_ROWS]
        width = max(len(row.name) for row in shown)
        lines = [
            f"Trained {n} SAE{'s' * (n != 1)}",
            "NMSE: squared error over variance, 0 is perfect. L0: latents firing per token.",
            f"Held out: {SIDES[HELD_OUT].images}.",
            f"{'':{width}}      held out        training side",
            f"{'SAE':{width}}    NMSE     L0     NMSE     L0   dead, held out",
            *(_trained_line(row, width) for row in shown),
        ]
        if n > len(shown):
            lines.append(f"… and {n - len(shown)} more")
        if not all(row.held_out for row in self._saes):
            lines.append(
                f"{NO_NUMBER} Nothing is held out: too few images, or --n-val 0. The training side "
                "is that of the last batch."
            )
        return lines

    def go_on(self) -> str:
        best, *others = self._saes
        data = best.config.train_data

        def reads_the_same(row: Row) -> bool:
            other = row.config.train_data
            return (other.shards, other.layer) == (data.shards, data.layer)

        runs = [best.run, *(row.run for row in others if reads_the_same(row))]
        return _command("inference", "--run", *runs, "--shards", data.shards)

    def runs(self) -> list[str]:
        return self.urls


def _trained_line(row: Row, width: int) -> str:
    held_out = Figures.of(row.held_out)
    dead = row.training.n_dead if held_out.n_dead is None else held_out.n_dead
    words = [f"{row.name:{width}}", *_columns(held_out, row.training)]
    return " ".join([*words, f"  {number(dead, ',')} of {row.config.sae.d_sae:,}"])


def _last_batch(url: str) -> dict[str, tp.Any]:
    """Figures of the last row of a run's curve."""
    row = last_logged(url, "metrics.jsonl")
    return {key.removeprefix("train/"): value for key, value in row.items()}


# --- Inference -----------------------------------------------------------------------------------


class _Measurement(tp.NamedTuple):
    """What inference measured of an SAE."""

    run: str
    """URL of the folder that the results are in, mostly a run folder."""
    metrics: tp.Mapping[str, tp.Any]
    """On all images."""
    row: Row | None
    """What training measured too; None if the results are in no complete run folder."""

    @classmethod
    def at(cls, url: str) -> tp.Self:
        """The results at a URL."""
        results, run = Results.open(url), storage.parent(storage.parent(url))
        trained = Row.find(run)
        return cls(run, results.metrics, trained.on(results) if trained else None)

    @property
    def held_out(self) -> Figures:
        """On held-out images, if the results are of the images of training."""
        row = self.row
        return row.headline if row is not None and row.side == HELD_OUT else Figures()

    @property
    def order(self) -> float:
        """What results are compared by: the held-out error, or that of all images."""
        return (self.row.headline if self.row else Figures.of(self.metrics)).order


class _Measured(Outcome):
    cfg: InferenceConfig | InferenceCommand

    @functools.cached_property
    def _found(self) -> list[_Measurement]:
        return [_Measurement.at(url) for url in self.urls]

    @functools.cached_property
    def _configs(self) -> list[InferenceConfig]:
        """One for each result."""
        return self.cfg.configs() if isinstance(self.cfg, InferenceCommand) else [self.cfg]

    def lines(self) -> list[str]:
        return self._of_several() if len(self._found) > 1 else self._of_one(self._found[0])

    @staticmethod
    def _of_one(found: _Measurement) -> list[str]:
        metrics, held_out = found.metrics, found.held_out
        words = [
            f"NMSE {number(metrics['normalized_mse'], '.4f')} at L0 {metrics['l0']:.1f}",
            f"dead {metrics['n_dead']:,} of {metrics['d_sae']:,}",
        ]
        if "dense_share" in metrics:
            above = f"latents that fire on over {metrics['dense_above']:.2g} of the tokens"
            words.append(f"dense {metrics['dense_share']:.1%} ({above})")
        lines = [f"Measured on {metrics['n_tokens']:,} tokens of {metrics['n_examples']:,} images"]
        if held_out.l0 is not None:
            nmse = number(held_out.nmse, ".4f")
            lines.append(
                f"held out:   NMSE {nmse} at L0 {held_out.l0:.1f} (as training measured it)"
            )
        return [*lines, f"all images: {', '.join(words)}"]

    def _of_several(self) -> list[str]:
        configs = [
            one.row.config if one.row else TrainConfig.of_run(one.run) for one in self._found
        ]
        said = names.of(configs)
        width = max(map(len, said))
        lines = [
            f"Measured {len(said)} SAEs; what is held out, training measured",
            f"{'':{width}}      held out          all images",
            f"{'SAE':{width}}    NMSE     L0     NMSE     L0   dead, all images",
        ]
        for name, one in zip(said, self._found, strict=True):
            columns = _columns(one.held_out, Figures.of(one.metrics))
            dead = f"  {one.metrics['n_dead']:,} of {one.metrics['d_sae']:,}"
            lines.append(" ".join([f"{name:{width}}", *columns, dead]))
        return lines

    def go_on(self) -> str:
        best = min(range(len(self.urls)), key=lambda n: self._found[n].order)
        cfg, url = self._configs[best], self.urls[best]
        recorded = storage.read_sealed(storage.join(url, files.CONFIG), remedy=files.REMEDY).record
        shards = cfg.data.shards or recorded["config"]["data"]["shards"]
        return command(
            VisualsConfig(
                run=cfg.run,
                shards=shards,
                inference=url if cfg.out else "",
                allow_other_model=cfg.allow_other_model,
            )
        )

    def runs(self) -> list[str]:
        return [cfg.run for cfg in self._configs]


# --- Visuals -------------------------------------------------------------------------------------


class _Drawn(Outcome):
    cfg: VisualsConfig | VisualsCommand

    def lines(self) -> list[str]:
        places = [storage.join(storage.parent(url), DONE) for url in self.urls]
        records = [storage.read_sealed(place).record for place in places]
        n_pictures, n_latents = (
            sum(record.get(key, 0) for record in records) for key in ("n_pictures", "n_latents")
        )
        of = f" of {len(places)} SAEs" if len(places) > 1 else ""
        return [f"Drew {n_pictures:,} images for {n_latents:,} latents{of}"]

    def go_on(self) -> str:
        """Opens the page, or that of the root if there are several."""
        run = self.runs()[0]
        root = overview.root_of(run) if len(self.urls) > 1 else ""
        return _command("open", storage.join(root, overview.INDEX) if root else self.urls[0])

    def runs(self) -> list[str]:
        cfg = self.cfg
        return [one.run for one in cfg.configs()] if isinstance(cfg, VisualsCommand) else [cfg.run]


_OUTCOMES: dict[tp.Any, type[Outcome]] = {
    ShardsConfig: _Recorded,
    TrainConfig: _Trained,
    InferenceConfig | InferenceCommand: _Measured,
    VisualsConfig | VisualsCommand: _Drawn,
}
