"""Which latents find a class, and which class a latent finds.

A latent ranks images by its largest value on each, and the labelled patches by its value. The
average precision of that ranking is computed for all pairs of a latent and a class. Of the pairs on
which the latent fires at all, the best of each class and of each latent are kept.
"""

import typing as tp
from collections.abc import Callable

import numpy as np

from saev.inference import sides
from saev.inference.alignment import average_precision, count_by_class

PER_CLASS, PER_LATENT = 64, 16
"""Pairs that are kept."""
ALL = -1
"""All examples, whichever side they are on."""
SIDES = {ALL: "", sides.TRAINING: "_training", sides.HELD_OUT: "_held_out"}
"""Endings of columns."""


class Classes(tp.NamedTuple):
    """The classes of one kind."""

    kind: str
    """"image" for classes of whole images, "mask" for those of patches."""
    values: np.ndarray
    """Number of each class in the dataset, int64 [classes]."""
    names: list[str | None]
    """Names of them, where they are known."""
    counts: dict[int, np.ndarray]
    """Images (patches) of each class on each side, int64 [classes]."""

    @classmethod
    def of(
        cls, kind: str, values: np.ndarray, names: list[str | None], label: np.ndarray,
        side: np.ndarray,
    ) -> "Classes":  # fmt: skip
        """Count labels: the class of each image (patch), -1 if it has none, and its side."""
        counts = {}
        for one in SIDES:
            mine = (label >= 0) & ((side == one) | (one == ALL))
            counts[one] = np.bincount(label[mine], minlength=len(values)).astype(np.int64)
        return cls(kind, values, names, counts)

    @property
    def sides(self) -> list[int]:
        """Those that have labelled images (patches)."""
        return [one for one in SIDES if self.counts[one].sum()]

    def measured(self, measure: Callable[[int, np.ndarray], "Found"]) -> dict[int, "Found"]:
        """Scores on each side, from the side and its images (patches) of each class. A side that
        has all of them has the scores of all."""
        found: dict[int, Found] = {}
        for one in self.sides:
            is_all = one != ALL and self.counts[one].sum() == self.counts[ALL].sum()
            found[one] = found[ALL] if is_all else measure(one, self.counts[one])
        return found


class Found(tp.NamedTuple):
    """Of some latents on one side."""

    ap: np.ndarray
    """Average precision, float64 [latents, classes]."""
    active: np.ndarray
    """Images (patches) of each class on which the latent fires, int64 [latents, classes]."""


def measure(
    latents: np.ndarray, values: np.ndarray, label: np.ndarray, side: np.ndarray, n_latents: int,
    classes: Classes,
) -> dict[int, Found]:  # fmt: skip
    """Score some latents on each side.

    Args:
        latents: of each entry, int64 [nnz], 0 to n_latents - 1.
        values: of each entry, float32 [nnz].
        label: class of each entry, int64 [nnz]; -1 if it has none.
        side: of each entry, [nnz].
        n_latents: how many.
        classes: that there are.
    """

    def of(one: int, n_by_class: np.ndarray) -> Found:
        mine = (label >= 0) & ((side == one) | (one == ALL))
        ap = average_precision(latents[mine], values[mine], label[mine], n_latents, n_by_class)
        active = count_by_class(latents[mine], label[mine], n_latents, len(n_by_class))
        return Found(ap, active)

    return classes.measured(of)


class Scores:
    """Gathers the scores of blocks of latents.

    Args:
        classes: that there are.
        first: number of the first class in the table.
        d_sae: number of latents.
    """

    def __init__(self, classes: Classes, first: int, d_sae: int):
        self.classes, self._first = classes, first
        self._rows: dict[str, np.ndarray] = {}
        self.best = {"class": np.full(d_sae, -1, np.int64), "support": np.zeros(d_sae, np.int64)}
        """The best class of each latent: its number in the table (-1: none), its images (patches),
        and the average precision on each side. It is chosen on the training side if both sides are
        there."""
        for ending in SIDES.values():
            self.best[f"ap{ending}"] = np.full(d_sae, np.nan)

    def add(self, start: int, found: tp.Mapping[int, Found]) -> None:
        """Add latents ``start`` and following."""
        whole = found[ALL]
        both = sides.TRAINING in found and sides.HELD_OUT in found
        chosen_on = found[sides.TRAINING if both else ALL]
        fires = whole.active > 0
        choice = np.where(chosen_on.active > 0, chosen_on.ap, -1.0)
        best = choice.argmax(axis=1)
        latent = np.flatnonzero(choice.max(axis=1, initial=-1.0) >= 0)
        best = best[latent]
        self.best["class"][start + latent] = self._first + best
        self.best["support"][start + latent] = self.classes.counts[ALL][best]
        for one, side in found.items():
            self.best[f"ap{SIDES[one]}"][start + latent] = side.ap[latent, best]

        ranked = np.where(fires, whole.ap, -1.0)
        keep = _best(ranked, PER_LATENT, axis=1) | _best(ranked, PER_CLASS, axis=0)
        rows, columns = np.nonzero(keep & fires)
        new = {"latent": start + rows, "class_idx": self._first + columns,
               "by_latent": _best(ranked, PER_LATENT, axis=1)[rows, columns]}  # fmt: skip
        for one, ending in SIDES.items():
            n_by_class = self.classes.counts[one]
            total = n_by_class.sum()
            new[f"support{ending}"] = n_by_class[columns]
            if one not in found:
                for name in ("ap", "rate_inside", "rate_outside"):
                    new[name + ending] = np.full(len(rows), np.nan)
                continue
            inside, active = n_by_class[columns], found[one].active[rows, columns]
            elsewhere = found[one].active.sum(axis=1)[rows] - active
            new[f"ap{ending}"] = _where(inside > 0, found[one].ap[rows, columns])
            with np.errstate(divide="ignore", invalid="ignore"):
                new[f"rate_inside{ending}"] = _where(inside > 0, active / inside)
                new[f"rate_outside{ending}"] = _where(total > inside, elsewhere / (total - inside))
        self._merge(new)

    def _merge(self, new: dict[str, np.ndarray]) -> None:
        if self._rows:
            new = {k: np.concatenate([self._rows[k], v]) for k, v in new.items()}
        order = np.lexsort((new["latent"], -new["ap"], new["class_idx"]))
        group = new["class_idx"][order]
        rank = np.arange(len(order)) - np.searchsorted(group, group)
        order = order[(rank < PER_CLASS) | new["by_latent"][order]]
        self._rows = {k: v[order] for k, v in new.items()}

    def names(self, class_idx: np.ndarray) -> list[str | None]:
        """Names of classes by their number in the table; None for -1."""
        known = self.classes.names
        return [None if i < 0 else known[i - self._first] for i in class_idx.tolist()]

    def rows(self) -> dict[str, tp.Any]:
        """Columns of `classes.parquet`, by class, in each from the highest AP down."""
        rows = {k: v for k, v in self._rows.items() if k != "by_latent"}
        if not rows:
            return {}
        at = rows["class_idx"] - self._first
        return {
            **rows,
            "kind": [self.classes.kind] * len(at),
            "value": self.classes.values[at],
            "name": self.names(rows["class_idx"]),
        }


def _best(scores: np.ndarray, k: int, axis: int) -> np.ndarray:
    """Mask of the ``k`` highest along an axis, equal ones by index."""
    order = np.argsort(-scores, axis=axis, kind="stable")
    first = order[:k] if axis == 0 else order[:, :k]
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, first, True, axis=axis)
    return mask


def _where(defined: tp.Any, values: np.ndarray) -> np.ndarray:
    return np.where(defined, values, np.nan)
