"""Makes the pages of the stage from their templates."""

import typing as tp

import jinja2
import markupsafe

from saev.secrets import redact


def environment() -> jinja2.Environment:
    """The templates of this package. Every value is escaped, and a missing value is an error.

    Keys in URLs are hidden. saev does not store them, but earlier versions and other programs did.
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
    """A value of a template without keys. Markup comes from this package and has no keys."""
    is_text = isinstance(value, str) and not isinstance(value, markupsafe.Markup)
    return redact(value) if is_text else value
