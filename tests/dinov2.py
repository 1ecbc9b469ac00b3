"""The real DINOv2 ViT-S/14 of the demo, as a fixture: ``from dinov2 import dinov2_url``."""

import os

import pytest

from saev import storage
from saev.demo import weights


@pytest.fixture(scope="session")
def dinov2_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its safetensors: ``saev.vit.load("dinov2", f"vits14@{dinov2_url}", image_size=224)``."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # one copy for all workers; writing is atomic and idempotent
    return weights.write_weights(storage.join(base, "dinov2_vits14.safetensors"))
