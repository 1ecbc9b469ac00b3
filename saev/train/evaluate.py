"""Measures trained SAEs on held-out activations, in the form in which they are used.

SAEs with a target L0 are calibrated first (:mod:`saev.nn.calibration`), on the tokens of every
second held-out example. Their metrics are measured on the other held-out examples. The same metrics
are also measured on tokens of the training side.
"""

import contextlib
import logging
import typing as tp
from collections.abc import Iterator

import torch
from torch import Tensor

from saev.config import BatchTopK, LoaderConfig, TrainConfig
from saev.loaders import ShuffledLoader
from saev.loaders.selection import Selection
from saev.nn import SparseAutoencoder
from saev.nn.calibration import Calibration, set_level
from saev.nn.codes import encode
from saev.nn.metrics import Metrics, ReconstructionMetrics
from saev.progress import Progress
from saev.shards import Shards, finite

logger = logging.getLogger(__name__)

_LATENT_BYTES = 256 << 20
"""Most bytes of latents of one SAE at a time."""
_BATCH_TOKENS = 16_384
_VAL_SEED = 0


class Evaluation(tp.TypedDict):
    """An SAE's evaluation, as run.json stores it. `metrics` is empty if nothing is held out."""

    metrics: Metrics
    """On held-out tokens, except those that the SAE was calibrated on."""
    train_metrics: tp.NotRequired[Metrics]
    """On the same number of tokens of the training side."""
    calibration: tp.NotRequired[Metrics]
    """The target L0, the chosen level, on how many tokens it was chosen, and the L0 of these tokens
    before."""


class _Rows(tp.NamedTuple):
    """A batch to measure on."""

    acts: Tensor
    """Recorded activations, [batch, d_model]."""
    calibrating: Tensor
    """Which of them are for calibration, bool [batch]."""


class _Tokens:
    """A fixed selection of tokens of the training side or of the held-out side.

    Args:
        data: how the side is read.
        n_most: upper limit of the number of tokens.
        device: of the batches.
        progress: where progress is shown.
    """

    def __init__(self, data: LoaderConfig, n_most: int, device: torch.device, progress: Progress):
        self._data, self._device, self._progress = data, device, progress
        self._open = contextlib.ExitStack()
        self._shards = self._open.enter_context(Shards.open(data.shards))
        selection = Selection(self._shards, data)
        self.n_tokens = min(n_most, selection.n_tokens)
        self._calibrating = torch.zeros(self._shards.n_examples, dtype=torch.bool)
        self._calibrating[torch.from_numpy(selection.examples[::2])] = True

    def __enter__(self) -> tp.Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def batches(self, title: str) -> Iterator[_Rows]:
        """All tokens, always in the same batches."""
        with (
            ShuffledLoader(
                self._shards,
                self._data,
                min(_BATCH_TOKENS, self.n_tokens),
                seed=_VAL_SEED,
                epochs=1,
                device=self._device,
            ) as loader,
            self._progress.task(title, total=self.n_tokens, unit="tok") as bar,
        ):
            left = self.n_tokens
            for batch in loader:
                finite.check(batch.act[:left], batch.example_idx, self._shards, int(batch.layer[0]))
                rows = self._calibrating[batch.example_idx[:left].cpu()].to(self._device)
                yield _Rows(batch.act[:left], rows)
                left -= len(rows)
                bar.advance(len(rows))
                if not left:
                    break


def aim(config: TrainConfig) -> float | None:
    """The target L0 of an SAE; None if it has none, or if its activation fixes L0 (TopK)."""
    activation = config.sae.activation
    return activation.top_k if isinstance(activation, BatchTopK) else config.objective.target_l0


@torch.no_grad()
def evaluate(
    saes: tp.Sequence[SparseAutoencoder],
    configs: tp.Sequence[TrainConfig],
    device: torch.device,
    progress: Progress,
) -> list[Evaluation]:
    """Calibrate and measure each SAE on at most ``n_val`` tokens of the validation side.

    If that side has more tokens, a random choice of them is taken, always the same one. Every SAE
    sees the same batches, and its numbers do not depend on the others.

    Args:
        saes: the SAEs. The thresholds of those with a target L0 are changed.
        configs: of the SAEs; they share their data.
        device: where the SAEs are.
        progress: where progress is shown.

    Returns:
        One evaluation per SAE, in their order.
    """
    found: list[Evaluation] = [{"metrics": {}} for _ in saes]
    if not saes or not configs[0].n_val:
        return found
    with _Tokens(configs[0].val_loader(), configs[0].n_val, device, progress) as held_out:
        aims = {n: l0 for n, config in enumerate(configs) if (l0 := aim(config)) is not None}
        calibrated = _calibrate(saes, aims, held_out) if aims else {}
        metrics = _measure(saes, held_out, "evaluate", calibrated)
    with _Tokens(configs[0].train_data, held_out.n_tokens, device, progress) as trained_on:
        train_metrics = _measure(saes, trained_on, "evaluate on the training side")
    for n, one in enumerate(found):
        one["metrics"], one["train_metrics"] = metrics[n], train_metrics[n]
        if n in calibrated:
            one["calibration"] = calibrated[n]
    return found


def _calibrate(
    saes: tp.Sequence[SparseAutoencoder], aims: tp.Mapping[int, float], held_out: _Tokens
) -> dict[int, Metrics]:
    """Set the levels of SAEs. Returns the `calibration` of each, by its index."""
    counts = {n: Calibration(saes[n], l0) for n, l0 in aims.items()}
    n_others = 0
    for acts_bd, calibrating in held_out.batches("calibrate"):
        n_others += int((~calibrating).sum())
        for n, calibration in counts.items():
            for part in _parts(acts_bd[calibrating], saes[n]):
                calibration.update(part)
    n_tokens = next(iter(counts.values())).n_tokens
    if not n_tokens or not n_others:
        logger.warning(
            "Thresholds are not calibrated: there are %d held-out tokens (--n-val) for the "
            "calibration and %d for the metrics after it, and both numbers must be above 0. Raise "
            "--n-val, or use more images.",
            *(n_tokens, n_others),
        )
        return {}
    for n, calibration in counts.items():
        set_level(saes[n], calibration.level())
    return {
        n: {
            "target_l0": calibration.l0,
            "level": calibration.level(),
            "n_tokens": calibration.n_tokens,
            "l0_before": calibration.l0_before,
        }
        for n, calibration in counts.items()
    }


def _measure(
    saes: tp.Sequence[SparseAutoencoder],
    tokens: _Tokens,
    title: str,
    calibrated: tp.Collection[int] = (),
) -> list[Metrics]:
    """Metrics of each SAE. Tokens on which an SAE was calibrated are left out."""
    found = [ReconstructionMetrics(sae.d_model, sae.d_sae, sae.b_enc.device) for sae in saes]
    for acts_bd, calibrating in tokens.batches(title):
        for n, (sae, metrics) in enumerate(zip(saes, found, strict=True)):
            for part in _parts(acts_bd[~calibrating] if n in calibrated else acts_bd, sae):
                codes = encode(sae, part)
                metrics.update_reconstruction(part, codes.x_hat)
                metrics.update_codes(
                    torch.bincount(codes.latents, minlength=sae.d_sae),
                    codes.values.abs().sum(dtype=torch.float64),
                )
    return [metrics.to_dict() for metrics in found]


def _parts(acts_bd: Tensor, sae: SparseAutoencoder) -> tuple[Tensor, ...]:
    """The rows in parts whose latents fit into memory; no part if there are no rows."""
    rows = max(1, _LATENT_BYTES // (4 * sae.d_sae))
    return acts_bd.split(rows) if len(acts_bd) else ()
