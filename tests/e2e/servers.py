"""Real servers for end-to-end tests: an S3 server and a Kubernetes API, each a child of the test.

Both are context managers, so that a test, a script or a shell can hold one; the fixtures of the
same kind skip with the reason where a program is missing.
"""

import contextlib
import json
import secrets
import signal
import sys
import tempfile
import typing as tp
from collections.abc import Iterator
from pathlib import Path

import boto3
import compiled
import pytest
from botocore.config import Config
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from processes import answers, child, free_port, wait_until

LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def _or_skip() -> Iterator[None]:
    try:
        yield
    except compiled.Unavailable as err:
        pytest.skip(str(err))


# --- S3 ------------------------------------------------------------------------------------


class S3Server(tp.NamedTuple):
    """A running S3 server with one empty bucket."""

    endpoint: str
    """Reachable from this machine, and from containers if the server listens on their address."""
    bucket: str
    """URL of the bucket."""
    env: dict[str, str]
    """What a client needs in its environment: endpoint, credentials, region."""


@contextlib.contextmanager
def s3_server(host: str = LOOPBACK, bucket: str = "saev-e2e") -> Iterator[S3Server]:
    """An S3 server (versitygw over a temporary folder) that ends with the block.

    A key cannot be an object and a prefix of others at once there; otherwise it is strict S3, with
    signatures, MD5 ETags and conditional writes.

    Args:
        host: address to listen on: the loopback one, which containers with host networking
            share, or that of a container network's bridge.
        bucket: name of the bucket to create.

    Raises:
        compiled.Unavailable: there is no program and it cannot be built.
    """
    program = compiled.find(compiled.VERSITYGW)
    with tempfile.TemporaryDirectory(prefix="saev-s3-") as name:
        folder = Path(name)
        (folder / "objects").mkdir()
        (folder / "metadata").mkdir()
        address = f"{host}:{free_port(host)}"
        env = {
            "AWS_ENDPOINT_URL": f"http://{address}",
            "AWS_ACCESS_KEY_ID": f"saev{secrets.token_hex(8)}",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        command = [program, "--quiet", "--keep-alive", "--port", address]
        # The sidecar folder: not every file system that /tmp may be on has extended attributes.
        command += ["posix", "--sidecar", folder / "metadata", folder / "objects"]
        settings = {
            "ROOT_ACCESS_KEY": env["AWS_ACCESS_KEY_ID"],
            "ROOT_SECRET_KEY": env["AWS_SECRET_ACCESS_KEY"],
            "VGW_REGION": env["AWS_DEFAULT_REGION"],
        }
        with child(command, folder, settings) as server:
            wait_until(lambda: answers(env["AWS_ENDPOINT_URL"], any_status=True), server)
            s3_client(env).create_bucket(Bucket=bucket)
            yield S3Server(env["AWS_ENDPOINT_URL"], f"s3://{bucket}", env)


def s3_client(env: dict[str, str]) -> tp.Any:
    """A boto3 client for the server that ``env`` names."""
    return boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region_name=env["AWS_DEFAULT_REGION"],
        config=Config(s3={"addressing_style": "path"}),
    )


@pytest.fixture(scope="session")
def compiled_s3() -> Iterator[S3Server]:
    """A compiled S3 server on the loopback address."""
    with _or_skip():
        compiled.find(compiled.VERSITYGW)
    with s3_server() as server:
        yield server


# --- Kubernetes ----------------------------------------------------------------------------


class KubernetesApi(tp.NamedTuple):
    """A running API server with etcd and the controllers behind it; there is no node."""

    url: str
    kubeconfig: Path
    """Credentials of an administrator."""
    ca: Path
    token: str
    """The administrator's bearer token."""


@contextlib.contextmanager
def kubernetes_server(
    flags: tp.Sequence[str] = (), prepare: tp.Callable[[KubernetesApi], None] | None = None
) -> Iterator[KubernetesApi]:
    """etcd, kube-apiserver and kube-controller-manager on the loopback address.

    RBAC, Pod Security, quotas, limit ranges and priorities are enforced as on a cluster, and the
    controllers make service accounts, quota totals and a Deployment's pods. Nothing schedules or
    runs a pod: it stays Pending until a test writes its status.

    Args:
        flags: further flags of kube-apiserver, such as feature gates.
        prepare: called before the controllers start. The garbage collector knows the kinds that
            there are then, and needs up to a minute to find others.

    Raises:
        compiled.Unavailable: a program is missing and cannot be built.
    """
    apiserver, controllers, etcd = (compiled.find(program) for program in compiled.KUBERNETES)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saev-kube-")))
        store = _start_etcd(stack, etcd, folder)
        api = _start_apiserver(stack, apiserver, folder, store, flags)
        if prepare is not None:
            prepare(api)
        _start_controllers(stack, controllers, folder, api)
        yield api


def _start_etcd(stack: contextlib.ExitStack, program: Path, folder: Path) -> str:
    client, peer = (f"http://{LOOPBACK}:{free_port()}" for _ in range(2))
    command = [program, "--data-dir", folder / "etcd", "--unsafe-no-fsync"]
    command += ["--listen-client-urls", client, "--advertise-client-urls", client]
    command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
    command += ["--initial-cluster", f"default={peer}", "--log-level", "warn"]
    wait_until(lambda: answers(f"{client}/health"), stack.enter_context(child(command, folder)))
    return client


def _start_apiserver(
    stack: contextlib.ExitStack, program: Path, folder: Path, store: str, flags: tp.Sequence[str]
) -> KubernetesApi:
    _write_key(folder / "service-accounts.pem")
    token = secrets.token_hex(20)
    (folder / "tokens.csv").write_text(f'{token},admin,admin,"system:masters"\n')
    port = free_port()
    url = f"https://{LOOPBACK}:{port}"
    command = [program, f"--etcd-servers={store}", f"--cert-dir={folder}"]
    command += [f"--bind-address={LOOPBACK}", f"--secure-port={port}"]
    # Nobody reaches the API through a Service here, and a loopback address may not be an endpoint.
    command += [f"--advertise-address={LOOPBACK}", "--endpoint-reconciler-type=none"]
    command += ["--service-cluster-ip-range=10.0.0.0/24", f"--service-account-issuer={url}"]
    command += [f"--service-account-key-file={folder / 'service-accounts.pem'}"]
    command += [f"--service-account-signing-key-file={folder / 'service-accounts.pem'}"]
    command += [f"--token-auth-file={folder / 'tokens.csv'}", "--authorization-mode=Node,RBAC"]
    command += ["--enable-admission-plugins=NodeRestriction", "--allow-privileged=true", *flags]
    # The server makes its certificate itself; the file also holds what signed it.
    ca = folder / "apiserver.crt"
    server = stack.enter_context(child(command, folder))
    wait_until(lambda: ca.exists() and answers(f"{url}/readyz", ca=ca, token=token), server)
    return KubernetesApi(url, _write_kubeconfig(folder, url, ca, token), ca, token)


def _start_controllers(
    stack: contextlib.ExitStack, program: Path, folder: Path, api: KubernetesApi
) -> None:
    port = free_port()
    command = [program, f"--kubeconfig={api.kubeconfig}", "--leader-elect=false"]
    command += [f"--bind-address={LOOPBACK}", f"--secure-port={port}"]
    command += [f"--cert-dir={folder / 'controllers'}", f"--root-ca-file={api.ca}"]
    command += [f"--service-account-private-key-file={folder / 'service-accounts.pem'}"]
    started = stack.enter_context(child(command, folder))
    default = f"{api.url}/api/v1/namespaces/default/serviceaccounts/default"
    wait_until(lambda: answers(default, ca=api.ca, token=api.token), started)


def _write_key(path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def _write_kubeconfig(folder: Path, url: str, ca: Path, token: str) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "e2e", "cluster": {"server": url, "certificate-authority": str(ca)}}],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": "admin"}}],
        "current-context": "e2e",
    }
    path = folder / "kubeconfig"
    path.touch(mode=0o600)
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


@pytest.fixture(scope="session")
def kubernetes_api() -> Iterator[KubernetesApi]:
    """A Kubernetes API server with controllers and no nodes."""
    with _or_skip():
        for program in compiled.KUBERNETES:
            compiled.find(program)
    with kubernetes_server() as api:
        yield api


# --- By hand -------------------------------------------------------------------------------


def main(which: str) -> None:
    """Start a server for a shell: prints what to export, ends with Ctrl-C or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        if which == "s3":
            env = stack.enter_context(s3_server()).env
        else:
            env = {"KUBECONFIG": str(stack.enter_context(kubernetes_server()).kubeconfig)}
        print(*(f"export {key}={value}" for key, value in env.items()), sep="\n", flush=True)
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1])
