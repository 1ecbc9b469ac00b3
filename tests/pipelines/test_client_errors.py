"""Every command against every way in which a server, or the way to it, fails."""

import socket
import ssl
import typing as tp
from pathlib import Path

import certificates
import kfp_server
import pytest
from client import Client
from kfp_server import KfpServer

RUN = "11111111-2222-3333-4444-555555555555"
COMMANDS = {
    "submit": ("submit", "--dataset", "s3://bucket/x", "--config", "config.toml", "--no-check"),
    "schedule": (
        "schedule", "--dataset", "s3://bucket/in", "--config", "config.toml",
        "--cron", "0 0 3 * * *", "--no-check",
    ),
    "schedules": ("schedules",),
    "unschedule": ("unschedule", "nightly"),
    "list": ("list",),
    "status": ("status", RUN),
    "watch": ("watch", RUN),
    "logs": ("logs", RUN),
    "cancel": ("cancel", RUN),
}  # fmt: skip
REQUESTS = {
    "submit": ["/experiments", "/pipelines", "/versions", "/upload_version", "/runs"],
    "schedule": ["/experiments", "/pipelines", "/versions", "/upload_version", "/recurringruns"],
    "schedules": ["/recurringruns"],
    "unschedule": ["/recurringruns", ":disable", "/runs", "/recurringruns/r"],
    "list": ["/runs"],
    "status": [f"/runs/{RUN}"],
    "watch": [f"/runs/{RUN}"],
    "logs": [f"/runs/{RUN}"],
    "cancel": [f"/runs/{RUN}", ":terminate"],
}
"""The requests that a command makes, beside asking how the API is."""
EVERY = [(command, path) for command, paths in REQUESTS.items() for path in ("/healthz", *paths)]
SENTENCES = {
    401: "does not know you (401). Set KFP_COOKIES",
    403: "does not allow it (403: no). Set KFP_NAMESPACE",
    404: "(404: no). Check its name",
    409: "it exists already (409: no). Use another name",
    429: "is busy (429). Wait a minute",
    400: "refuses the request (400: no). Check its values",
    500: "failed (500: no). Try again; look at `kubectl logs -n kubeflow deployment/ml-pipeline`",
    502: "failed (502: no). Try again",
}


@pytest.fixture(autouse=True)
def _run(request: pytest.FixtureRequest) -> None:
    """A run and a schedule for the commands that are about one."""
    if "kfp" in request.fixturenames:
        kfp: KfpServer = request.getfixturevalue("kfp")
        kfp.add_run("a-run", "RUNNING", run_id=RUN)
        trigger = {"cron_schedule": {"cron": "0 0 3 * * *"}}
        kfp.recurring.append(
            {"recurring_run_id": "r", "display_name": "nightly", "status": "ENABLED",
             "trigger": trigger, "created_at": kfp.now()}
        )  # fmt: skip


@pytest.mark.parametrize(("command", "path"), EVERY)
def test_every_request_of_every_command_may_be_refused(
    client: Client, kfp: KfpServer, command: str, path: str
) -> None:
    """With 403, which no command retries or expects."""
    kfp.fail(f"{path}$", 403)
    said = client.fails(*COMMANDS[command])
    assert SENTENCES[403] in said
    assert said.startswith("Cannot ")
    assert kfp.url in said
    assert len(said) < 500


@pytest.mark.parametrize("status", SENTENCES)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_status_has_its_sentence(
    client: Client, kfp: KfpServer, command: str, status: int
) -> None:
    # Watching retries. A schedule that is gone is deleted already.
    path = {"watch": "/healthz", "unschedule": "/recurringruns"}.get(command, REQUESTS[command][-1])
    kfp.fail(f"{path}$", status)
    assert SENTENCES[status] in client.fails(*COMMANDS[command])


def test_a_token_that_expired_is_named(
    client: Client, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_TOKEN", "old")
    kfp.fail("/runs$", 401)
    said = client.fails("list")
    assert "Your token was not accepted: make a new one" in said
    assert "kubectl create token default-editor -n NAMESPACE --audience=" in said


def test_a_missing_run_is_named(client: Client, kfp: KfpServer) -> None:
    gone = "99999999-2222-3333-4444-555555555555"
    assert f"look at run {gone}" in (said := client.fails("status", gone))
    assert "404" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_login_page_is_no_answer(client: Client, kfp: KfpServer, command: str) -> None:
    kfp.redirect("/apis/")
    said = client.fails(*COMMANDS[command])
    assert "answers with a web page, probably its login, and not with data. Set KFP_COOKIES" in said


@pytest.mark.parametrize("status", [200, 401, 403, 500])
def test_pages_are_not_quoted(client: Client, kfp: KfpServer, status: int) -> None:
    kfp.answer_html("/runs$", status)
    assert "<html>" not in client.fails("list")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_answer_that_does_not_come(
    client: Client, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("KFP_TIMEOUT", "0.2")
    kfp.hang("/healthz", 1.0)
    said = client.fails(*COMMANDS[command])
    assert "did not answer in time. Try again, or allow it more seconds with KFP_TIMEOUT" in said


def test_a_start_without_answer_may_have_happened(
    client: Client, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kfp.drop("/runs$")
    said = client.fails(*COMMANDS["submit"])
    assert "cannot be reached" in said
    assert "The run may have started: `make list` shows it." in said


@pytest.mark.parametrize("command", COMMANDS)
def test_an_address_where_nobody_is(
    client: Client, home: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("KFP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("SAEV_ROOT", "s3://bucket/saev")
    monkeypatch.setenv("SAEV_IMAGE", "registry.test/saev:1")
    said = client.fails(*COMMANDS[command])
    assert f"127.0.0.1:{port} cannot be reached (connection refused). Check KFP_ENDPOINT" in said


def test_a_host_that_does_not_exist(
    client: Client, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_ENDPOINT", "http://kubeflow.invalid")
    assert "kubeflow.invalid cannot be reached (no host kubeflow.invalid)" in client.fails("list")


def test_the_address_of_something_else(client: Client, kfp: KfpServer) -> None:
    kfp.answer_other("/healthz", "text/plain", "404 page not found", 404)
    assert "it is the address before /apis" in client.fails("list")


@pytest.mark.parametrize(
    ("kind", "text"),
    [("text/plain", "hello"), ("application/json", "[]"), ("application/json", '"x"'),
     ("application/json", "{"), ("application/octet-stream", "\x00")],
)  # fmt: skip
def test_something_else_answers(client: Client, kfp: KfpServer, kind: str, text: str) -> None:
    kfp.answer_other("/runs$", kind, text)
    said = client.fails("list")
    assert f"what answers at {kfp.url} is not Kubeflow Pipelines. Check KFP_ENDPOINT" in said


def test_a_proxy_of_the_environment_is_used(
    client: Client, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy gets whole URLs; the server refuses those, which shows that it was asked as one."""
    monkeypatch.setenv("http_proxy", kfp.url)
    monkeypatch.setenv("KFP_ENDPOINT", "http://kubeflow.test/pipeline")
    client.fails("list")
    assert kfp.requests[-1][1] == "http://kubeflow.test/pipeline/apis/v2beta1/healthz"
    assert kfp.violations.pop().startswith("GET http://kubeflow.test/")


# --- TLS ---------------------------------------------------------------------------------------


class Tls(tp.NamedTuple):
    """A KFP behind a certificate that nobody knows."""

    server: KfpServer
    certificate: Path


@pytest.fixture
def tls(home: Path, monkeypatch: pytest.MonkeyPatch) -> tp.Iterator[Tls]:
    certificate = certificates.for_loopback("kubeflow.test")
    home.joinpath("ca.pem").write_bytes(certificate.pem)
    home.joinpath("key.pem").write_bytes(certificate.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "ca.pem", home / "key.pem")
    with kfp_server.running(tls=context) as server:
        monkeypatch.setenv("KFP_ENDPOINT", server.url)
        yield Tls(server, home / "ca.pem")
        assert server.violations == []


def test_an_unknown_certificate(client: Client, tls: Tls) -> None:
    said = client.fails("list")
    assert "failed (self-signed certificate). Set KFP_CA_FILE" in said


def test_its_authority_can_be_named(
    client: Client, tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_CA_FILE", str(tls.certificate))
    tls.server.add_run("pets")
    assert "pets" in client.ok("list").out
    monkeypatch.setenv("KFP_CA_FILE", "gone.pem")
    assert "The certificates gone.pem do not exist. Check KFP_CA_FILE" in client.fails("list")


# --- Kubernetes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kubeconfig", "said"),
    [
        (None, "There is no kubeconfig at"),
        ("", "Check it with `kubectl version`"),
        ("{not yaml", "cannot be used"),
        (
            "apiVersion: v1\nkind: Config\nclusters: []\ncontexts: []\nusers: []\n",
            "no current context",
        ),
        ("just text", "cannot be used"),
    ],
)
def test_a_kubeconfig_that_does_not_serve(
    client: Client,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    kubeconfig: str | None,
    said: str,
) -> None:
    if kubeconfig is not None:
        home.joinpath("kubeconfig").write_text(kubeconfig)
    monkeypatch.setenv("KUBECONFIG", str(home / "kubeconfig"))
    assert said in client.fails("list")


def test_a_context_that_is_not_there(
    client: Client, kube: tp.Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBE_CONTEXT", "production")
    assert "has no context 'production'. `kubectl config get-contexts`" in client.fails("list")
