"""What the answer consists of."""

import typing as tp

Unit = tp.Literal["bytes", "", "hours"]
Sure = tp.Literal["exact", "about", "at most", "at least"]


class Row(tp.NamedTuple):
    """One number."""

    key: str
    what: str
    value: float
    unit: Unit
    sure: Sure
    how: str


class Section(tp.NamedTuple):
    """Some rows under one heading."""

    name: str
    rows: list[Row]
