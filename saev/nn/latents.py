"""Latents of a chunk of rows: sparse codes, or a dense matrix, with the same methods."""

import typing as tp

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saev.config.sae import Activation, JumpRelu
from saev.nn.kernels import dense, sparse
from saev.nn.objectives import Prefixes
from saev.nn.weights import Weights


class SparseLatents(tp.NamedTuple):
    """Latents of TopK and BatchTopK members."""

    codes: sparse.Codes
    """Codes of g·c rows, ordered by member; table rows are member·d_sae + latent."""
    grouped: sparse.ByLatent
    """The entries of the codes, grouped by latent."""
    n_rows: int
    """c, the rows of the chunk."""
    penalty: None = None
    """There is no penalty, because top_k fixes L0."""

    def decode(self, w_dec: Float[Tensor, "g s d"], prefixes: Prefixes) -> Float[Tensor, "g*c*p d"]:
        """Contribution of each block of latents to each token's reconstruction."""
        n_g, d_sae, d_model = w_dec.shape
        ptr = _block_ptr(self.codes, prefixes, self.n_rows, d_sae)
        table = w_dec.view(n_g * d_sae, d_model)
        return sparse.decode(self.codes, table, ptr, self.grouped)

    def per_latent(self, like: Float[Tensor, "g s"]) -> tuple[Tensor, Tensor]:
        """Per latent: tokens on which it is active, and Σ f."""
        values, latents = self.codes.values.detach(), self.codes.latents
        count, total = torch.zeros_like(like), torch.zeros_like(like)
        count.view(-1).index_add_(0, latents, (values > 0).to(count.dtype))
        total.view(-1).index_add_(0, latents, values)
        return count, total


class DenseLatents(tp.NamedTuple):
    """Latents of one ReLU or JumpReLU member."""

    act: dense.Activated
    """The latents and their sums."""
    penalty: Float[Tensor, " s"]
    """The penalty without its coefficient: L1 (ReLU) or L0 (JumpReLU)."""
    bf16: bool
    """Multiply with the decoder in bfloat16."""

    def decode(self, w_dec: Float[Tensor, "1 s d"], prefixes: Prefixes) -> Float[Tensor, "1*c*p d"]:
        """Contribution of each block of latents to each token's reconstruction."""
        return dense.decode_blocks(self.act.f, w_dec[0], prefixes.cuts[0], self.bf16)

    def per_latent(self, like: Float[Tensor, "1 s"]) -> tuple[Tensor, Tensor]:
        """Per latent: tokens on which it is active, and Σ f."""
        del like
        return self.act.l0.detach()[None], self.act.l1.detach()[None]


Latents = SparseLatents | DenseLatents


def dense_latents(
    weights: Weights, x: Float[Tensor, "c d"], activation: Activation, bf16: bool
) -> DenseLatents:
    """f = activation(x·W_enc + b_enc) of one member. Differentiable."""
    z = dense.product(x, weights.W_enc[0].T, bf16).add_(weights.b_enc[0])
    if isinstance(activation, JumpRelu):
        assert weights.log_threshold is not None
        act = dense.jump_relu(z, weights.log_threshold[0], activation.kernel_width)
        return DenseLatents(act, act.l0, bf16)
    act = dense.relu(z)
    return DenseLatents(act, act.l1, bf16)


def _block_ptr(
    codes: sparse.Codes, prefixes: Prefixes, n_rows: int, d_sae: int
) -> Int[Tensor, " bags_plus_1"]:
    """First entry of each block of latents of each row, ordered by (member, row, block)."""
    n_g, n_p = prefixes.lengths.shape
    if n_p == 1:
        return codes.row_ptr
    device = codes.latents.device
    row = sparse.bag_of_entry(codes.row_ptr, codes.latents.shape[0])
    # Entries are in ascending order of this key, because table rows begin at member·d_sae.
    key = row.to(torch.int64) * (n_g * d_sae) + codes.latents
    first = torch.arange(n_g * n_rows, device=device) * (n_g * d_sae)
    member = torch.arange(n_g, device=device).repeat_interleave(n_rows) * d_sae
    bounds = (first + member)[:, None] + prefixes.lengths.repeat_interleave(n_rows, dim=0)
    starts = torch.searchsorted(key, bounds[:, :-1].contiguous(), out_int32=True)
    starts = torch.cat([codes.row_ptr[:-1, None], starts], dim=1)
    return torch.cat([starts.flatten(), codes.row_ptr[-1:]])
