"""How well a single latent finds a class: formulas on sparse columns.

A latent has the value 0 on all tokens on which it does not fire. These tokens are counted, not
listed. Tokens with equal values are one threshold, as in scikit-learn's `average_precision_score`:
AP = Σ_n (R_n − R_{n−1}) P_n over the distinct values from the highest down, where P and R are
precision and recall of the tokens at or above a value.
"""

import typing as tp
from collections.abc import Callable, Iterable

import numpy as np

N_CLASSES = 256
"""Labels are uint8."""


class Carry(tp.NamedTuple):
    """Counts so far, for columns whose entries come in several bands of falling values."""

    n: np.ndarray
    """Tokens with higher values, int64 [latents]."""
    by_class: np.ndarray
    """Those of these tokens that belong to each class, int64 [latents, classes]."""

    @classmethod
    def zeros(cls, n_latents: int, n_classes: int = N_CLASSES) -> "Carry":
        """The counts before the first band."""
        shape = (n_latents, n_classes)
        return cls(np.zeros(n_latents, dtype=np.int64), np.zeros(shape, dtype=np.int64))


def descending_key(values: np.ndarray) -> np.ndarray:
    """Integers in the reverse order of float32 values, uint32 [n]. Equal values have equal keys."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    return ~ascending


_ZERO_KEY = np.uint32(0x7FFFFFFF)
"""`descending_key` of 0."""


def precision_sums(
    latents: np.ndarray, values: np.ndarray, labels: np.ndarray, carry: Carry
) -> np.ndarray:
    """Sum, over the entries of each latent and class, of the precision at their values.

    Divided by the number of tokens of the class, it is the part of the AP that these entries make
    up. An entry of class c adds t/n, where n is the number of tokens at or above its value, and t
    the number of those that belong to c. So the cost does not depend on the number of classes.

    Args:
        latents: column of each entry, int64 [nnz], from 0.
        values: its value, float32 [nnz], not 0.
        labels: its class, [nnz].
        carry: tokens that come before the entries; updated to come after them.

    Returns:
        float64 [n_latents, classes].
    """
    n_latents, n_classes = carry.by_class.shape
    value_order = np.argsort(_joined(latents, descending_key(values)))
    latents, labels = latents[value_order], labels[value_order]
    n_by_latent = np.bincount(latents, minlength=n_latents)
    starts = np.cumsum(n_by_latent) - n_by_latent
    # Tokens of the latent at or above each value: the same for equal ones.
    n = _run_ends(latents, values[value_order]) - starts[latents]

    group = latents * n_classes + labels
    counts = np.bincount(group, minlength=n_latents * n_classes)
    # By class, and within each by value still.
    joined = np.sort(_joined(group, np.arange(len(group), dtype=np.uint32)))
    order = (joined & np.uint64(0xFFFFFFFF)).astype(np.int64)
    group, n = group[order], n[order]
    starts = np.cumsum(counts) - counts
    t = _run_ends(group, n) - starts[group]

    precision = (t + carry.by_class.reshape(-1)[group]) / (n + carry.n[latents[order]])
    sums = np.bincount(group, weights=precision, minlength=n_latents * n_classes)
    sums = sums.astype(np.float64, copy=False)  # numpy gives integers where there are no entries
    carry.n[:] += n_by_latent
    carry.by_class[:] += counts.reshape(n_latents, n_classes)
    return sums.reshape(n_latents, n_classes)


def _joined(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Numbers in the order of the first of each pair, then of the second, uint64 [n].

    Args:
        high: below 2³².
        low: uint32.
    """
    joined = high.astype(np.uint64)
    joined <<= np.uint64(32)
    joined |= low
    return joined


def _run_ends(*fields: np.ndarray) -> np.ndarray:
    """For each element of arrays where equal ones are neighbours, the position behind the last one
    that is equal to it in all of them."""
    is_last = np.zeros(len(fields[0]), dtype=bool)
    is_last[-1:] = True
    for field in fields:
        is_last[:-1] |= field[1:] != field[:-1]
    ends = np.flatnonzero(is_last) + 1
    return np.repeat(ends, np.diff(ends, prepend=0))


def zero_group(
    carry: Carry, active: np.ndarray, active_by_class: np.ndarray, n_by_class: np.ndarray
) -> np.ndarray:
    """Precision sums of the tokens on which a latent does not fire, which are added to the carry.

    Args:
        carry: tokens with positive values; updated.
        active: tokens on which each latent fires, int64 [latents].
        active_by_class: of them, in each class, int64 [latents, classes].
        n_by_class: tokens of each class, int64 [classes].

    Returns:
        float64 [latents, classes].
    """
    silent_by_class = n_by_class - active_by_class
    carry.n[:] += n_by_class.sum() - active
    carry.by_class[:] += silent_by_class
    return silent_by_class * (carry.by_class / np.maximum(carry.n, 1)[:, None])


def count_by_class(
    latents: np.ndarray, labels: np.ndarray, n_latents: int, n_classes: int
) -> np.ndarray:
    """Entries of each latent and class, int64 [n_latents, n_classes]."""
    found = np.bincount(latents * n_classes + labels, minlength=n_latents * n_classes)
    return found.reshape(n_latents, n_classes)


def average_precision(
    latents: np.ndarray, values: np.ndarray, labels: np.ndarray, n_latents: int,
    n_by_class: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """AP of every latent for every class.

    Args:
        latents: column of each entry, int64 [nnz], 0 to n_latents - 1.
        values: its value, float32 [nnz], not 0.
        labels: its class, [nnz].
        n_latents: number of columns.
        n_by_class: tokens of each class, int64 [classes], those without an entry too.

    Returns:
        float64 [n_latents, classes]; 0 for a class without tokens.
    """
    n_classes = len(n_by_class)
    carry = Carry.zeros(n_latents, n_classes)
    active_by_class = count_by_class(latents, labels, n_latents, n_classes)
    above = values > 0
    sums = precision_sums(latents[above], values[above], labels[above], carry)
    sums += zero_group(carry, active_by_class.sum(axis=1), active_by_class, n_by_class)
    if not above.all():
        sums += precision_sums(latents[~above], values[~above], labels[~above], carry)
    return sums / np.maximum(n_by_class, 1)


def purity(values: np.ndarray, is_class: np.ndarray, n_tokens: int, n_class: int, k: int) -> float:
    """Precision of the ``k`` highest-scoring tokens.

    If the token at place k has the same value as the next one, this is the expectation over random
    orders of the tokens with that value.

    Args:
        values: non-zero values, float32 [nnz].
        is_class: whether each of these tokens belongs to the class, bool [nnz].
        n_tokens: all tokens, also those on which the latent does not fire.
        n_class: all tokens of the class.
        k: number of tokens.
    """
    k = min(k, n_tokens)
    # All tokens on which the latent does not fire are one more value, 0.
    distinct, inverse = np.unique(np.append(values, np.float32(0)), return_inverse=True)
    n = np.bincount(inverse[:-1], minlength=len(distinct))
    t = np.bincount(inverse[:-1], weights=is_class, minlength=len(distinct))
    n[inverse[-1]] += n_tokens - len(values)
    t[inverse[-1]] += n_class - int(is_class.sum())
    taken, hits = 0, 0.0
    for count, positives in zip(n[::-1], t[::-1], strict=True):
        used = min(int(count), k - taken)
        if count:
            hits += positives * used / count
        taken += used
        if taken == k:
            break
    return hits / k if k else 0.0


Chunks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
"""Returns an iterator over a latent's entries, as (values, is_class). Called once for each pass."""

_RIDGE = 1e-9
_MAX_STEPS = 100


def probe_r(chunks: Chunks, n_tokens: int, n_class: int) -> float:
    """McFadden's pseudo-R² of a logistic probe on one latent: 1 − NLL(σ(w·f + b)) / NLL(prior).

    It is fitted by Newton's method with step halving, from w = 0 and b = the log-odds of the class.
    Values are divided by their root mean square. A ridge of 1e-9 per token keeps w finite if the
    latent separates the class perfectly; then the result is 1, apart from rounding.

    Args:
        chunks: entries of the latent.
        n_tokens: all tokens, also those on which the latent does not fire.
        n_class: all tokens of the class.

    Returns:
        0 (the latent says nothing about the class) to 1.
    """
    if not 0 < n_class < n_tokens:
        return 0.0  # all tokens are on one side
    n_active = t_active = 0
    square = 0.0
    for values, is_class in chunks():
        n_active += len(values)
        t_active += int(is_class.sum())
        square += float(np.square(values, dtype=np.float64).sum())
    scale = (square / n_active) ** 0.5 if n_active else 1.0
    silent = (np.zeros(1), np.array([n_tokens - n_active]), np.array([n_class - t_active]))

    def evaluate(w: float, b: float) -> tuple[float, np.ndarray, np.ndarray]:
        """Mean NLL, its gradient and Hessian."""
        loss, gradient, hessian = 0.0, np.zeros(2), np.zeros((2, 2))
        for x, n, t in _points(chunks, scale, silent):
            z = w * x + b
            p = 1.0 / (1.0 + np.exp(-np.clip(z, -700, 700)))
            loss += float((n * np.logaddexp(0.0, z) - t * z).sum())
            residual, curvature = n * p - t, n * p * (1.0 - p)
            gradient += [float(residual @ x), float(residual.sum())]
            cross = float(curvature @ x)
            hessian += [[float(curvature @ (x * x)), cross], [cross, float(curvature.sum())]]
        ridge = _RIDGE * w * w / 2
        loss, gradient, hessian = loss / n_tokens + ridge, gradient / n_tokens, hessian / n_tokens
        gradient[0] += _RIDGE * w
        hessian[0, 0] += _RIDGE
        hessian[1, 1] += 1e-15  # it goes to 0 when the probe separates the class perfectly
        return loss, gradient, hessian

    prior = n_class / n_tokens
    point = np.array([0.0, np.log(prior / (1 - prior))])
    loss, gradient, hessian = evaluate(*point)
    start = loss
    for _ in range(_MAX_STEPS):
        step = np.linalg.solve(hessian, gradient)
        if float(gradient @ step) < 1e-14:
            break
        size = 1.0
        while size > 1e-6:
            trial = point - size * step
            found = evaluate(*trial)
            if found[0] < loss:
                break
            size /= 2
        else:
            break
        point, (loss, gradient, hessian) = trial, found
    nll = loss - _RIDGE * point[0] ** 2 / 2
    return float(np.clip(1.0 - nll / start, 0.0, 1.0))


def _points(
    chunks: Chunks, scale: float, silent: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(x, number of tokens, number of those in the class): a point for each entry, and one for all
    tokens on which the latent does not fire."""
    for values, is_class in chunks():
        yield values.astype(np.float64) / scale, np.ones(len(values)), is_class.astype(np.float64)
    yield silent
