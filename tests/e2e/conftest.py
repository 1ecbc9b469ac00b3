"""What end-to-end tests share. All of this folder is marked `e2e`: `make e2e` runs it."""

import os
from collections.abc import Iterator
from pathlib import Path

import base_image as base_images
import containers
import pytest
from containers import Docker, Images
from servers import kubernetes_api

__all__ = ["kubernetes_api"]  # a fixture of several files: one server serves them all

_HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder."""
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            if item.get_closest_marker("timeout") is None:  # the first one builds the images
                item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """A Docker daemon. Skips, with the reason, where there is none."""
    try:
        docker = Docker(containers.find_client())
    except containers.Unavailable as err:
        pytest.skip(str(err))
    yield docker
    docker.close()


@pytest.fixture(scope="session")
def base_image(docker: Docker) -> str:
    """Name of an image with apt: SAEV_E2E_BASE_IMAGE, or a Debian that is made here."""
    named = os.environ.get("SAEV_E2E_BASE_IMAGE")
    if named:
        return named
    try:
        return base_images.make(docker.client)
    except containers.Unavailable as err:
        pytest.skip(str(err))


@pytest.fixture(scope="session")
def saev_images(docker: Docker, base_image: str) -> Images:
    """The project's images of this checkout: minutes the first time, seconds after that."""
    return containers.build(docker.client, base_image)
