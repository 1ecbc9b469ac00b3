"""Tables and lines for people hide the keys of URLs, and show brackets as they are."""

import io

import pytest
import rich.table

from saev.console import Console

KEYS = ("SHHpassword", "SHHsignature", "SHHtoken")


@pytest.mark.parametrize(
    "place",
    [
        "s3://AKIAEXAMPLE:SHHpassword@bucket/photos",
        "https://host/photos?X-Amz-Signature=SHHsignature&X-Amz-Date=20261127",
        "https://SHHtoken@host/photos",
    ],
)
@pytest.mark.parametrize("width", [20, 200])
def test_no_key_is_printed(place: str, width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width)
    table = rich.table.Table("DATASET", title=place)
    table.add_row(place)
    console.print(f"dataset {place}", highlight=False)
    console.print(table)
    console.rule(place)
    text = "".join(c for c in out.getvalue() if c.isalnum() or c in "*:/")
    assert not [key for key in KEYS if key in text]
    assert text.count("***") >= 2
