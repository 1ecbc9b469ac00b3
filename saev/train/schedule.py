"""Learning rate and sparsity penalty over the steps of a run."""

import math


def lr_scale(step: int, n_steps: int, n_warmup: int) -> float:
    """Factor on the peak learning rate: linear warm-up, then a half cosine down to zero.

    Args:
        step: 0 for the first step.
        n_steps: steps of the run.
        n_warmup: steps of warm-up; the last of them is at the peak.
    """
    if step < n_warmup:
        return (step + 1) / n_warmup
    done = (step - n_warmup) / max(1, n_steps - n_warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def sparsity_scale(step: int, n_warmup: int) -> float:
    """Factor on the sparsity penalty: linear from 1/n_warmup to 1, then 1."""
    return min(1.0, (step + 1) / n_warmup) if n_warmup else 1.0
