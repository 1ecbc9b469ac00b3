"""The explorer's file in an output cell of a notebook: Jupyter, VS Code, marimo."""

import html
import os

from saev import storage
from saev.config.images import ImageData
from saev.explorer import page

HEIGHT = 600
"""Pixels."""
MAX_MB = 5.0
"""Notebooks keep their outputs, and marimo shows at most 8 MB of one."""


class Frame:
    """One HTML file of the explorer, which notebooks show in a frame of its own.

    The frame has the whole file in its ``srcdoc``, so the browser needs no way to the kernel. Its
    scripts run without any rights in the notebook (``sandbox="allow-scripts"``).

    Args:
        text: the file.
        height: of the frame, in pixels.
    """

    def __init__(self, text: str, height: int = HEIGHT):
        self.text = text
        """The HTML file."""
        self._height = height

    def save(self, url: str | os.PathLike) -> str:
        """Write the file. Returns its URL."""
        storage.write_text(url, self.text)
        return storage.normalize(url)

    def _repr_html_(self) -> str:
        return (
            f'<iframe title="saev: all latents" sandbox="allow-scripts" width="100%" '
            f'height="{self._height}" style="border: 0" srcdoc="{html.escape(self.text)}"></iframe>'
        )

    def __repr__(self) -> str:
        return f"<{len(self.text.encode()) / 1e6:.1f} MB of HTML; .save(URL) writes it>"


def show(
    run: str | tuple[str, ...] | list[str],
    *,
    shards: str = "",
    data: ImageData | None = None,
    allow_other_model: bool = False,
    max_mb: float = MAX_MB,
    height: int = HEIGHT,
) -> Frame:
    """Look at all latents of SAEs in a notebook, as `saev report --run URL --out FILE` writes them.

    Args:
        run: URLs of run folders that were measured.
        shards: URL of the shards folder that inference ran on; by default that of training.
        data: the images, if they have moved since they were recorded.
        allow_other_model: show SAEs even if the activations are of another model than those that
            they were trained on.
        max_mb: most megabytes. As many pictures are taken as fit.
        height: of the frame, in pixels.

    Returns:
        What the notebook shows as the value of a cell.

    Raises:
        ConfigError: results are missing, or do not fit the shards.
        ImageError, StorageError: the images are gone or are others, or something is damaged.
    """
    runs = [run] if isinstance(run, str) else list(run)
    made = page.text(
        runs, shards=shards, data=data, allow_other_model=allow_other_model, max_mb=max_mb
    )
    return Frame(made, height)
