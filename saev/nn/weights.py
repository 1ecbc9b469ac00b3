"""Parameters of some members of a bank, stacked."""

import typing as tp

from jaxtyping import Float
from torch import Tensor


class Weights(tp.NamedTuple):
    """Parameters of a group, or their gradients."""

    W_enc: Float[Tensor, "g s d"]
    """Encoders, transposed."""
    b_enc: Float[Tensor, "g s"]
    """Encoder biases."""
    W_dec: Float[Tensor, "g s d"]
    """Decoders."""
    b_dec: Float[Tensor, "g d"]
    """Decoder biases."""
    log_threshold: Float[Tensor, "g s"] | None = None
    """ln θ (JumpReLU)."""

    def leaves(self, grads: "Weights") -> "Weights":
        """Leaves of autograd that share this memory, and whose gradients are added to ``grads``."""
        found = {}
        for name, tensor in self._asdict().items():
            if tensor is not None:
                found[name] = tensor.detach().requires_grad_()
                found[name].grad = getattr(grads, name)
        return Weights(**found)

    def member(self, g: int) -> "Weights":
        """Views of one member's parameters."""
        return Weights(
            **{name: t[g : g + 1] for name, t in self._asdict().items() if t is not None}
        )
