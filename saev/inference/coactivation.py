"""Which latents fire on the same tokens.

The measure is the cosine of two latents' firing patterns, n_ab / √(n_a · n_b), with n_ab the tokens
on which both fire. It is counted on whole images at even steps, of at most MAX_TOKENS tokens.
"""

import itertools

import numpy as np
import scipy.sparse
import torch

from saev.inference.blocks import ranges
from saev.inference.decoder import N_NEIGHBOURS, largest

MAX_TOKENS = 1 << 17
"""Tokens of the sample. The time grows with it, and with the square of L0."""
_BLOCK_NUMBERS = 1 << 21
_STEP_TOKENS = 1 << 14


class Coactivation:
    """Gathers the codes of the sample.

    Args:
        example_idx: the selected examples, int64, ascending.
        n_tokens: selected tokens of each.
        n_latents: of the SAE.
    """

    def __init__(self, example_idx: np.ndarray, n_tokens: np.ndarray, n_latents: int):
        total = int(n_tokens.sum())
        step = max(1, -(-total // MAX_TOKENS))
        chosen = slice(None, None, step)
        fits = np.cumsum(n_tokens[chosen]) <= MAX_TOKENS
        fits[:1] = True
        self._wanted = example_idx[chosen][fits]
        self._n_latents = n_latents
        self._parts = [scipy.sparse.csr_array((0, n_latents), dtype=np.float32)]

    def wants(self, example_idx: np.ndarray) -> bool:
        """Whether any of these examples is in the sample."""
        return bool(np.isin(example_idx, self._wanted).any())

    def add(self, example_idx: np.ndarray, row_nnz: np.ndarray, latents: np.ndarray) -> None:
        """Take the next tokens.

        Args:
            example_idx: example of each token, int64 [n].
            row_nnz: active latents of each token, int64 [n].
            latents: which ones, token after token, [nnz].
        """
        ptr = np.concatenate([[0], np.cumsum(row_nnz)])
        every = scipy.sparse.csr_array(
            (np.ones(len(latents), dtype=np.int8), latents, ptr),
            shape=(len(row_nnz), self._n_latents),
        )
        self._parts.append(every[np.flatnonzero(np.isin(example_idx, self._wanted))])

    def result(self) -> tuple[list[np.ndarray], list[np.ndarray], int]:
        """For each latent those that fire with it, the highest cosine first, and these cosines; and
        the tokens of the sample."""
        fires = scipy.sparse.vstack(self._parts, format="csr")
        counts = np.bincount(fires.indices, minlength=self._n_latents)
        scale = (1 / np.sqrt(np.maximum(counts, 1))).astype(np.float32)
        by_latent = fires.tocsc()
        k = min(N_NEIGHBOURS, self._n_latents - 1)
        others: list[np.ndarray] = []
        cosines: list[np.ndarray] = []
        step = max(1, _BLOCK_NUMBERS // self._n_latents)
        for start in range(0, self._n_latents, step):
            stop = min(start + step, self._n_latents)
            block = np.zeros((stop - start, self._n_latents), dtype=np.float32)
            for few in ranges(counts[start:stop], _STEP_TOKENS):
                self._count(fires, by_latent, start, few, block)
            own = np.arange(len(block))
            block[own, start + own] = 0
            block *= scale
            block *= scale[start:stop, None]
            best, which = largest(torch.from_numpy(block), k)
            for values, latents in zip(best.clamp(max=1).numpy(), which.numpy(), strict=True):
                n = int((values > 0).sum())
                others.append(latents[:n].astype(np.int32))
                cosines.append(values[:n])
        return others, cosines, fires.shape[0]

    def _count(
        self, fires: scipy.sparse.csr_array, by_latent: scipy.sparse.csc_array, start: int,
        few: tuple[int, int], block: np.ndarray,
    ) -> None:  # fmt: skip
        """On how many tokens each of a few latents and each other one fire."""
        ptr = by_latent.indptr[start + few[0] : start + few[1] + 1].astype(np.int64)
        tokens = by_latent.indices[ptr[0] : ptr[-1]]
        for first in range(0, len(tokens), _STEP_TOKENS):  # several only for one frequent latent
            together = fires[tokens[first : first + _STEP_TOKENS]]
            within = np.clip(ptr - ptr[0] - first, 0, together.shape[0])
            ends = together.indptr[within].tolist()
            for row, (begin, end) in enumerate(itertools.pairwise(ends), few[0]):
                found = together.indices[begin:end]
                block[row] += np.bincount(found, minlength=self._n_latents)
