"""Configs of SAEs and their objectives. They do not import torch."""

import typing as tp

import pydantic

from saev.config.base import Config, refuse
from saev.config.images import Kind
from saev.errors import ConfigError


class Relu(Config):
    """f = max(0, z), with an L1 penalty."""

    kind: Kind[tp.Literal["relu"]] = "relu"


class TopK(Config):
    """Keep the k largest pre-activations of each token (Gao et al. 2024, arXiv:2406.04093)."""

    kind: Kind[tp.Literal["top-k"]] = "top-k"
    top_k: int = pydantic.Field(default=32, ge=1)
    """Latents that may be active per token."""
    rectify: Kind[bool] = True
    """Set negative values among the k to zero, as the paper does. False only for checkpoints of
    the published saev, whose TopK keeps them; such an SAE can be used but not trained further."""


class BatchTopK(Config):
    """Keep the k·B largest pre-activations of a batch of B (Bussmann et al. 2024,
    arXiv:2412.06410). Evaluation uses a threshold learned as an exponential moving average.
    """

    kind: Kind[tp.Literal["batch-top-k"]] = "batch-top-k"
    top_k: int = pydantic.Field(default=32, ge=1)
    """Mean number of active latents per token."""
    threshold_momentum: float = pydantic.Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum of the threshold's moving average."""


class JumpRelu(Config):
    """f = z·[z > θ] with an L0 penalty, θ learned through a straight-through estimator
    (Rajamanoharan et al. 2024, arXiv:2407.14435)."""

    added = frozenset(("init_l0", "kernel_width", "threshold_lr"))
    removed: tp.ClassVar = {"init_threshold": "", "bandwidth": ""}

    kind: Kind[tp.Literal["jump-relu"]] = "jump-relu"
    init_l0: int | None = pydantic.Field(default=None, ge=1)
    """Initial L0: θ starts at the quantile of the pre-activations with this many active latents per
    token; by default objective.target_l0, or 64."""
    kernel_width: float = pydantic.Field(default=0.5, gt=0.0, le=2.0)
    """Width ε of the rectangle kernel of the gradient estimator, as a multiple of θ."""
    threshold_lr: float | None = pydantic.Field(default=None, gt=0.0)
    """Peak learning rate of ln θ; by default 5·lr with Adam and lr with Muon."""

    def identity(self) -> dict[str, tp.Any]:
        """With the removed keys, because the ids of existing runs and results depend on them."""
        return {**super().identity(), "init_threshold": 0.01, "bandwidth": 0.05}


Activation = tp.Annotated[TopK | BatchTopK | Relu | JumpRelu, pydantic.Field(discriminator="kind")]


class SaeConfig(Config):
    """Shape, activation and parametrisation of one SAE."""

    removed: tp.ClassVar = {"enc_scale": ""}

    d_model: int | None = pydantic.Field(default=None, ge=1)
    """Width of the activations; read from the shards if not given, checked if given."""
    d_sae: int | None = pydantic.Field(default=None, ge=1)
    """Number of latents; `exp_factor` × d_model if not given."""
    exp_factor: int = pydantic.Field(default=16, ge=1)
    """Expansion factor, used when `d_sae` is not given."""
    activation: Activation = TopK()
    """Activation function."""
    reinit_blend: float = pydantic.Field(default=0.0, ge=0.0, le=1.0)
    """Data-point initialisation: share of a centred training activation in each decoder row. The
    rest is noise (both at unit norm). 0 is random initialisation (docs/training compares them)."""
    normalize_w_dec: bool = True
    """Keep decoder rows at unit norm after every step."""
    remove_parallel_grads: bool = True
    """Remove the part of the decoder's gradient that is parallel to its rows."""

    def identity(self) -> dict[str, tp.Any]:
        """With the removed key enc_scale, because the ids of existing runs depend on it."""
        return {**super().identity(), "enc_scale": None}

    def resolved(self, d_model: int) -> "SaeConfig":
        """The same config with `d_model` and `d_sae` filled in.

        Raises:
            ConfigError: this config has another width, or top_k is larger than d_sae.
        """
        if self.d_model is not None and self.d_model != d_model:
            raise ConfigError(
                f"sae.d_model is {self.d_model}, but the activations have {d_model} dimensions. "
                "Leave it out or set it to that."
            )
        d_sae = self.d_sae if self.d_sae is not None else self.exp_factor * d_model
        top_k = getattr(self.activation, "top_k", 1)
        if top_k > d_sae:
            raise ConfigError(
                f"sae.activation.top_k is {top_k}, but the SAE has only {d_sae} latents. "
                "Lower it or raise sae.d_sae."
            )
        return self.model_copy(update={"d_model": d_model, "d_sae": d_sae})

    def true(self) -> "SaeConfig":
        """The same config with the `exp_factor` that its sizes have, where that is a whole number.

        Where `d_sae` was given, `exp_factor` has its default, whatever the sizes are.
        """
        if not self.d_model or not self.d_sae or self.d_sae % self.d_model:
            return self
        return self.model_copy(update={"exp_factor": self.d_sae // self.d_model})


SPARSITY_COEFF = 1e-3
"""Default λ if neither sparsity_coeff nor target_l0 is given."""


class Vanilla(Config):
    """Mean squared error of the full reconstruction, plus sparsity and AuxK terms."""

    added = frozenset(("target_l0",))

    kind: Kind[tp.Literal["vanilla"]] = "vanilla"
    sparsity_coeff: float | None = pydantic.Field(default=None, ge=0.0)
    """Weight λ of the L1 (ReLU) or L0 (JumpReLU) penalty; by default 1e-3. TopK and BatchTopK have
    no penalty."""
    target_l0: float | None = pydantic.Field(default=None, gt=0.0)
    """Target for the mean number of active latents per token (ReLU and JumpReLU). Training then
    chooses λ, so sparsity_coeff must not be given."""
    aux_coeff: float = pydantic.Field(default=1 / 32, ge=0.0)
    """Weight α of the AuxK loss that revives dead latents; 0 leaves it out."""
    k_aux: int | None = pydantic.Field(default=None, ge=1)
    """Dead latents per token in the AuxK loss; by default half of top_k or target_l0. If there is
    neither, the smaller of 512 and d_model/2 rounded down to a power of two."""

    @pydantic.model_validator(mode="after")
    def _one_of_two(self) -> tp.Self:
        if self.target_l0 is not None and self.sparsity_coeff is not None:
            refuse(
                f"target_l0 is {self.target_l0:g} and sparsity_coeff is {self.sparsity_coeff:g}, "
                "but a target chooses the coefficient itself. Give one of them."
            )
        return self

    @property
    def coefficient(self) -> float:
        """λ if there is no target."""
        return SPARSITY_COEFF if self.sparsity_coeff is None else self.sparsity_coeff

    def identity(self) -> dict[str, tp.Any]:
        """With the default λ as a number, as version 0.1.0 had it."""
        return {**super().identity(), "sparsity_coeff": self.coefficient}


class Matryoshka(Vanilla):
    """Mean of the errors of nested prefixes of the dictionary, with lengths drawn at each step from
    a Pareto distribution. The paper uses the sum (Bussmann et al. 2025, arXiv:2503.17547)."""

    kind: Kind[tp.Literal["matryoshka"]] = "matryoshka"  # type: ignore[assignment]
    n_prefixes: int = pydantic.Field(default=10, ge=1)
    """Prefixes per step; the last one is always the whole dictionary."""
    pareto_alpha: float = pydantic.Field(default=0.5, gt=0.0)
    """P(length ≥ l) ∝ l^-this; smaller favours longer prefixes."""


Objective = tp.Annotated[Vanilla | Matryoshka, pydantic.Field(discriminator="kind")]
