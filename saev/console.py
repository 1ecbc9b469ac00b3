"""A console for tables and lines for people."""

import sys
import typing as tp

import rich.console
import rich.text

from saev.secrets import redact

_WIDTH = 120
"""Columns of tables if standard output is not a terminal."""


class Console(rich.console.Console):
    """A console that hides secrets in URLs.

    Texts, and cells of tables, are redacted in :meth:`render_str`, before they are wrapped. A
    secret that is broken over two lines could not be found.
    """

    def render_str(self, text: str, **options: tp.Any) -> rich.text.Text:
        """A text with its markup, without secrets."""
        return super().render_str(redact(text), **options)


def for_tables(out: tp.TextIO) -> Console:
    """A console that writes to ``out``, as wide as standard output."""
    width = None if sys.stdout.isatty() else _WIDTH
    return Console(file=out, width=width, highlight=False, markup=False)


def size(n_bytes: float) -> str:
    """Bytes in decimal units with three digits."""
    value, units = float(n_bytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.3g} {units[0]}"
