"""Where tables and lines for people are printed."""

import typing as tp

import rich.console
import rich.text

from saev.secrets import redact


class Console(rich.console.Console):
    """A console that hides the keys of URLs.

    Every text becomes a ``rich.text.Text`` here, also that of a table's cell, before it is wrapped:
    a key that is broken over two lines could not be found any more.
    """

    def render_str(self, text: str, **options: tp.Any) -> rich.text.Text:
        """A text with its markup, without keys."""
        return super().render_str(redact(text), **options)
