"""Tables and lines for people hide the keys of URLs, and show brackets as they are."""

import io

import pytest
import rich.table

from saev.console import Console, size

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


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345, "12.3 kB"), (999_600, "1 MB"),
     (999_499, "999 kB"), (2.5e16, "25 PB")],
)  # fmt: skip
def test_sizes_have_three_digits_and_no_exponent(n_bytes: float, text: str) -> None:
    assert size(n_bytes) == text
