"""A vision transformer of one's own, from its definition to pictures of its features.

    marimo edit own_model.py

It makes its pictures itself and takes about a minute on two cores. It needs
`pip install 'saevit[notebooks]'`. Replace the pictures and the model by yours.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="saev: a model of one's own")


@app.cell
def _():
    import itertools
    from pathlib import Path

    import marimo as mo
    import matplotlib.pyplot as plt
    import numpy as np
    import safetensors.torch
    import torch
    from PIL import Image, ImageDraw
    from torch import nn

    import saev
    from saev.config import (
        ImgFolder,
        InferenceConfig,
        LoaderConfig,
        SaeConfig,
        ShardsConfig,
        TopK,
        TrainConfig,
        VisualsConfig,
    )
    from saev.images import ImageSpec
    from saev.inference.results import Results
    from saev.shards import Shards, extract
    from saev.vit import Tower, checkpoints, register_family

    return (
        Image, ImageDraw, ImageSpec, ImgFolder, InferenceConfig, LoaderConfig, Path,
        Results, SaeConfig, Shards, ShardsConfig, TopK, Tower, TrainConfig, VisualsConfig,
        checkpoints, extract, itertools, mo, nn, np, plt, register_family, saev,
        safetensors, torch,
    )  # fmt: skip


@app.cell
def _(mo):
    mo.md("""
    # A model of your own

    saev knows the vision transformers of timm and open_clip. This notebook adds one that is in
    neither: a small network in plain PyTorch, which learns here to name coloured shapes. Then it
    records what the network computes, trains a sparse autoencoder (SAE) on that, and looks at what
    its latents respond to. The documentation explains the parts in *Adding your own model*.
    """)
    return


@app.cell
def _(mo):
    # Everything is written below this folder.
    root = str(mo.cli_args().get("root") or "./own-model")
    n_images = 900
    n_epochs = 18  # of the network's own training
    return n_epochs, n_images, root


@app.cell
def _(mo):
    mo.md("""
    ## The pictures

    A folder of pictures, with one sub-folder for each class: `red circle`, `blue triangle` …
    """)
    return


@app.cell
def _(Image, ImageDraw, Path, itertools, n_images, np, plt, root):
    COLOURS = {"red": (214, 69, 65), "green": (38, 166, 91), "blue": (65, 105, 225)}
    SHAPES = ("circle", "square", "triangle")
    CLASSES = [" ".join(pair) for pair in itertools.product(COLOURS, SHAPES)]

    def draw(name, rng):
        """A shape at a random place on a noisy background, 48 x 48."""
        colour, shape = name.split()
        noise = rng.normal(160, 18, (48, 48, 3)).clip(0, 255).astype("uint8")
        image = Image.fromarray(noise)
        r = rng.integers(8, 13)
        x, y = rng.integers(r + 1, 47 - r, size=2)
        box, pen = (x - r, y - r, x + r, y + r), ImageDraw.Draw(image)
        if shape == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        else:
            corners = [(x - r, y + r), (x + r, y + r), (x, y - r)]
            pen.polygon(corners, fill=COLOURS[colour])
        return image

    pictures = Path(root, "pictures")
    _rng = np.random.default_rng(0)
    for _n in range(n_images):
        _place = pictures / CLASSES[_n % 9] / f"{_n:04}.png"
        _place.parent.mkdir(parents=True, exist_ok=True)
        draw(CLASSES[_n % 9], _rng).save(_place)

    _figure, _axes = plt.subplots(1, 9, figsize=(9, 1.3))
    for _ax, _name in zip(_axes, CLASSES, strict=True):
        _ax.imshow(Image.open(min((pictures / _name).iterdir())))
        _ax.set_title(_name, fontsize=7)
        _ax.axis("off")
    _figure.tight_layout()
    _figure
    return CLASSES, pictures


@app.cell
def _(mo):
    mo.md("""
    ## The network

    Patches of 8 x 8 pixels, a class token, two registers, and three blocks. Nothing in it knows of
    saev.
    """)
    return


@app.cell
def _(nn, torch):
    class ShapeViT(nn.Module):
        def __init__(self, width=64, grid=6, n_classes=9):
            super().__init__()
            self.patches = nn.Conv2d(3, width, 8, stride=8)
            self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.registers = nn.Parameter(0.02 * torch.randn(1, 2, width))
            self.place = nn.Parameter(0.02 * torch.randn(1, grid * grid, width))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(3)
            )
            self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_classes))

        def forward(self, images):
            tokens = self.patches(images).flatten(2).transpose(1, 2) + self.place
            special = torch.cat([self.cls, self.registers], dim=1).expand(len(images), -1, -1)
            stream = torch.cat([special, tokens], dim=1)
            for block in self.blocks:
                stream = block(stream)
            return self.head(stream[:, 0])

    return (ShapeViT,)


@app.cell
def _(
    CLASSES, Image, ImageSpec, Path, ShapeViT, mo, n_epochs, nn, pictures, root, safetensors, torch,
):  # fmt: skip
    # How a picture becomes the input: the network is trained with it, and saev records with it.
    spec = ImageSpec(image_size=(48, 48), resize=(48, 48), mean=(0.5,) * 3, std=(0.2,) * 3)

    torch.manual_seed(0)
    _files = sorted(pictures.glob("*/*.png"))
    _images = torch.stack([torch.as_tensor(spec.apply(Image.open(file))) for file in _files])
    _labels = torch.tensor([CLASSES.index(file.parent.name) for file in _files])
    network = ShapeViT()
    _training = torch.arange(len(_files)) % 10 > 0  # every tenth picture is left for testing
    _steps = n_epochs * -(-int(_training.sum()) // 30)
    _optimiser = torch.optim.AdamW(network.parameters())
    _schedule = torch.optim.lr_scheduler.OneCycleLR(_optimiser, 3e-3, total_steps=_steps)
    for _ in range(n_epochs):
        for _rows in _training.nonzero()[:, 0][torch.randperm(int(_training.sum()))].split(30):
            _loss = nn.functional.cross_entropy(network(_images[_rows]), _labels[_rows])
            _optimiser.zero_grad()
            _loss.backward()
            _optimiser.step()
            _schedule.step()

    with torch.no_grad():
        _is_right = network.eval()(_images[~_training]).argmax(1) == _labels[~_training]
    weights = str(Path(root, "shape-vit.safetensors"))
    safetensors.torch.save_file(network.state_dict(), weights)
    mo.md(
        f"After {n_epochs} epochs it names colour and shape of {_is_right.float().mean():.0%} of "
        "the pictures that were left for testing."
    )
    return spec, weights


@app.cell
def _(mo):
    mo.md("""
    ## Tell saev about it

    A *family* is a function from the name of a checkpoint to a `Tower`: the network, its blocks in
    order, and where the tokens of the picture are. saev puts hooks on the blocks, and checks in a
    forward pass that they return what the tower says.
    """)
    return


@app.cell
def _(ShapeViT, Tower, checkpoints, register_family, spec):
    @register_family("shape-vit")
    def load_shape_vit(ckpt, image_size=None):
        name = checkpoints.parse(ckpt)  # ARCH/random or ARCH@URL
        with checkpoints.untrained():
            net = ShapeViT()
        checksum = None
        if name.url is not None:
            found = checkpoints.read_weights(name.url)
            checkpoints.load_into(net, found.tensors, arch="shape-vit", url=found.url)
            checksum = found.checksum
        return Tower(
            module=net,
            blocks=net.blocks,
            grid=(6, 6),
            spec=spec,
            special_tokens=1 + 2,  # the class token and two registers, before the patches
            cls_token=True,
            ckpt_checksum=checksum,
        )

    family = "shape-vit"
    return (family,)


@app.cell
def _(mo):
    mo.md("""
    ## Record, train, measure

    Three stages, as `saev shards`, `saev train` and `saev inference` do them. What is done
    already is skipped when a cell runs again.
    """)
    return


@app.cell
def _(ImgFolder, Shards, ShardsConfig, extract, family, mo, pictures, root, weights):
    _cfg = ShardsConfig(
        shards_root=f"{root}/shards",
        family=family,
        ckpt=f"tiny@{weights}",
        layers=(1,),  # after the block in the middle
        data=ImgFolder(root=str(pictures)),
    )
    shards = Shards.open(extract.run(_cfg))
    mo.md(
        f"{shards.n_examples} pictures of {shards.content_tokens} patches, each "
        f"{shards.metadata.d_model} numbers."
    )
    return (shards,)


@app.cell
def _(LoaderConfig, SaeConfig, TopK, TrainConfig, mo, root, saev, shards):
    _cfg = TrainConfig(
        runs_root=f"{root}/runs",
        train_data=LoaderConfig(shards=shards.url, val_fraction=0.1),
        sae=SaeConfig(d_sae=256, activation=TopK(top_k=6)),
        n_train=10 * shards.n_examples * shards.content_tokens,  # ten epochs
        batch_size=1024,
    )
    # Three SAEs see the same batches.
    runs = saev.train.run(_cfg, table={"sae": {"activation": {"top_k": [3, 6, 12]}}})
    sae = saev.load_sae(runs[1])
    mo.md(f"{len(runs)} SAEs. The second is `{sae}`.")
    return (runs,)


@app.cell
def _(InferenceConfig, Results, mo, root, runs, saev):
    _urls = saev.inference.run_all([InferenceConfig(run=run) for run in runs])
    results = Results.open(_urls[1])
    saes = saev.tables.saes(root).to_pandas().set_index("run").loc[runs]
    mo.vstack(
        [
            saes[["name", "l0", "nmse", "n_dead", "d_sae"]].reset_index(drop=True).round(3),
            mo.md(
                "Figures of held-out pictures: latents that fire on a patch (L0), error over "
                "variance (NMSE), and latents that never fire. The notebook *metrics* plots them: "
                f"`saev notebook metrics`, then `marimo edit metrics.py -- --root {root}`."
            ),
        ]
    )
    return (results,)


@app.cell
def _(mo):
    mo.md("""
    ## Look

    For each class, the latent whose eight strongest pictures are most often of that class. Patches
    on which it fires are bright. Attention can carry to other patches what a shape is, so some of
    these latents fire on the background.
    """)
    return


@app.cell
def _(CLASSES, np, results, shards):
    examples = shards.examples().to_pandas()  # url, label and more of each picture
    _class_of = examples.label.to_numpy()

    def purity(latent, name):
        """Share of a latent's strongest eight pictures that are of a class."""
        best = results.top(latent).example_idx[:8]
        return (_class_of[best] == name).sum() / 8

    _alive = np.flatnonzero(results.frequency > 0)
    best_of = {}
    for _name in CLASSES:
        _scores = [(purity(latent, _name), results.max_values[latent]) for latent in _alive]
        best_of[_name] = int(_alive[max(range(len(_alive)), key=_scores.__getitem__)])
    return best_of, examples, purity


@app.cell
def _(Image, best_of, examples, np, plt, purity, results):
    _figure, _axes = plt.subplots(len(best_of), 8, figsize=(8, len(best_of) + 0.4))
    for _row, (_name, _latent) in zip(_axes, best_of.items(), strict=True):
        _top = results.top(_latent)
        for _ax in _row:
            _ax.axis("off")
        for _ax, _example, _acts in zip(_row, _top.example_idx, _top.token_acts, strict=False):
            _light = (_acts / results.max_values[_latent]).reshape(6, 6).repeat(8, 0).repeat(8, 1)
            _pixels = np.asarray(Image.open(examples.url[_example])) / 255
            _ax.imshow(_pixels * (0.3 + 0.7 * _light.clip(0, 1)[..., None]))
        _row[0].set_title(
            f"latent {_latent}: {purity(_latent, _name):.0%} {_name}", fontsize=8, loc="left"
        )
    _figure.tight_layout()
    _figure
    return


@app.cell
def _(VisualsConfig, best_of, mo, runs, saev, shards):
    page = saev.visuals.run(
        VisualsConfig(
            run=runs[1], shards=shards.url, latents=tuple(dict.fromkeys(best_of.values()))
        )
    )
    mo.md(
        f"The picture book of these latents and twenty more is `{page}`. Show it with "
        f"`saev open {page}`."
    )
    return (page,)


if __name__ == "__main__":
    app.run()
