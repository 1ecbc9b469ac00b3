"""`make demo`: photographs and weights → `saev run` → where to look, and whether it is any good."""

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

from saev import run, storage
from saev.config import TrainConfig
from saev.config.base import Config
from saev.config.run import RunConfig
from saev.console import Console
from saev.demo import baselines, photos, weights
from saev.errors import SaevError
from saev.inference.results import Results
from saev.progress import Progress
from saev.shards import Shards
from saev.shards.protocol import in_validation

logger = logging.getLogger(__name__)


class DemoConfig(Config):
    """Images in, a picture book of features out, on what two wheels from PyPI hold."""

    root: str = "demo-out"
    """URL of the folder for everything."""
    n_examples: int = pydantic.Field(default=560, ge=photos.N_CLASSES)
    """Crops of photographs."""
    n_train: int = pydantic.Field(default=400_000, ge=1)
    """Tokens to train on."""
    n_latents: int = pydantic.Field(default=24, ge=0)
    """Latents in each report."""


class Measured(tp.NamedTuple):
    """One SAE beside what it has to beat."""

    name: str
    l0: float
    nmse: float
    n_dead: int
    d_sae: int
    baselines: baselines.Baselines


def main() -> None:
    """Entry point."""
    cfg = tyro.cli(DemoConfig, prog="python -m saev.demo")
    progress = Progress()
    logging.basicConfig(level="WARNING", format="%(message)s")
    logging.getLogger("saev").setLevel("INFO")
    try:
        with progress:
            page = run.run(prepare(cfg), progress=progress)
        measured = measure(cfg.root)
    except SaevError as err:
        sys.exit(f"saev: error: {err}")
    except KeyboardInterrupt:
        sys.exit("saev: Interrupted. The same command continues from here.")
    show(measured)
    sys.stderr.write(f"\nThe picture book: {page}\n")
    print(page)  # noqa: T201 - the one thing on standard output


def prepare(cfg: DemoConfig) -> RunConfig:
    """Write photographs, weights and a config file that `saev run` takes; returns its flags."""
    root = storage.normalize(cfg.root)
    crops = photos.write_crops(storage.join(root, "photos"), cfg.n_examples)
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


def measure(root: str) -> list[Measured]:
    """Held-out error of every SAE, and of a PCA and a random dictionary of the same rank.

    SAEs are judged by what `saev train` measured on the validation split after training; the
    baselines get the same split, and PCA is fitted on the training side.
    """
    (shards_entry,) = (e for e in storage.list_dir(storage.join(root, "shards")) if e.is_dir)
    shards = Shards.open(shards_entry.url)
    train, val = _read(shards, 0.1)
    mean, basis = baselines.pca_basis(train)
    rows = []
    for entry in storage.list_dir(storage.join(root, "runs")):
        if not storage.exists(storage.join(entry.url, "run.json")):
            continue
        cfg = TrainConfig.of_run(entry.url)
        metrics = storage.read_sealed(storage.join(entry.url, "run.json")).record["metrics"]
        d_sae, k = cfg.sae.d_sae or 0, max(1, round(metrics["l0"]))
        beside = baselines.Baselines(
            k,
            baselines.pca_nmse(val, mean, basis, k),
            baselines.random_nmse(val, mean, k, d_sae),
        )
        is_plain = cfg.objective.kind == "vanilla"
        name = cfg.sae.activation.kind + ("" if is_plain else f" {cfg.objective.kind}")
        # Held-out tokens are few; a latent is dead if it fires on no token at all.
        n_dead = Results.find(entry.url, shards.metadata.hash).metrics["n_dead"]
        rows.append(Measured(name, metrics["l0"], metrics["normalized_mse"], n_dead, d_sae, beside))
    return sorted(rows, key=lambda row: (row.name, row.l0), reverse=True)


def _read(shards: Shards, val_fraction: float, n_max: int = 40_000) -> tuple[Tensor, Tensor]:
    """Content tokens of the only layer, both sides of the split; at most ``n_max`` of each."""
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    first = int(shards.metadata.cls_token)
    for i, info in enumerate(shards.infos):
        acts = shards.read(i, None, 0, info.n_examples)[:, first:]
        start = int(shards.shard_starts[i])
        held_out = in_validation(np.arange(start, start + info.n_examples), val_fraction)
        for side, chosen in zip(sides, (~held_out, held_out), strict=True):
            side.append(acts[torch.from_numpy(chosen)].flatten(0, 1).float())
    train, val = (torch.cat(side) for side in sides)
    return train[:: max(1, len(train) // n_max)], val[:: max(1, len(val) // n_max)]


def show(rows: list[Measured]) -> None:
    """Print the comparison to standard error."""
    table = rich.table.Table(
        title="Normalised MSE on held-out images, beside a PCA of rank L0\n"
        "and L0 atoms of a random dictionary: lower is better"
    )
    for column in ("SAE", "L0", "NMSE", "PCA", "random", "dead"):
        table.add_column(column, justify="left" if column == "SAE" else "right")
    for row in rows:
        table.add_row(
            row.name, f"{row.l0:.1f}", f"{row.nmse:.4f}", f"{row.baselines.pca:.4f}",
            f"{row.baselines.random:.4f}", f"{row.n_dead} of {row.d_sae}",
        )  # fmt: skip
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
