"""The figures and the page of a step that Kubeflow's UI shows.

The UI compares runs in a table. There, an artifact of figures is a column without a name, and names
of figures are cut after about 30 characters. So each artifact contains the name of its SAE, names
are short, and an artifact of several SAEs has one text for each SAE.
"""

import html
import typing as tp

from saev import storage
from saev.stage import Result
from saev.visuals.rows import HELD_OUT

if tp.TYPE_CHECKING:
    from saev.visuals.overview import Section
    from saev.visuals.rows import Row

Figures = dict[str, str | float]
"""The content of an artifact of figures, by name."""

_FEW = (
    ("held_out_nmse", "held out: NMSE {:.4f}"), ("all_images_nmse", "all images: NMSE {:.4f}"),
    ("held_out_l0", "L0 {:.1f}"), ("all_images_l0", "L0 {:.1f}"),
    ("held_out_dead", "{:,} dead"), ("all_images_dead", "{:,} dead"),
    ("training_nmse", "training: NMSE {:.4f}"), ("training_l0", "L0 {:.1f}"),
    ("mean_average_precision", "mAP {:.3f}"),
)  # fmt: skip
"""The figures in an SAE's line, with their formats."""
_IN_SIDES = ("normalized_mse", "explained_variance", "l0", "l1", "n_dead")
"""Figures of all images, which are replaced by those of each side (held-out and training)."""
_PAGE_BYTES = 5_000_000
"""About the largest page that the UI can show."""


def of_run(section: "Section", dataset: str) -> Figures:
    """The figures of a run: the number of its SAEs, and the figures of the best one."""
    best: Row = section.best_first()[0]
    figures: Figures = {
        "dataset": dataset,
        "n_saes": len(section.rows),
        "best_sae": best.name,
        "best_run": storage.name(best.run),
    }
    return figures | _sides(best)


def _sides(row: "Row") -> Figures:
    """An SAE's main figures. Their names begin with the images that they are measured on.

    They are of all images if no image is held out, or if the SAE was trained on other shards.
    """
    prefix = "held_out" if row.side == HELD_OUT else "all_images"
    found: Figures = {}
    for side, name in ((row.of_side(row.side), prefix), (row.trained_on, "training")):
        keys = {"normalized_mse": "nmse", "l0": "l0", "n_dead": "dead"}
        found |= {f"{name}_{s}": side[k] for k, s in keys.items() if side.get(k) is not None}
    return found


class Saes:
    """The SAEs of one pod.

    Args:
        dataset: name of the dataset.
    """

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset
        self._metrics: dict[str, Figures] = {}
        self._books: dict[str, tp.Callable[[int], str]] = {}

    def add(self, row: "Row", results: tp.Sequence[Result]) -> None:
        """Add an SAE.

        Args:
            row: what was measured.
            results: what stages have published of it.
        """
        run = storage.name(row.run)
        more = {k: v for result in results for k, v in result.figures.items()}
        self._metrics[run] = _sides(row) | {k: v for k, v in more.items() if k not in _IN_SIDES}
        self._books[run] = next(result.page for result in results if result.page)

    def figures(self, names: tp.Mapping[str, str]) -> Figures:
        """All figures if there is one SAE; otherwise one line for each SAE.

        Args:
            names: the name of each SAE, by the name of its run.
        """
        if len(self._metrics) == 1:
            ((run, figures),) = self._metrics.items()
            return {"dataset": self._dataset, "sae": names[run], "run": run, **figures}
        found: Figures = {"dataset": self._dataset, "n_saes": len(self._metrics)}
        for run, figures in self._metrics.items():
            said = [form.format(figures[key]) for key, form in _FEW if key in figures]
            # SAEs of equal configs have equal names, also if they saw the data in another order.
            name = names[run] if names[run] not in found else run
            found[name] = f"{', '.join(said)} (run {run})"
        return found

    def page(self, names: tp.Mapping[str, str]) -> str:
        """The picture books of all SAEs, one below the other. They share the page's size limit.

        Args:
            names: the name of each SAE, by the name of its run.
        """
        share = _PAGE_BYTES // max(1, len(self._books))
        books = {run: book(share) for run, book in self._books.items()}
        if len(books) == 1:
            return next(iter(books.values()))
        # The UI's frame can load nothing, but a page can contain other pages as text (srcdoc).
        frames = "".join(
            f"<details{' open' * (i == 0)}><summary>{html.escape(names[run])} "
            f"<small>run {html.escape(run)}</small></summary>"
            f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(book)}"></iframe></details>'
            for i, (run, book) in enumerate(books.items())
        )
        style = (
            ":root{color-scheme:light dark}body{font:15px system-ui,sans-serif;margin:0}"
            "summary{padding:.5em;cursor:pointer}small{opacity:.7}"
            "iframe{width:100%;height:85vh;border:0}"
        )
        return f"<!doctype html><meta charset=utf-8><style>{style}</style>{frames}"
