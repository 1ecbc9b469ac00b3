"""A base image without a registry: Debian by debootstrap, for machines that cannot pull one.

    python tests/e2e/base_image.py      makes it if it is not there, and prints its name

It trusts what this machine trusts, so that a build behind a private certificate authority works.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import containers

SUITE = "bookworm"
NAME = f"saev-test-base:{SUITE}"
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

_LABEL = "saev.certificates"


def make(client: str) -> str:
    """The image's name; made in a minute if it is not there or trusts something else.

    Raises:
        containers.Unavailable: debootstrap is missing, or this is not root.
    """
    digest = hashlib.sha256(CERTIFICATES.read_bytes()).hexdigest()
    if _label(client) == digest:
        return NAME
    debootstrap = shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin")
    if debootstrap is None or os.geteuid() != 0:
        raise containers.Unavailable(
            "A base image needs debootstrap and root (apt-get install debootstrap); or name one "
            "with apt and Python 3.11 to 3.13 in SAEV_E2E_BASE_IMAGE, such as ubuntu:24.04."
        )
    with tempfile.TemporaryDirectory(prefix="saev-base-") as name:
        root = Path(name) / "root"
        command = [debootstrap, "--variant=minbase", "--include=ca-certificates", SUITE, root]
        subprocess.run([*command, MIRROR], check=True, stdout=subprocess.DEVNULL)
        shutil.copyfile(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
        for folder in ("var/cache/apt", "var/lib/apt/lists"):  # a third of its size
            shutil.rmtree(root / folder)
            (root / folder).mkdir()
        _import(client, root, digest)
    return NAME


def _label(client: str) -> str:
    template = f'{{{{index .Config.Labels "{_LABEL}"}}}}'
    found = subprocess.run(
        [client, "image", "inspect", "--format", template, NAME], capture_output=True, text=True
    )
    return found.stdout.strip()


def _import(client: str, root: Path, digest: str) -> None:
    # pip and uv trust lists of their own unless they are told otherwise.
    variables = " ".join(f"{key}={CERTIFICATES}" for key in ("SSL_CERT_FILE", "PIP_CERT"))
    changes = ["--change", f"ENV {variables}", "--change", f"LABEL {_LABEL}={digest}"]
    with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(
            [client, "import", *changes, "-", NAME],
            stdin=tar.stdout, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    if tar.returncode:
        raise subprocess.CalledProcessError(tar.returncode, tar.args)


if __name__ == "__main__":
    try:
        print(make(containers.find_client()))
    except containers.Unavailable as err:
        sys.exit(f"base_image: {err}")
