"""The environment that a Secret and a ConfigMap hold, mounted as Kubernetes mounts them."""

import os
import sys
from pathlib import Path

import pytest

from saev.steps import environment
from saev.steps.supervisor import Policy, Supervisor


def mount(folder: Path, values: dict[str, bytes]) -> Path:
    """A volume as the kubelet writes it: links to the files of the newest version.

    https://kubernetes.io/docs/concepts/configuration/secret/#using-secrets-as-files-from-a-pod
    """
    version = folder / "..2026_11_27_00_00_00.1"
    version.mkdir(parents=True)
    (folder / "..data").symlink_to(version.name)
    for key, value in values.items():
        (version / key).write_bytes(value)
        (folder / key).symlink_to(f"..data/{key}")
    return folder


Folders = tuple[tuple[Path, tuple[str, ...]], ...]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """Where the two are mounted, and which keys of theirs count."""
    for key in ("SAEV_A", "SAEV_B", "SAEV_C", "SAEV_D"):
        monkeypatch.setenv(key, "of the image")
    secret, config = tmp_path / "secret", tmp_path / "config"
    return ((secret, ("SAEV_A", "SAEV_B")), (config, ("SAEV_B", "SAEV_C")))


def test_what_is_mounted_goes_before_what_is_there(folders: Folders) -> None:
    mount(folders[0][0], {"SAEV_A": b"secret\n", "SAEV_D": b"not on the list"})
    mount(folders[1][0], {"SAEV_A": b"of the other", "SAEV_C": "ü".encode()})
    environment.take(folders)
    assert os.environ["SAEV_A"] == "secret\n", "as Kubernetes would: to the byte"
    assert os.environ["SAEV_B"] == "of the image", "no such key"
    assert os.environ["SAEV_C"] == "ü"
    assert os.environ["SAEV_D"] == "of the image"


def test_both_may_be_missing(folders: Folders) -> None:
    """As on a laptop, and on a cluster where a role of the service account has the rights."""
    before = dict(os.environ)
    environment.take(folders)
    environment.take()
    folders[0][0].write_text("no folder")
    environment.take(folders)
    assert dict(os.environ) == before


def test_keys_that_are_renewed_reach_the_next_process(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = mount(folders[0][0], {"SAEV_A": b"old"})
    monkeypatch.setattr(environment, "FOLDERS", folders)
    program = (
        "import os, pathlib, sys\n"
        f"seen = pathlib.Path({str(tmp_path / 'seen')!r})\n"
        "seen.open('a').write(os.environ['SAEV_A'] + ' ')\n"
        f"pathlib.Path({str(secret / '..data' / 'SAEV_A')!r}).write_text('new')\n"
        "os.kill(os.getpid(), 9) if 'new' not in seen.read_text() else None\n"
    )
    word = Supervisor([sys.executable, "-c", program], Policy(wait_s=0.0)).run()
    assert word is None
    assert (tmp_path / "seen").read_text() == "old new "
