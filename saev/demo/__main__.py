"""`make demo`: prepares photographs and weights, calls `saev run`, and prints an evaluation."""

import collections.abc
import functools
import importlib.resources
import logging
import sys
import typing as tp

import jinja2
import numpy as np
import pydantic
import rich.table
import torch
import tyro
from torch import Tensor

import saev.shards.extract as extract
from saev import inference, run, storage, train
from saev.config.base import Config
from saev.config.run import RunConfig
from saev.console import Console
from saev.demo import baselines, photos, weights
from saev.errors import SaevError
from saev.inference.results import Results
from saev.progress import Progress
from saev.shards import Shards
from saev.shards.protocol import in_validation
from saev.visuals import overview
from saev.visuals.rows import Row

logger = logging.getLogger(__name__)


class DemoConfig(Config):
    """Train SAEs on photographs and draw their features, with data from two wheels of PyPI."""

    root: str = "demo-out"
    """URL of the folder for everything."""
    n_examples: int = pydantic.Field(default=600, ge=photos.N_CLASSES)
    """Crops of photographs."""
    n_train: int = pydantic.Field(default=400_000, ge=1)
    """Tokens to train on."""
    n_latents: int = pydantic.Field(default=24, ge=0)
    """Latents in each report."""


class Side(tp.NamedTuple):
    """Metrics of an SAE on images that it was not trained on, and of baselines."""

    l0: float
    """Mean number of active latents per token."""
    nmse: float
    """Normalised mean squared error."""
    silent: int
    """Latents that fire on no token of these images."""
    baselines: baselines.Baselines
    """Errors of the baselines on the same tokens."""


class Measured(tp.NamedTuple):
    """Metrics of one SAE."""

    name: str
    """Kind of activation and objective."""
    d_sae: int
    """Number of latents."""
    crops: Side
    """On other crops of the photographs of training."""
    unseen: Side
    """On crops of other photographs."""


def main() -> None:
    """Entry point."""
    cfg = tyro.cli(DemoConfig, prog="python -m saev.demo")
    progress = Progress()
    logging.basicConfig(level="WARNING", format="%(message)s")
    logging.getLogger("saev").setLevel("INFO")
    try:
        with progress:
            config = prepare(cfg)
            run.run(config, progress=progress)
            measured, page = measure(config, progress)
    except SaevError as err:
        sys.exit(f"saev: error: {err}")
    except KeyboardInterrupt:
        sys.exit("saev: Interrupted. The same command continues from here.")
    show(measured)
    sys.stderr.write(f"\nThe picture book: {page}\n")
    print(page)  # noqa: T201 - the one thing on standard output


def prepare(cfg: DemoConfig) -> RunConfig:
    """Write photographs, weights and a config file. Returns the config of `saev run`."""
    root = storage.normalize(cfg.root)
    crops = photos.write_crops(storage.join(root, "photographs"), cfg.n_examples)
    ckpt = weights.write_weights(storage.join(root, "weights", "dinov2_vits14.safetensors"))
    folder = importlib.resources.files("saev.demo")
    template = jinja2.Template(
        folder.joinpath("demo.toml").read_text(), undefined=jinja2.StrictUndefined
    )
    text = template.render(
        photos=crops,
        ckpt=f"vit_small_patch14_dinov2@{ckpt}",
        n_train=cfg.n_train,
        n_latents=cfg.n_latents,
    )
    storage.write_text(storage.join(root, "demo.toml"), text)
    storage.write_text(storage.join(root, "sweep.toml"), folder.joinpath("sweep.toml").read_text())
    config = storage.join(root, "demo.toml")
    logger.info("Running: saev run --config %s --root %s", config, root)
    return RunConfig(config=config, root=root)


def measure(config: RunConfig, progress: Progress) -> tuple[list[Measured], str]:
    """Measure all SAEs on images that they were not trained on: other crops and other photographs.

    Metrics on other crops are those of `saev train` on its validation split. Metrics on other
    photographs are those of `saev inference`. The baselines, a PCA of the training side and a
    random dictionary, are measured on the same tokens.

    Returns:
        The SAEs, and the URL of the page that lists them.
    """
    stages = run.resolve(config)
    shards = Shards.open(extract.run(stages.shards, progress=progress))
    data = stages.shards.data.model_copy(update={"split": "validation"})
    others = stages.shards.model_copy(update={"data": data})
    unseen = Shards.open(extract.run(others, progress=progress))
    beside = _Beside(config.root, shards, unseen)
    rows = []
    urls = train.run(stages.training(shards.url), progress=progress, table=stages.sweep)
    measuring = [stages.measuring(url, unseen.url) for url in urls]
    for url, measured in zip(urls, inference.run_all(measuring, progress), strict=True):
        trained = Row.of_run(url)
        cfg, d_sae = trained.config, trained.config.sae.d_sae or 0
        results = Results.open(measured)
        is_plain = cfg.objective.kind == "vanilla"
        name = cfg.sae.activation.kind + ("" if is_plain else f" {cfg.objective.kind}")
        on_crops = beside.on("crops", trained.held_out, d_sae)
        on_unseen = beside.on("unseen", results.metrics, d_sae)
        rows.append(Measured(name, d_sae, on_crops, on_unseen))
    rows.sort(key=lambda row: (row.name, row.crops.l0), reverse=True)
    return rows, overview.write(config.root)


class _Beside:
    """The baselines. The random dictionary takes 20 s, so ROOT/baselines.json keeps all results.

    Args:
        root: the root.
        shards: crops of the photographs of training.
        unseen: crops of the others.
    """

    def __init__(self, root: str, shards: Shards, unseen: Shards):
        self._url = storage.join(root, "baselines.json")
        self._found = storage.read_json(self._url) if storage.exists(self._url) else {}
        self._shards, self._unseen = shards, unseen

    @functools.cached_property
    def _tokens(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The training side, and the tokens of both comparisons."""
        known, crops = _sides(self._shards, 0.1)
        return known, {"crops": crops, "unseen": _tokens(self._unseen)}

    @functools.cached_property
    def _pca(self) -> tuple[Tensor, Tensor]:
        return baselines.pca_basis(self._tokens[0])

    def on(self, name: str, metrics: tp.Mapping[str, float], d_sae: int) -> Side:
        """Metrics of an SAE, and of baselines with the same number of coefficients.

        Args:
            name: crops or unseen.
            metrics: what was measured of the SAE on these images.
            d_sae: its number of latents, which is that of the random dictionary.
        """
        k = max(1, round(metrics["l0"]))
        folders = [storage.name(shards.url) for shards in (self._shards, self._unseen)]
        key = "/".join([*folders, name, str(k), str(d_sae)])
        if key not in self._found:
            acts = self._tokens[1][name]
            self._found[key] = {
                "pca": baselines.pca_nmse(acts, *self._pca, k),
                "random": baselines.random_nmse(acts, self._pca[0], k, d_sae),
            }
            storage.write_json(self._url, self._found)
        beside = baselines.Baselines(k, **self._found[key])
        return Side(metrics["l0"], metrics["normalized_mse"], int(metrics["n_dead"]), beside)


def _tokens(shards: Shards) -> Tensor:
    """All content tokens of the only layer."""
    return torch.cat([acts.flatten(0, 1) for acts, _ in _examples(shards)])


def _sides(shards: Shards, val_fraction: float, n_max: int = 40_000) -> tuple[Tensor, Tensor]:
    """Content tokens of both sides of the split; at most ``n_max`` of the training side."""
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for acts, examples in _examples(shards):
        held_out = in_validation(examples, val_fraction)
        for side, chosen in zip(sides, (~held_out, held_out), strict=True):
            side.append(acts[torch.from_numpy(chosen)].flatten(0, 1))
    train_side, val = map(torch.cat, sides)
    return train_side[:: max(1, len(train_side) // n_max)], val


def _examples(shards: Shards) -> collections.abc.Iterator[tuple[Tensor, np.ndarray]]:
    """Content tokens of each shard's examples, and the examples' numbers."""
    first = int(shards.metadata.cls_token)
    for i, info in enumerate(shards.infos):
        start = int(shards.shard_starts[i])
        acts = shards.read(i, None, 0, info.n_examples)[:, first:].float()
        yield acts, np.arange(start, start + info.n_examples)


def show(rows: list[Measured]) -> None:
    """Print both comparisons to standard error."""
    for title, side in (
        (f"other crops of the {photos.N_CLASSES - len(photos.UNSEEN)} photographs", "crops"),
        (f"{len(photos.UNSEEN)} photographs that nothing was trained on", "unseen"),
    ):
        table = rich.table.Table(
            title=f"Normalised MSE on {title},\nbeside a PCA of rank L0 and L0 atoms of a random "
            "dictionary: lower is better"
        )
        for column in ("SAE", "L0", "NMSE", "PCA", "random", "silent"):
            table.add_column(column, justify="left" if column == "SAE" else "right")
        for row in rows:
            found: Side = getattr(row, side)
            table.add_row(
                row.name, f"{found.l0:.1f}", f"{found.nmse:.4f}", f"{found.baselines.pca:.4f}",
                f"{found.baselines.random:.4f}", f"{found.silent} of {row.d_sae}",
            )  # fmt: skip
        Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
