"""Two groups of images: on which share of each a latent fires."""

import typing as tp

import numpy as np

from saev.serve.measured import Measured, Names
from saev.serve.problems import Problem

MAX_IMAGES = 2000
"""Most images of a group that are looked at; of more, as many at even steps."""
N_BEST = 50
"""Latents with the highest difference, of each sign."""
KINDS = "class:NUMBER, folder:PATH, latent:NUMBER, images:NUMBER,NUMBER,… or rest"


class Group(tp.NamedTuple):
    """Some images."""

    said: str
    """As it was asked for."""
    examples: np.ndarray
    """All of them, ascending, int64."""

    @property
    def taken(self) -> np.ndarray:
        """Those that are looked at."""
        n = len(self.examples)
        if n <= MAX_IMAGES:
            return self.examples
        return self.examples[np.arange(MAX_IMAGES) * n // MAX_IMAGES]


def compare(measured: Measured, first: str, second: str) -> dict[str, tp.Any]:
    """The latents whose rates differ most between two groups.

    A rate is the share of a group's images that `image_acts_by_image.parquet` has for the latent:
    those whose value is at least the floor (a share of the latent's largest value).

    Args:
        measured: the SAE.
        first: a group: class:NUMBER, folder:PATH, latent:NUMBER (the images on which it fires),
            images:NUMBER,NUMBER,…, or "rest" (all images that are not in the other group).
        second: another.

    Raises:
        Problem: a group is not one, or empty.
    """
    names = measured.names()
    groups = [None if said == "rest" else _group(measured, names, said) for said in (first, second)]
    a, b = groups
    if a is None and b is None:
        raise Problem(400, "Both groups are the rest of the other.", f"Give one: {KINDS}.")
    a = a or _rest(names, tp.cast(Group, b))
    b = b or _rest(names, a)
    for group in (a, b):
        if not len(group.examples):
            raise Problem(
                404, f"There are no images in {group.said[:80]!r}.", "Take another group."
            )
    rates = [_rates(measured, group.taken) for group in (a, b)]
    difference = rates[0] - rates[1]
    by_difference = np.lexsort((np.arange(len(difference)), -difference))
    best = by_difference[:N_BEST][difference[by_difference[:N_BEST]] > 0]
    worst = by_difference[::-1][:N_BEST]
    worst = worst[difference[worst] < 0]
    return {
        "run": measured.key,
        "floor": measured.facts.get("image_floor"),
        "groups": [
            {"group": g.said, "n": len(g.examples), "n_looked_at": len(g.taken)} for g in (a, b)
        ],
        "first": [_row(i, rates) for i in best.tolist()],
        "second": [_row(i, rates) for i in worst.tolist()],
    }  # fmt: skip


def _row(latent: int, rates: tp.Sequence[np.ndarray]) -> dict[str, tp.Any]:
    return {"latent": latent, "rates": [float(rate[latent]) for rate in rates]}


def _rates(measured: Measured, examples: np.ndarray) -> np.ndarray:
    """Share of some images on which each latent fires, float64 [d_sae].

    Each row group is read once, because both the images and the groups are in order.
    """
    n = np.zeros(measured.d_sae, np.int64)
    table = measured.tables.table("image_acts_by_image")
    for file in table.files:
        for number, group in enumerate(file.groups):
            first, last = np.searchsorted(examples, [group.first, group.last + 1])
            if first == last:
                continue
            rows = measured.tables.group(file, number, ["example", "latent"])
            mine = np.isin(rows["example"].to_numpy(), examples[first:last])
            n += np.bincount(rows["latent"].to_numpy()[mine], minlength=measured.d_sae)
    return n / len(examples)


def _group(measured: Measured, names: Names, said: str) -> Group:
    kind, _, what = said.partition(":")
    if kind == "folder" and what:
        folder = what.strip("/") + "/"
        inside = [f"/{path}".rfind(f"/{folder}") >= 0 for path in names.path.to_pylist()]
        return Group(said, names.example[np.array(inside)])
    numbers = what.split(",")
    if kind not in ("class", "latent", "images") or not all(
        number.isascii() and number.isdigit() and len(number) < 18 for number in numbers
    ):
        raise Problem(400, f"{said[:80]!r} is no group of images.", f"Give {KINDS}.")
    if kind == "images":
        chosen = np.unique(np.array(numbers, dtype=np.int64))
        return Group(said, chosen[np.isin(chosen, names.example)])
    if kind == "class":
        return Group(said, names.example[names.class_idx == int(numbers[0])])
    latent = measured.check_latent(int(numbers[0]))
    example = measured.rows("image_acts_by_latent", latent)["example"].to_numpy()
    return Group(said, example.astype(np.int64))


def _rest(names: Names, other: Group) -> Group:
    return Group("rest", np.setdiff1d(names.example, other.examples, assume_unique=True))
