"""A console for tables and lines for people."""

import typing as tp

import rich.console
import rich.text

from saev.secrets import redact


class Console(rich.console.Console):
    """A console that hides secrets in URLs.

    Texts, and cells of tables, are redacted in :meth:`render_str`, before they are wrapped. A
    secret that is broken over two lines could not be found.
    """

    def render_str(self, text: str, **options: tp.Any) -> rich.text.Text:
        """A text with its markup, without secrets."""
        return super().render_str(redact(text), **options)
