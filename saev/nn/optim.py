"""Optimisers over stacked parameters. Each member has its own learning rates.

The state is a flat dict of tensors, so that a bank can be saved as safetensors and resumed exactly.
"""

import math
import typing as tp

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

BETA1, BETA2 = 0.9, 0.999
EPS = 6.25e-10
"""Adam's ε, as in Gao et al. 2024: gradients of a mean over B·d_model elements are small."""

MATRICES = ("W_enc", "W_dec")
MUON_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic coefficients of Keller Jordan's Muon, as in torch.optim.Muon."""
_NEWTON_SCHULZ_STEPS = 5


Rates = tp.Sequence[tp.Mapping[str, float]]
"""One mapping per member: parameter → learning rate. The key "" stands for all other parameters."""


class Adam:
    """Adam (Kingma & Ba 2015) with learning rates per member and a fused update.

    Args:
        params: stacked parameters, each [n_members, …]; updated in place.
    """

    def __init__(self, params: tp.Mapping[str, Tensor]):
        self._params = dict(params)
        self.state = {
            f"adam.{name}.{moment}": torch.zeros_like(p)
            for name, p in params.items()
            for moment in ("m", "v")
        }

    def step(
        self, grads: tp.Mapping[str, Tensor], rates: Rates, t: int, skip: tp.Collection[str] = ()
    ) -> None:
        """Update all members.

        Args:
            grads: gradients of the parameters.
            rates: learning rates of each member.
            t: number of this step, from 1.
            skip: parameters that somebody else updates. They have the rate "".
        """
        for n, own in enumerate(rates):
            others = [name for name in self._params if name not in own and name not in skip]
            self._update(n, others, grads, own[""], t)
            for name in own.keys() & self._params.keys():
                self._update(n, [name], grads, own[name], t)

    def _update(
        self, n: int, names: list[str], grads: tp.Mapping[str, Tensor], lr: float, t: int
    ) -> None:
        device = self._params[names[0]].device
        done = [torch.full((), float(t - 1), device=device) for _ in names]
        adam(
            [self._params[name][n] for name in names],
            [grads[name][n] for name in names],
            [self.state[f"adam.{name}.m"][n] for name in names],
            [self.state[f"adam.{name}.v"][n] for name in names],
            [],
            done,
            fused=True,
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=lr,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )


class Muon:
    """Muon for the matrices, Adam for all other parameters.

    The update is the momentum with its singular values set to about one. It is scaled by
    0.2·√max(d_sae, d_model), so that it has the size of an Adam update (Liu et al. 2025,
    arXiv:2502.16982) and Adam's learning rates can be used. torch.optim.Muon is not used, because
    it always works in bfloat16.
    """

    def __init__(self, params: tp.Mapping[str, Tensor]):
        self._matrices = {name: params[name] for name in MATRICES}
        self._adam = Adam({name: p for name, p in params.items() if name not in MATRICES})
        self._momentum = {
            f"muon.{name}.m": torch.zeros_like(p) for name, p in self._matrices.items()
        }
        self.state = {**self._adam.state, **self._momentum}

    def step(self, grads: tp.Mapping[str, Tensor], rates: Rates, t: int) -> None:
        """Update all members. See :meth:`Adam.step`."""
        self._adam.step(grads, rates, t)
        for name, param in self._matrices.items():
            momentum = self._momentum[f"muon.{name}.m"].lerp_(grads[name], 1 - MUON_MOMENTUM)
            size = 0.2 * math.sqrt(max(param.shape[1:]))
            for n, own in enumerate(rates):
                nesterov = grads[name][n].lerp(momentum[n], MUON_MOMENTUM)
                param[n].sub_(orthogonalize(nesterov), alpha=own[""] * size)


Optimizer = Adam | Muon


def orthogonalize(matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """An approximation of the nearest semi-orthogonal matrix, with singular values of 0.7 … 1.2.

    Five Newton-Schulz steps (Jordan et al. 2024), bfloat16 on a GPU, else float32.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x.to(torch.bfloat16) if x.is_cuda else x
    # Norms of the rows first: the bits of a norm of all values depend on the number of threads.
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=1).float())
    # Squares of smaller values underflow. With a norm that is too small the steps would diverge.
    x = x / norm.clamp(min=1e-14).to(x.dtype)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
