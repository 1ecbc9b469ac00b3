"""Figures that every page of latents shows, and that are computed when a page is made."""

import numpy as np

N_TOP = 8
"""Images of a latent that pages show first: those on which it is strongest."""


def strong_first(frequency: np.ndarray, mean: np.ndarray, n_images: np.ndarray) -> np.ndarray:
    """All latents in the order of pages: strong and rare ones first.

    They are sorted by mean value × log(1 / frequency), from the highest down. Behind them come
    latents that fire on fewer than N_TOP images, and then those that never fire.

    Args:
        frequency: share of tokens on which each latent fires, [d_sae].
        mean: mean value over these tokens, [d_sae]; may be NaN for a latent that never fires.
        n_images: images on which each latent fires, [d_sae].

    Returns:
        Numbers of latents, int64 [d_sae].
    """
    score = np.nan_to_num(mean) * -np.log(np.maximum(frequency, 1e-300))
    is_few = n_images < min(N_TOP, int(n_images.max(initial=0)))
    return np.lexsort((-score, is_few, frequency == 0))


def image_purity(latent: np.ndarray, class_idx: np.ndarray, d_sae: int) -> np.ndarray:
    """Share of the most common class among each latent's images.

    Args:
        latent: the latent of each of its images, int [n].
        class_idx: the image's class, int [n]; negative if it has none.
        d_sae: number of latents.

    Returns:
        float64 [d_sae]; NaN for a latent whose images have no classes.
    """
    n_images = np.bincount(latent, minlength=d_sae)
    has_class = class_idx >= 0
    pairs = np.stack([latent[has_class], class_idx[has_class]])
    (of, _), n = np.unique(pairs, axis=1, return_counts=True)
    most = np.zeros(d_sae, dtype=np.int64)
    np.maximum.at(most, of, n)
    return np.where(most > 0, most / np.maximum(n_images, 1), np.nan)
