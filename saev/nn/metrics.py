"""Reconstruction and sparsity metrics, streamed over any number of batches in float64.

With x a token's vector, x̂ its reconstruction, N tokens, E = Σ‖x − x̂‖², Q = Σ‖x‖², S = Σ x:

    normalized_mse = E / (Q − ‖S‖²/N)      (the variance around the mean of all N tokens)

so the result does not depend on the sizes of batches. Averages of ratios per batch or per token
would be different numbers.
"""

import typing as tp

import torch
from torch import Tensor

from saev.errors import ConfigError

Metrics = dict[str, float | int | None]
"""Metrics by name; None if a metric is not defined."""

ALMOST_DEAD = 1e-7
"""A latent that fires on a smaller share of tokens than this is dead or almost dead."""
DENSE = 10.0
"""A latent is dense that fires so many times as often as the mean latent, which fires on L0 / d_sae
of the tokens; or on more than MOST_DENSE of them, where that is less."""
MOST_DENSE = 0.5


_BLOCK_ROWS = 256


class Vectors:
    """A batch of tokens in float64 and its sums, which all SAEs that are measured on it share.

    Args:
        device: where sums are made; see :class:`ReconstructionMetrics`.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        self._device = _sums_device(device)
        self._x = self._work = torch.empty(0, 0, dtype=torch.float64, device=self._device)
        self.n_tokens = 0
        """Tokens of the batch."""
        self.total = self._x.sum(0)
        """Σ x, float64 [d_model]. It is finite if and only if all of the batch is."""
        self.sq_norm = self._x.sum()
        """Σ‖x‖², float64."""

    @torch.no_grad()
    def load(self, x_bd: Tensor) -> tp.Self:
        """Take the next batch, in the memory of the one before if it is as large.

        Args:
            x_bd: activations as recorded, [batch, d_model].
        """
        self.n_tokens = len(x_bd)
        if self._x.shape[1:] != x_bd.shape[1:] or len(self._x) < len(x_bd):
            self._x = torch.empty(x_bd.shape, dtype=torch.float64, device=self._device)
            self._work = torch.empty_like(self._x)
        x, work = self._x[: len(x_bd)], self._work[: len(x_bd)]
        for rows, squares, given in self._blocks(x, work, x_bd):
            torch.mul(rows.copy_(given), rows, out=squares)
        self.total = x.sum(0)
        # Sum over rows first: the bits of a sum over all values depend on the number of threads.
        self.sq_norm = work.sum(0).sum()
        return self

    @torch.no_grad()
    def sq_error(self, x_hat_bd: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors with the reconstructions of the batch, [batch, d_model].

        Returns:
            Σ‖x − x̂‖², and ‖x − x̂‖² of each token [batch]; float64.
        """
        x, error = self._x[: self.n_tokens], self._work[: self.n_tokens]
        by_token = error.new_empty(len(error))
        x_hat = x_hat_bd.to(self._device)
        for rows, squares, made, sums in self._blocks(x, error, x_hat, by_token):
            torch.sum(torch.sub(rows, made, out=squares).square_(), 1, out=sums)
        return error.sum(0).sum(), by_token

    def _blocks(self, *tensors: Tensor) -> tp.Iterable[tuple[Tensor, ...]]:
        """Some rows of each at a time: on the CPU as many as its caches hold."""
        n = _BLOCK_ROWS if self._device.type == "cpu" else max(1, len(tensors[0]))
        return zip(*(tensor.split(n) for tensor in tensors), strict=True)


class ReconstructionMetrics:
    """Running sums for one SAE. Counts are exact; sums are float64.

    Merging the same parts in the same order gives the same bits. So a stage that keeps one
    accumulator per item and merges them in the order of items has the same result wherever the
    items ran.

    Args:
        d_model: width of the activations.
        d_sae: number of latents.
        device: where the sums live.
    """

    def __init__(self, d_model: int, d_sae: int, device: str | torch.device = "cpu"):
        self.d_model, self.d_sae = d_model, d_sae
        self._device = _sums_device(device)
        zeros = {"dtype": torch.float64, "device": self._device}
        self.sq_error = torch.zeros((), **zeros)  # type: ignore[call-overload]
        """E."""
        self.sq_norm = torch.zeros((), **zeros)  # type: ignore[call-overload]
        """Q."""
        self.total = torch.zeros(d_model, **zeros)  # type: ignore[call-overload]
        """S, [d_model]."""
        self.l1_total = torch.zeros((), **zeros)  # type: ignore[call-overload]
        """Σ|f|."""
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=self._device)
        """Tokens on which each latent fires, [d_sae]."""
        self.n_tokens = 0
        """N."""

    @torch.no_grad()
    def update(self, x_bd: Tensor, x_hat_bd: Tensor, f_bs: Tensor) -> None:
        """Add a batch.

        Args:
            x_bd: activations as recorded, [batch, d_model].
            x_hat_bd: their reconstructions, [batch, d_model].
            f_bs: latent values, dense, [batch, d_sae].

        Raises:
            ConfigError: a shape does not fit.
        """
        want = ((len(x_bd), self.d_model), (len(x_bd), self.d_model), (len(x_bd), self.d_sae))
        found = (tuple(x_bd.shape), tuple(x_hat_bd.shape), tuple(f_bs.shape))
        if found != want:
            raise ConfigError(f"Metrics were given shapes {found}, expected {want}.")
        self.update_reconstruction(x_bd, x_hat_bd)
        f = f_bs.to(self._device)
        self.update_codes((f != 0).sum(0), f.abs().sum(0, dtype=torch.float64).sum())

    @torch.no_grad()
    def update_reconstruction(self, x_bd: Tensor, x_hat_bd: Tensor) -> None:
        """Add the tokens of a batch and their errors. Codes are added by :meth:`update_codes`."""
        self.add(Vectors(self._device).load(x_bd), x_hat_bd)

    def add(self, vectors: Vectors, x_hat_bd: Tensor) -> Tensor:
        """As :meth:`update_reconstruction`, of tokens that several SAEs share. Returns the squared
        error of each token, float64 [batch]."""
        total, by_token = vectors.sq_error(x_hat_bd)
        self.sq_error += total
        self.sq_norm += vectors.sq_norm
        self.total += vectors.total
        self.n_tokens += vectors.n_tokens
        return by_token

    def update_codes(self, fired_s: Tensor, l1: Tensor | float) -> None:
        """Add codes that were counted elsewhere, of tokens given to :meth:`update_reconstruction`.

        Args:
            fired_s: tokens on which each latent fires, int64 [d_sae].
            l1: Σ|f| over these tokens.
        """
        self.fired += fired_s.to(self._device)
        self.l1_total += l1

    def merge(self, other: "ReconstructionMetrics") -> None:
        """Add the sums of another accumulator."""
        if (other.d_model, other.d_sae) != (self.d_model, self.d_sae):
            raise ConfigError(
                f"Metrics of widths {other.d_model}, {other.d_sae} cannot be merged into "
                f"metrics of widths {self.d_model}, {self.d_sae}."
            )
        for name in _TENSORS:
            mine: Tensor = getattr(self, name)
            mine += getattr(other, name).to(self._device)
        self.n_tokens += other.n_tokens

    def tensors(self) -> dict[str, Tensor]:
        """The sums as tensors on the CPU, for storage; :meth:`from_tensors` is the inverse."""
        state = {name: getattr(self, name).cpu().clone() for name in _TENSORS}
        return state | {"n_tokens": torch.tensor(self.n_tokens, dtype=torch.int64)}

    @classmethod
    def from_tensors(cls, tensors: tp.Mapping[str, Tensor]) -> "ReconstructionMetrics":
        """Metrics from what :meth:`tensors` returned."""
        self = cls(tensors["total"].numel(), tensors["fired"].numel())
        for name in _TENSORS:
            getattr(self, name).copy_(tensors[name])
        self.n_tokens = int(tensors["n_tokens"])
        return self

    def frequency(self) -> Tensor:
        """Share of tokens on which each latent fires, float64 [d_sae]."""
        return self.fired.double() / max(self.n_tokens, 1)

    def to_dict(self) -> Metrics:
        """The metrics by name.

        normalized_mse and explained_variance (1 − normalized_mse), both None if all tokens are the
        same vector, whose variance is 0; mse_per_token (E/N), mse_per_dim
        (E/(N·d_model)), l0 and l1 (means over tokens), n_dead (never fires), n_almost_dead
        (p < 1e-7, the dead ones too), dense_share (share of all latents with p > dense_above),
        dense_above (the smaller of 10·l0/d_sae and 0.5), n_latents, n_tokens.

        Raises:
            ConfigError: there were no tokens.
        """
        n = self.n_tokens
        if not n:
            raise ConfigError("There are no tokens to measure on.")
        error = float(self.sq_error)
        spread = float(self.sq_norm) - float(self.total.square().sum()) / n
        nmse = error / spread if spread > 1e-12 * float(self.sq_norm) else None
        p = self.frequency()
        l0 = int(self.fired.sum()) / n
        dense_above = min(DENSE * l0 / self.d_sae, MOST_DENSE)
        return {
            "normalized_mse": nmse,
            "explained_variance": None if nmse is None else 1.0 - nmse,
            "mse_per_token": error / n,
            "mse_per_dim": error / (n * self.d_model),
            "l0": l0,
            "l1": float(self.l1_total) / n,
            "n_dead": int((p == 0).sum()),
            "n_almost_dead": int((p < ALMOST_DEAD).sum()),
            "dense_share": int((p > dense_above).sum()) / self.d_sae,
            "dense_above": dense_above,
            "n_latents": self.d_sae,
            "n_tokens": n,
        }


def _sums_device(device: str | torch.device) -> torch.device:
    """Where float64 sums are kept: where the batches are, but Apple's GPUs have no float64."""
    return torch.device("cpu" if torch.device(device).type == "mps" else device)


_TENSORS = ("sq_error", "sq_norm", "total", "l1_total", "fired")
