"""A place for datasets and a storage root, on a disk and on a real S3 server."""

import uuid
from pathlib import Path

import pytest

from saev import storage

from .places import Place


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Empty, on either kind of storage."""
    if request.param == "s3":
        base = f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    else:
        base = str(tmp_path)
    return Place(storage.join(base, "incoming"), storage.join(base, "saev"))
