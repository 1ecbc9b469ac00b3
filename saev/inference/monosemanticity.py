"""Monosemanticity: the similarity of the images on which a latent fires.

The definition is that of Pach et al. 2025 (arXiv 2504.02821). With ã the latent's values on N
images, scaled to 0 … 1, and ê the images' embeddings of length 1:

    Σ_{i<j} ã_i ã_j ⟨ê_i, ê_j⟩ / Σ_{i<j} ã_i ã_j
        = (‖Σ ã_i ê_i‖² − Σ ã_i²) / ((Σ ã_i)² − Σ ã_i²)

The scaling of ã is linear, so the sums of a·ê, ê, a and a² over the images are sufficient.
"""

import numpy as np
import scipy.sparse

_CHUNK_NUMBERS = 1 << 21
"""Numbers of embeddings that are converted to float64 at a time."""


_DENSE_ABOVE, _DENSE_CELLS = 1 / 8, 1 << 23


class Embedded:
    """Images and their embeddings.

    Args:
        example_idx: the images, int64 [n], ascending.
        vectors: their embeddings, float32 [n, d_model].
        n_examples: of the shards.
    """

    def __init__(self, example_idx: np.ndarray, vectors: np.ndarray, n_examples: int):
        self._unit = np.empty_like(vectors)
        self._total = np.zeros(vectors.shape[1])
        step = max(1, _CHUNK_NUMBERS // max(1, vectors.shape[1]))
        for start in range(0, len(vectors), step):
            unit = vectors[start : start + step].astype(np.float64)
            unit /= np.maximum(np.linalg.norm(unit, axis=1), 1e-30)[:, None]
            self._unit[start : start + step] = unit
            self._total += unit.sum(axis=0)
        self._row = np.full(n_examples, -1, dtype=np.int64)
        self._row[example_idx] = np.arange(len(example_idx))

    def only(self, is_wanted: np.ndarray) -> "Embedded":
        """The images among some examples; ``is_wanted`` is bool [n_examples]."""
        example_idx = np.flatnonzero((self._row >= 0) & is_wanted)
        return Embedded(example_idx, self._unit[self._row[example_idx]], len(self._row))

    @property
    def n_images(self) -> int:
        """Number of images that have an embedding."""
        return len(self._unit)

    def monosemanticity(
        self, latents: np.ndarray, example_idx: np.ndarray, values: np.ndarray, n_latents: int
    ) -> np.ndarray:
        """The monosemanticity of some latents.

        Args:
            latents: of each entry, int64 [nnz], ascending, 0 to n_latents - 1.
            example_idx: image of each entry, int64 [nnz], ascending within a latent.
            values: largest value of the latent on the image, float32 [nnz]; on all other images
                it is 0.
            n_latents: number of latents.

        Returns:
            float64 [n_latents]; NaN for a latent that has the same value on all images but one.
        """
        rows = self._row[example_idx]
        inside = rows >= 0
        latents, rows, values = latents[inside], rows[inside], values[inside].astype(np.float64)
        counts = np.bincount(latents, minlength=n_latents)
        ptr = np.concatenate([[0], np.cumsum(counts)])
        matrix = scipy.sparse.csr_array((values, rows, ptr), shape=(n_latents, self.n_images))
        weighted = self._weighted(matrix)
        low, high = np.zeros(n_latents), np.zeros(n_latents)
        firing = np.flatnonzero(counts)
        if len(firing):
            low[firing] = np.minimum.reduceat(values, ptr[firing])
            high[firing] = np.maximum.reduceat(values, ptr[firing])
        everywhere = counts == self.n_images
        low = np.where(everywhere, low, np.minimum(low, 0))
        high = np.where(everywhere, high, np.maximum(high, 0))
        span = np.where(high > low, high - low, np.nan)
        n, sum_1 = self.n_images, matrix.sum(axis=1)
        sum_2 = (matrix * matrix).sum(axis=1)
        vectors = (weighted - low[:, None] * self._total) / span[:, None]
        squares = (sum_2 - 2 * low * sum_1 + n * low * low) / span**2
        total = (sum_1 - n * low) / span
        pairs = total * total - squares
        above = (vectors * vectors).sum(axis=1) - squares
        # A single image makes no pair. Then the difference is a rounding error.
        enough = pairs > 1e-9 * total * total
        return np.divide(above, pairs, out=np.full(n_latents, np.nan), where=enough)

    def _weighted(self, matrix: scipy.sparse.csr_array) -> np.ndarray:
        """Σ a ê of each latent, float64 [latents, d_model]."""
        step = max(1, _CHUNK_NUMBERS // max(1, self.n_images))
        cells = matrix.shape[0] * matrix.shape[1]
        if _DENSE_ABOVE * cells < matrix.nnz and cells <= _DENSE_CELLS:
            matrix = matrix.toarray()  # a product that does not look for entries is faster
        parts = [
            matrix @ self._unit[:, start : start + step].astype(np.float64)
            for start in range(0, self._unit.shape[1], step)
        ]
        return np.concatenate(parts, axis=1)
