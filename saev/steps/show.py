"""What Kubeflow's UI shows of a step: figures by name, and a page that stands alone."""

import html
import typing as tp

from saev import storage
from saev.inference.results import Results

if tp.TYPE_CHECKING:
    from saev.shards import Shards

_FIGURES = (
    "normalized_mse", "explained_variance", "l0", "l1", "n_dead", "n_almost_dead", "n_dense",
    "d_sae", "n_tokens", "mean_average_precision", "purity_at_16", "coverage_at_0.3", "probe_r",
)  # fmt: skip
"""Keys of metrics.json; the last four only where there are labels."""
_FEW = ("normalized_mse", "explained_variance", "l0", "n_dead", "mean_average_precision")
"""Those that are shown where a page shows many SAEs."""
_PAGE_BYTES = 3_000_000
"""About what the UI can show."""


def of_shards(shards: "Shards") -> dict[str, float]:
    """Figures of a shards folder."""
    sizes = (storage.size(storage.join(shards.url, info.name)) for info in shards.infos)
    return {
        "n_examples": shards.n_examples,
        "n_tokens": shards.n_examples * shards.tokens_per_example,
        "n_layers": len(shards.metadata.layers),
        "d_model": shards.metadata.d_model,
        "n_shards": len(shards.infos),
        "gigabytes": sum(sizes) / 1e9,
    }


class Saes:
    """The SAEs of one pod."""

    def __init__(self) -> None:
        self._metrics: dict[str, dict[str, float]] = {}
        self._books: dict[str, tp.Callable[[int], str]] = {}

    def add(self, name: str, results: str, book: tp.Callable[[int], str]) -> None:
        """Add an SAE.

        Args:
            name: what it is called.
            results: URL of its results.
            book: makes its picture book of at most so many bytes.
        """
        raw = Results.open(results).metrics
        self._metrics[name] = {k: raw[k] for k in _FIGURES if isinstance(raw.get(k), int | float)}
        self._books[name] = book

    def figures(self) -> dict[str, float]:
        """All figures; each begins with the SAE's name."""
        wanted = _FIGURES if len(self._metrics) == 1 else _FEW
        return {
            f"{name} {key}": figures[key]
            for name, figures in self._metrics.items()
            for key in wanted
            if key in figures
        }

    def page(self) -> str:
        """The picture book; of several SAEs, one beside the other, smaller the more there are."""
        share = _PAGE_BYTES // max(1, len(self._books))
        books = {name: book(share) for name, book in self._books.items()}
        if len(books) == 1:
            return next(iter(books.values()))
        # A page in a frame that can load nothing may still hold other pages as text.
        frames = "".join(
            f"<details><summary>SAE {html.escape(name)}</summary>"
            f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(book)}"></iframe></details>'
            for name, book in books.items()
        )
        style = "body{font:15px sans-serif}summary{padding:.5em}iframe{width:100%;height:80vh}"
        return f"<!doctype html><meta charset=utf-8><style>{style}</style>{frames}"
