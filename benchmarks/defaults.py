"""What the defaults of `saev train` were chosen by: SAEs on activations of a real model.

    python benchmarks/defaults.py --root /tmp/defaults lr init aux bar

DINOv2 ViT-S/14, last block, on 730 crops of scikit-image's photographs (the extra `demo`). Each
experiment is a sweep, trained on one pass over the data; its table has one row per SAE, and below
it stands what a PCA of the same rank leaves on the same validation tokens. `bar` is the test that
the defaults have to pass: nothing is set but the kinds. What is done is skipped when it is run
again. docs/training.md has the results.
"""

import argparse
import sys
import typing as tp

import torch
from torch import Tensor

from saev import storage, train
from saev.config import ImgSegFolder, LoaderConfig, SaeConfig, ShardsConfig, TrainConfig
from saev.demo import baselines, photos, weights
from saev.loaders import OrderedLoader
from saev.nn import load_sae
from saev.nn.metrics import ReconstructionMetrics
from saev.progress import Progress
from saev.shards import Shards, extract

D_SAE, TOP_K, VAL_FRACTION = 1536, 32, 0.1


class Experiment(tp.NamedTuple):
    """One sweep."""

    n_train: int
    batch_size: int | None
    sweep: str


_OLD_AUX = "objective.k_aux = 128\n"  # half of d_model, rounded down to a power of two
EXPERIMENTS = {
    "lr": Experiment(
        150_000,
        512,
        _OLD_AUX + "dead_after = 15000\nlr = [1.5e-3, 5e-3, 1e-2]\nsae.reinit_blend = [0.0, 0.8]\n",
    ),
    "init": Experiment(
        300_000,
        512,
        _OLD_AUX + "dead_after = 30000\n"
        "[[grid]]\nlr = 5e-3\nsae.reinit_blend = [0.0, 0.2, 0.4]\n"
        "[[grid]]\nlr = 2.5e-3\nsae.reinit_blend = [0.0, 0.2]\n",
    ),
    "batch": Experiment(
        150_000, 1024, _OLD_AUX + "dead_after = 15000\nlr = 1.5e-3\nsae.reinit_blend = [0.0, 0.4]\n"
    ),
    "aux": Experiment(
        200_000,
        512,
        "lr = 3e-3\nsae.reinit_blend = 0\nseed = 0\n"
        "[[grid]]\nobjective.aux_coeff = 0\ndead_after = 20000\n"
        "[[grid]]\nobjective.k_aux = [16, 128]\ndead_after = 20000\n"
        "[[grid]]\nobjective.k_aux = 16\nobjective.aux_coeff = 0.25\ndead_after = 20000\n"
        "[[grid]]\nobjective.k_aux = 16\ndead_after = 6000\n",
    ),
    "width": Experiment(
        100_000,
        512,
        "[[grid]]\nsae.d_sae = 384\nlr = [3e-3, 6e-3, 1.2e-2]\n"
        "[[grid]]\nsae.d_sae = 6144\nlr = [7.5e-4, 1.5e-3, 3e-3]\n",
    ),
    "muon": Experiment(
        100_000, 512, 'optim = "muon"\nsae.d_sae = 384\nlr = [1e-3, 3e-3, 1e-2, 3e-2]\n'
    ),
    "bar": Experiment(
        1_000_000,
        None,
        'sae.activation.kind = ["top-k", "batch-top-k"]\n'
        'objective.kind = ["vanilla", "matryoshka"]\n',
    ),
}
COLUMNS = (
    "activation objective d_sae batch lr blend aux k_aux dead_after "
    "nmse l0 dead dense dead_held_out"
)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="/tmp/saev-defaults")
    parser.add_argument("--n-examples", type=int, default=730)
    parser.add_argument("--n-threads", type=int, default=0, help="of torch; 0 leaves its own")
    parser.add_argument("names", nargs="+", choices=[*EXPERIMENTS])
    args = parser.parse_args()
    if args.n_threads:
        torch.set_num_threads(args.n_threads)
    with Progress() as progress:
        shards = record(args.root, args.n_examples, progress)
        for name in args.names:
            compare(name, args.root, shards, progress)


def record(root: str, n_examples: int, progress: Progress) -> str:
    """Activations of the demo's model on the demo's pictures; returns the shards' URL."""
    crops = photos.write_crops(storage.join(root, "photos"), n_examples)
    ckpt = weights.write_weights(storage.join(root, "weights", "dinov2_vits14.safetensors"))
    cfg = ShardsConfig(
        shards_root=storage.join(root, "shards"),
        family="dinov2",
        ckpt=f"{weights.ARCHITECTURE}@{ckpt}",
        image_size=224,
        layers=(-1,),
        batch_size=32,
        data=ImgSegFolder(root=crops),
    )
    return extract.run(cfg, progress=progress)


def compare(name: str, root: str, shards: str, progress: Progress) -> None:
    """One experiment: train what is not trained yet and print its table."""
    experiment = EXPERIMENTS[name]
    sweep = storage.join(root, f"{name}.toml")
    storage.write_text(sweep, experiment.sweep)
    cfg = TrainConfig(
        runs_root=storage.join(root, "runs"),
        sweep=sweep,
        train_data=LoaderConfig(shards=shards, val_fraction=VAL_FRACTION),
        n_train=experiment.n_train,
        batch_size=experiment.batch_size,
        sae=SaeConfig(d_sae=D_SAE),
    )
    urls = train.run(cfg, progress=progress)
    print(f"\n{name}: {experiment.n_train:,} tokens, k {TOP_K}")
    print("\t".join(COLUMNS.split()))
    for url in urls:
        print("\t".join(row(url)))
    config = TrainConfig.of_run(urls[0])
    fit, held_out = (read(side) for side in (config.train_data, config.val_loader()))
    mean, basis = baselines.pca_basis(fit)
    print(f"PCA of rank {TOP_K}: {baselines.pca_nmse(held_out, mean, basis, TOP_K):.4f}")
    sys.stdout.flush()


def row(url: str) -> list[str]:
    """One line of a table. NMSE and L0 are of the held-out tokens; dead and dense of all of them,
    because a latent for a rare thing need not fire on the few that are held out."""
    c = TrainConfig.of_run(url)
    held_out = storage.read_json(storage.join(url, "run.json"))["metrics"]
    everything = c.train_data.model_copy(update={"split": "all"})
    sae = load_sae(url)
    seen = ReconstructionMetrics(sae.d_model, sae.d_sae)
    with (
        Shards.open(everything.shards) as shards,
        OrderedLoader(shards, everything, 4096) as loader,
    ):
        for batch in loader:
            seen.update(batch.act, *sae(batch.act))
    m = seen.to_dict()
    n = m["n_latents"]
    return [
        c.sae.activation.kind,
        c.objective.kind,
        *(f"{v:g}" for v in (c.sae.d_sae, c.batch_size, c.lr, c.sae.reinit_blend)),
        *(f"{v:g}" for v in (c.objective.aux_coeff, c.objective.k_aux or 0, c.dead_after)),
        f"{held_out['normalized_mse']:.4f}",
        f"{held_out['l0']:.1f}",
        *(f"{v / n:.1%}" for v in (m["n_dead"], m["n_dense"], held_out["n_dead"])),
    ]


def read(data: LoaderConfig) -> Tensor:
    """All activations of one side of the split, [n, d_model]."""
    with Shards.open(data.shards) as shards, OrderedLoader(shards, data, 16_384) as loader:
        return torch.cat([batch.act for batch in loader])


if __name__ == "__main__":
    main()
