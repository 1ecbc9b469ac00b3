"""The sparse autoencoder that a user loads.

    z = x·W_enc + b_enc        pre-activations (without subtracting b_dec from x)
    f = activation(z)          latents
    x̂ = f·W_dec + b_dec        reconstruction

It takes activations as they were recorded. The normalisation of training is folded into the weights
(:mod:`saev.nn.folding`).
"""

import typing as tp

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saev import storage
from saev.config.sae import BatchTopK, JumpRelu, Relu, SaeConfig, TopK
from saev.errors import CheckpointError, ConfigError
from saev.nn import activations
from saev.nn.io import native


class TopLatents(tp.NamedTuple):
    """The largest latents of each token, largest first."""

    values: Float[Tensor, "*batch k"]
    """Latent values; zero where fewer than k latents are active."""
    indices: Int[Tensor, "*batch k"]
    """Indices of the latents."""


class EncoderOutput(tp.NamedTuple):
    """Result of :meth:`SparseAutoencoder.encode`."""

    acts: Float[Tensor, "*batch d_sae"]
    """Latents f, mostly zero."""
    pre_acts: Float[Tensor, "*batch d_sae"]
    """Pre-activations z."""

    def top(self, k: int) -> TopLatents:
        """The k largest latents of each token."""
        return TopLatents(*self.acts.topk(min(k, self.acts.shape[-1]), dim=-1))


class SaeOutput(tp.NamedTuple):
    """Result of a forward pass."""

    x_hat: Float[Tensor, "*batch d_model"]
    """Reconstruction x̂."""
    acts: Float[Tensor, "*batch d_sae"]
    """Latents f."""


class SparseAutoencoder(nn.Module):
    """One SAE, for use rather than for training.

    Args:
        cfg: with `d_model` and `d_sae` filled in (``cfg.resolved(d_model)``).

    Attributes:
        W_enc: [d_model, d_sae].
        b_enc: [d_sae].
        W_dec: [d_sae, d_model].
        b_dec: [d_model].
        threshold: θ ≥ 0, a scalar for BatchTopK, [d_sae] for JumpReLU, else None.
        metadata: provenance stored in its checkpoint; empty if it was imported.
    """

    threshold: Tensor | None

    def __init__(self, cfg: SaeConfig):
        super().__init__()
        shapes = _shapes(cfg)
        assert cfg.d_model is not None
        assert cfg.d_sae is not None
        self.cfg = cfg.true()
        self.d_model: int = cfg.d_model
        self.d_sae: int = cfg.d_sae
        self.metadata: dict[str, tp.Any] = {}
        self.W_enc = nn.Parameter(torch.zeros(shapes["W_enc"]))
        self.b_enc = nn.Parameter(torch.zeros(shapes["b_enc"]))
        self.W_dec = nn.Parameter(torch.zeros(shapes["W_dec"]))
        self.b_dec = nn.Parameter(torch.zeros(shapes["b_dec"]))
        shape = shapes.get("threshold")
        self.register_buffer("threshold", None if shape is None else torch.zeros(shape))

    @classmethod
    def from_tensors(
        cls, cfg: SaeConfig, tensors: tp.Mapping[str, Tensor], *, source: str = "weights"
    ) -> tp.Self:
        """An SAE with these weights (copied, as float32).

        Raises:
            CheckpointError: a tensor is missing, unknown, or has another shape than `cfg` says.
        """
        expected = _shapes(cfg)
        if set(expected) != set(tensors):
            raise CheckpointError(
                f"{source} has tensors {sorted(tensors)}, expected {sorted(expected)} "
                f"for activation {cfg.activation.kind}."
            )
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise CheckpointError(
                    f"{source}: {name} has shape {list(tensors[name].shape)}, expected "
                    f"{list(shape)} for d_model {cfg.d_model} and d_sae {cfg.d_sae}."
                )
        top_k = getattr(cfg.activation, "top_k", 1)
        if top_k > len(tensors["b_enc"]):
            raise CheckpointError(
                f"{source} keeps {top_k} latents per token, but has only {cfg.d_sae}. It is "
                "damaged, or its config is of another SAE."
            )
        sae = cls(cfg)
        for name, tensor in sae.state_dict().items():
            tensor.copy_(tensors[name])
        return sae.eval().requires_grad_(False)

    def __repr__(self) -> str:
        """What it is, in one line; of a trained one also which."""
        activation = self.cfg.activation
        k = f", top_k={activation.top_k}" if isinstance(activation, TopK | BatchTopK) else ""
        run = f", run {self.metadata['run_id']}" if "run_id" in self.metadata else ""
        return (
            f"{type(self).__name__}({activation.kind}{k}, d_model={self.d_model}, "
            f"d_sae={self.d_sae}{run})"
        )

    def encode(self, x: "Float[Tensor, '*batch d_model'] | npt.NDArray[tp.Any]") -> EncoderOutput:
        """Latents and pre-activations of recorded activations x.

        Args:
            x: a tensor of any floating type on the SAE's device, or a NumPy array.

        Raises:
            ConfigError: x is something else, of another width, or holds integers.
        """
        given = self._checked(x)
        pre_acts = given.to(self.W_enc.dtype) @ self.W_enc + self.b_enc
        return EncoderOutput(self.activate(pre_acts), pre_acts)

    def activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """f = activation(z). The result for a token does not depend on the rest of the batch."""
        match self.cfg.activation:
            case Relu():
                return activations.relu(pre_acts)
            case TopK(top_k=k, rectify=rectify):
                return activations.top_k(pre_acts, k, rectify=rectify)
            case BatchTopK() | JumpRelu():
                assert self.threshold is not None
                return activations.threshold(pre_acts, self.threshold)

    def decode(
        self,
        acts: "Float[Tensor, '*batch d_sae'] | npt.NDArray[tp.Any]",
        prefix: int | None = None,
    ) -> Float[Tensor, "*batch d_model"]:
        """x̂ = f·W_dec + b_dec.

        Args:
            acts: latents, a tensor or a NumPy array.
            prefix: use only this number of first latents (for a Matryoshka SAE).

        Raises:
            ConfigError: `prefix` is not in 0..d_sae.
        """
        if isinstance(acts, np.ndarray):
            acts = self._tensor(acts).to(self.W_dec.dtype)
        if prefix is None:
            return acts @ self.W_dec + self.b_dec
        if not 0 <= prefix <= self.d_sae:
            raise ConfigError(f"prefix is {prefix}, expected 0 to d_sae = {self.d_sae}.")
        return acts[..., :prefix] @ self.W_dec[:prefix] + self.b_dec

    def forward(self, x: "Float[Tensor, '*batch d_model'] | npt.NDArray[tp.Any]") -> SaeOutput:
        """Reconstruction and latents of recorded activations x; see :meth:`encode`."""
        acts = self.encode(x).acts
        return SaeOutput(self.decode(acts), acts)

    def save(
        self, url: str, metadata: dict[str, tp.Any] | None = None
    ) -> dict[str, storage.Listed]:
        """Write ``sae.safetensors`` and ``config.json`` (last) into the folder `url`.

        Args:
            url: folder.
            metadata: JSON-able provenance, kept in config.json under "metadata".

        Returns:
            Size and checksum of both objects, by name.
        """
        return native.write(url, self.cfg, self.state_dict(), metadata)

    def _tensor(self, x: "npt.NDArray[tp.Any]") -> Tensor:
        """A NumPy array on the SAE's device."""
        plain = np.ascontiguousarray(x, x.dtype.newbyteorder("="))
        return torch.from_numpy(plain).to(self.W_enc.device)

    def _checked(self, x: tp.Any) -> Tensor:
        """x as a tensor of the right width."""
        if isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating):
            x = self._tensor(x)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = getattr(x, "dtype", type(x).__name__)
            raise ConfigError(
                f"An SAE encodes a torch tensor or a NumPy array of floating numbers, found {kind}."
            )
        if not x.ndim or x.shape[-1] != self.d_model:
            raise ConfigError(
                f"The SAE was trained on activations of width {self.d_model}, these have "
                f"{x.shape[-1] if x.ndim else 'no axis'}. Use shards of the same model."
            )
        return x


def _shapes(cfg: SaeConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of an SAE, without allocating any."""
    if cfg.d_model is None or cfg.d_sae is None:
        raise ConfigError("An SAE needs d_model and d_sae; use SaeConfig.resolved(d_model).")
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (cfg.d_model, cfg.d_sae),
        "b_enc": (cfg.d_sae,),
        "W_dec": (cfg.d_sae, cfg.d_model),
        "b_dec": (cfg.d_model,),
    }
    match cfg.activation:
        case BatchTopK():
            shapes["threshold"] = ()
        case JumpRelu():
            shapes["threshold"] = (cfg.d_sae,)
    return shapes
