"""Roots on every kind of storage, the S3 one on a real server process."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from saev import storage


@pytest.fixture
def s3_root(s3: str) -> str:
    """URL of an empty prefix of a bucket."""
    return f"{s3}/images-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty root on each kind of storage."""
    if request.param == "file":
        yield str(tmp_path)
    elif request.param == "s3":
        yield request.getfixturevalue("s3_root")
    else:
        url = f"memory://{uuid.uuid4().hex}"
        yield url
        storage.delete(url, recursive=True)
