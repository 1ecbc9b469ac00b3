"""How the stage's pages are made from their templates."""

import jinja2


def environment() -> jinja2.Environment:
    """Templates of this package: every value is escaped, and a missing one is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("saev.visuals", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
