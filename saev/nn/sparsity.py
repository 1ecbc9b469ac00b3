"""The coefficient λ of members with a target L0 (`objective.target_l0`), chosen by feedback.

Let e be a moving average of ln(L0/target) over the previous steps, I the sum of ln(L0/target) times
a small gain, and v the variance of the batch per dimension, which makes the result independent of
the unit of activations.

    JumpReLU    λ = (2v/target)·(e^e - 1 + I)
    ReLU        λ = √v·λ₀·e^(I + e/2)

For JumpReLU, λ without I follows from the gradient of the penalty v·(L0/target - 1)² (Rajamanoharan
et al. 2024, arXiv:2407.14435, appendix). It is negative below the target, which lowers θ. ReLU's L1
penalty changes L0 indirectly and after many steps, so its λ changes slowly. I removes the remaining
error. Both start at the target (:mod:`saev.nn.init`), so there is no warm-up.
"""

import math
import typing as tp

import torch
from jaxtyping import Float
from torch import Tensor

from saev.config.sae import SPARSITY_COEFF, Objective
from saev.device import upload
from saev.errors import ConfigError

_MEMORY = 0.9
"""Decay of the moving average of the error."""
_GAIN = 0.02
"""Growth of I per step for an error of one."""
_RELU_SHARE = 0.5
"""Factor of e in the exponent of ReLU's λ."""
_LEAST = 1e-3
"""Lower bound of L0, because ln 0 is not finite."""

Coefficient = float | Tensor


class SparsityControl:
    """Coefficients of the sparsity penalty of a bank's members.

    Args:
        kind: kind of activation.
        objectives: one per member.
        like: a tensor of the bank's dtype and device.

    Attributes:
        state: tensors for resume points; empty if no member has a target.

    Raises:
        ConfigError: a target for an activation that has no penalty.
    """

    def __init__(self, kind: str, objectives: tp.Sequence[Objective], like: Tensor):
        self._jump = kind == "jump-relu"
        self._objectives = list(objectives)
        self._any = any(o.target_l0 is not None for o in objectives)
        if self._any and kind not in ("relu", "jump-relu"):
            raise ConfigError(
                f"objective.target_l0 is given, but {kind} keeps top_k latents and has no penalty. "
                "Set sae.activation.top_k, or choose relu or jump-relu."
            )
        names = ("error", "sum") if self._any else ()
        self.state = {f"sparsity.{name}": like.new_zeros(len(self._objectives)) for name in names}

    def coefficients(self, factors: tp.Sequence[float], variance: Tensor) -> list[Coefficient]:
        """λ of this step.

        Args:
            factors: factors on fixed coefficients, one per member.
            variance: v of this step's batch.
        """
        fixed = [o.coefficient * f for o, f in zip(self._objectives, factors, strict=True)]
        if not self._any:
            return list(fixed)
        error, integral = self.state["sparsity.error"], self.state["sparsity.sum"]
        found: list[Coefficient] = []
        for n, objective in enumerate(self._objectives):
            if objective.target_l0 is None:
                found.append(fixed[n])
            elif self._jump:
                excess = error[n].exp() - 1 + integral[n]
                found.append(variance * (2 / objective.target_l0) * excess)
            else:
                growth = (integral[n] + _RELU_SHARE * error[n]).exp()
                found.append(variance.sqrt() * SPARSITY_COEFF * growth)
        return found

    def observe(self, l0: Float[Tensor, " n"]) -> None:
        """Update e and I with the L0 of each member on this step's batch, over all ranks."""
        if not self._any:
            return
        log_target = upload([math.log(o.target_l0 or 1.0) for o in self._objectives], l0)
        now = (l0.clamp(min=_LEAST).log() - log_target).clamp(-1, 1)
        self.state["sparsity.sum"].add_(now, alpha=_GAIN)
        self.state["sparsity.error"].lerp_(now, 1 - _MEMORY)


def stacked(coefficients: tp.Sequence[Coefficient], like: Tensor) -> Float[Tensor, " n"]:
    """The coefficients as one tensor. If all are numbers, this is one copy to the device."""
    if not any(isinstance(c, Tensor) for c in coefficients):
        return upload([float(c) for c in coefficients], like)
    parts = [c if isinstance(c, Tensor) else upload(c, like) for c in coefficients]
    return torch.stack(parts)
