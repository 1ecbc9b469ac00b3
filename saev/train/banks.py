"""The SAEs of a group, as one bank per shape on the same batches."""

import typing as tp

import torch
from torch import Tensor

from saev.config import TrainConfig
from saev.loaders import ShuffledLoader
from saev.nn import SaeBank, SparseAutoencoder, StepMetrics
from saev.nn.ranks import ALONE, Ranks
from saev.shards import Shards, finite
from saev.train.members import Member
from saev.train.normalize import Normalization, layer_stats
from saev.train.schedule import lr_scale, sparsity_scale

INIT_TOKENS = 8192
"""Tokens that an SAE is initialised from, or one per latent if those are more."""
INIT_BUFFER_MB = 256.0
"""Memory limit of the loader that reads these tokens. That of training may be gigabytes."""


class TrainingBank(tp.NamedTuple):
    """SAEs of the same shape, trained on activations with the same normalisation."""

    indices: tuple[int, ...]
    """Which members of the group."""
    configs: tuple[TrainConfig, ...]
    norm: Normalization
    bank: SaeBank

    def step(self, acts_bd: Tensor, step: int, n_steps: int, n_tokens: int) -> StepMetrics:
        """Take one optimiser step on recorded activations, which are not changed.

        Args:
            acts_bd: this rank's share of the batch.
            step: 0 for the first.
            n_steps: steps of the run.
            n_tokens: of the batch, over all ranks.
        """
        return self.bank.step(
            (acts_bd - self.norm.mean) * self.norm.scale,
            lr_factor=[lr_scale(step, n_steps, c.n_lr_warmup or 0) for c in self.configs],
            sparsity_factor=[sparsity_scale(step, c.n_sparsity_warmup or 0) for c in self.configs],
            n_tokens=n_tokens,
        )

    def saes(self) -> tp.Iterator[tuple[int, SparseAutoencoder]]:
        """Members (by their index in the group) as SAEs on recorded activations."""
        for n, index in enumerate(self.indices):
            yield index, self.bank.to_sae(n, self.norm.mean, self.norm.scale)


def build_banks(
    members: tp.Sequence[Member],
    shards: Shards,
    device: torch.device,
    *,
    initialise: bool,
    ranks: Ranks = ALONE,
) -> list[TrainingBank]:
    """Banks for the members of a group.

    A member's initial weights depend on its own config and the data, not on the other members.

    Args:
        members: with resolved configs that share their data.
        shards: the training activations.
        device: where they are trained.
        initialise: compute initial weights from activations. Not needed before a resume point is
            loaded.
        ranks: the processes that train together.
    """
    shapes: dict[tuple[tp.Any, ...], list[int]] = {}
    for index, member in enumerate(members):
        shapes.setdefault(_shape(member.config), []).append(index)
    stats = layer_stats(shards, members[0].config.train_data)
    banks = []
    for indices in shapes.values():
        configs = tuple(members[i].config for i in indices)
        first = configs[0]
        norm = Normalization.of(stats, scale_mean=first.scale_mean, scale_norm=first.scale_norm)
        data = norm.apply_(_sample(shards, first)) if initialise else None
        bank = SaeBank(
            [c.sae for c in configs],
            [c.objective for c in configs],
            [decided(c.lr) for c in configs],
            [c.seed for c in configs],
            d_model=shards.d_model,
            optim=first.optim,
            dead_after=decided(first.dead_after),
            device=device,
            bf16=first.bf16,
            data=data,
            ranks=ranks,
            kernels=first.kernels,
        )
        norm = norm._replace(mean=norm.mean.to(device))
        banks.append(TrainingBank(tuple(indices), configs, norm, bank))
    return banks


def _shape(c: TrainConfig) -> tuple[tp.Any, ...]:
    """Equal for SAEs that go into one bank. It contains the objective, because Matryoshka prefixes
    would slow down the plain SAEs of the same bank."""
    kinds = (c.sae.activation.kind, c.objective.kind, c.optim)
    return (c.sae.d_sae, *kinds, c.dead_after, c.scale_mean, c.scale_norm)


def _sample(shards: Shards, config: TrainConfig) -> Tensor:
    """Random training activations as recorded, float32 [n, d_model]; a fresh copy."""
    data = config.train_data
    data = data.model_copy(update={"buffer_mb": min(data.buffer_mb, INIT_BUFFER_MB)})
    n_rows = max(INIT_TOKENS, config.sae.d_sae or 0)
    with ShuffledLoader(shards, data, n_rows, seed=config.data_seed, epochs=1) as loader:
        batch = next(iter(loader))
        finite.check(batch.act, batch.example_idx, shards, int(batch.layer[0]))
        return batch.act.clone()


T = tp.TypeVar("T")


def decided(value: T | None) -> T:
    """A field that :func:`saev.train.resolve.resolve_one` has filled in."""
    assert value is not None, "the config is not resolved"
    return value
