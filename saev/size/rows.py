"""The rows of the output."""

import typing as tp

Unit = tp.Literal["bytes", "", "hours"]
Sure = tp.Literal["exact", "about", "at most", "at least"]


class Row(tp.NamedTuple):
    """One number."""

    key: str
    """Name in the JSON output."""
    what: str
    """Name in the table."""
    value: float
    """The number."""
    unit: Unit
    """Unit of the number; "" for a count."""
    sure: Sure
    """Certainty of the number."""
    how: str
    """How it was computed, in words."""


class Section(tp.NamedTuple):
    """Some rows under one heading."""

    name: str
    rows: list[Row]
