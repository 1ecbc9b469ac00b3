"""How the stage's pages are made from their templates."""

import typing as tp

import jinja2
import markupsafe

from saev.secrets import redact


def environment() -> jinja2.Environment:
    """Templates of this package: every value is escaped, and a missing one is an error.

    Keys in URLs are hidden. Nothing stores them today, but other programs and earlier versions did.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader("saev.visuals", "templates"),
        autoescape=True,
        finalize=_without_keys,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _without_keys(value: tp.Any) -> tp.Any:
    """A value of a template without keys. Markup is the package's own, and has none."""
    is_text = isinstance(value, str) and not isinstance(value, markupsafe.Markup)
    return redact(value) if is_text else value
