"""The config of `saev train`."""

import typing as tp

import pydantic

from saev import storage
from saev.config.base import Config
from saev.config.loaders import LoaderConfig, ValDataConfig
from saev.config.named import SweepFile
from saev.config.sae import Objective, SaeConfig, Vanilla

RUN = "run.json"
"""The closing object of a run folder."""
_REMEDY = "Restore the run folder from a copy, or train it again."


def open_run(url: str) -> storage.Folder:
    """Open a complete run folder.

    Raises:
        CorruptDataError: run.json is damaged.
        StorageError: it is missing or cannot be read.
    """
    return storage.Folder.open(url, RUN, _REMEDY)


class TrainConfig(Config):
    """Train sparse autoencoders on recorded activations; with a sweep, many on the same batches."""

    added: tp.ClassVar[frozenset[str]] = frozenset({"allow_other_model", "kernels"})
    removed: tp.ClassVar = {"grad_clip": ""}

    runs_root: str = "./runs"
    """URL of the folder in which each SAE's run folder is made."""
    tag: str = ""
    """A name for the experiment, for your own use."""
    sweep: SweepFile = ""
    """Name of a sweep that comes with saev (such as topk), or URL of a TOML file of lists: every
    combination is an SAE (see docs/training)."""
    train_data: LoaderConfig = LoaderConfig()
    """Activations to train on."""
    val_data: ValDataConfig = ValDataConfig()
    """Activations to evaluate on; by default the validation split of the training activations."""
    allow_other_model: bool = False
    """Evaluate even if the activations are of another model, preprocessing or image size than those
    of training. run.json then says so."""
    n_train: int | None = pydantic.Field(default=None, ge=1)
    """Tokens to train on; by default 10 epochs, but at least 300,000 and at most 100 million."""
    n_val: int = pydantic.Field(default=10_000_000, ge=0)
    """Most tokens to evaluate on after training; 0 skips the evaluation."""
    batch_size: int | None = pydantic.Field(default=None, ge=1)
    """Tokens per step; by default 16,384, and less in a short run so that it has enough steps."""
    sae: SaeConfig = SaeConfig()
    """The SAE."""
    objective: Objective = Vanilla()
    """What it minimises."""
    optim: tp.Literal["adam", "muon"] = "adam"
    """Optimiser. Muon (orthogonalised momentum) serves the matrices, Adam the vectors."""
    lr: float | None = pydantic.Field(default=None, gt=0.0)
    """Peak learning rate; by default chosen from d_sae (docs/training)."""
    n_lr_warmup: int | None = pydantic.Field(default=None, ge=0)
    """Steps of linear warm-up; by default a share of the run. Cosine decay follows."""
    n_sparsity_warmup: int | None = pydantic.Field(default=None, ge=0)
    """Steps over which the sparsity penalty rises to its full weight; by default a share."""
    scale_mean: bool = True
    """Subtract the layer's recorded mean (folded into the saved weights)."""
    scale_norm: bool = True
    """Scale to a root mean square norm of √d_model (folded into the saved weights)."""
    dead_after: int | None = pydantic.Field(default=None, ge=1)
    """Tokens without firing after which a latent counts as dead; by default the smaller of 10M
    and a share of the run."""
    seed: int = 0
    """Seed of initialisation and prefixes. In a sweep that does not name seeds, each SAE has its
    own seed, made from this one and from the SAE's config."""
    data_seed: int = 0
    """Seed of the order of the data, shared by all SAEs of a sweep."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto (a GPU if there is one)."""
    n_ranks: int = pydantic.Field(default=0, ge=0)
    """Processes that train together, each on its share of every batch; by default one per GPU. The
    result does not depend on it, except for rounding."""
    bf16: bool = True
    """On a GPU, multiply with encoders (and dense decoders) in bfloat16. Weights and all other
    values are float32, except that Triton's kernels read decoders, batches and gradients of
    reconstructions in bfloat16 too. The CPU never uses bfloat16."""
    kernels: tp.Literal["auto", "reference", "triton"] = "auto"
    """What computes a step on a GPU beside matrix products: Triton's kernels, or torch (reference).
    auto takes Triton's if they work there; else it says why not."""
    max_parallel: int = pydantic.Field(default=0, ge=0)
    """Most SAEs trained on one pass over the data; 0 means all that can share it."""
    checkpoint_every: int = pydantic.Field(default=0, ge=0)
    """Steps between resume points; 0 disables step-based resume points."""
    checkpoint_minutes: float = pydantic.Field(default=5.0, ge=0.0)
    """Minutes between resume points; 0 disables time-based resume points."""
    log_every: int = pydantic.Field(default=25, ge=1)
    """Steps between rows of metrics.jsonl."""
    wandb_project: str = ""
    """Weights & Biases project; empty does not log there."""

    def val_loader(self) -> LoaderConfig:
        """How the activations of `val_data` are read: with the same memory and threads as those of
        training. A key of `val_data` that is None gets the default of LoaderConfig."""
        return LoaderConfig.model_validate(
            {
                "buffer_mb": self.train_data.buffer_mb,
                "n_threads": self.train_data.n_threads,
                "verify": self.train_data.verify,
                **self.val_data.given(),
            }
        )

    def identity(self) -> dict[str, tp.Any]:
        """With all keys that version 0.1.0 had, because the ids of existing runs depend on them."""
        val_data = self.val_loader().identity()
        return {**super().identity(), "val_data": val_data, "grad_clip": 1.0}

    @classmethod
    def of_run(cls, url: str) -> tp.Self:
        """The resolved config of a run folder. If run.json exists, its checksum is compared.

        Raises:
            CorruptDataError: config.json or run.json is damaged.
            StorageError: there is no config.json.
        """
        is_complete = storage.exists(storage.join(url, RUN))
        folder = open_run(url) if is_complete else storage.Folder.unlisted(url, RUN, _REMEDY)
        return cls.of_folder(folder)

    @classmethod
    def of_folder(cls, folder: storage.Folder) -> tp.Self:
        """:meth:`of_run` for a run folder that is open already."""
        place = storage.join(folder.url, "config.json")
        return cls.from_dict(folder.read_json("config.json"), source=place)


N_EPOCHS = 10
"""Epochs of a run, by default."""
LEAST_TOKENS = 300_000
"""A run of fewer tokens has too few steps."""
MOST_TOKENS = 100_000_000
"""What version 0.1.0 always took."""


def default_n_train(n_tokens: int) -> int:
    """Tokens to train on, where there are so many in an epoch."""
    return min(MOST_TOKENS, max(LEAST_TOKENS, N_EPOCHS * n_tokens))


TOKENS_PER_LATENT = 100
"""Tokens of an epoch per latent, below which many latents never fire: an active latent fires on
about k / d_sae of all tokens."""
N_STEPS = 1000
"""Steps that a run should at least have, unless batches would become tiny (docs/training.md)."""


def default_batch_size(n_train: int) -> int:
    """The largest power of two with at least N_STEPS steps, between 256 and 16,384 tokens."""
    wanted = max(1, n_train // N_STEPS)
    return min(16_384, max(256, 1 << (wanted.bit_length() - 1)))
