"""The ways to a cluster: endpoint with token or cookies, forwarded port, inside a pod."""

import collections.abc
import contextlib
import re
import socket
from pathlib import Path

import kfp_server
import pytest
from client import Client
from kfp_server import KfpServer
from kube_server import KubeServer

from pipelines import connect, settings
from pipelines.errors import ClusterError
from saev.errors import ConfigError


def _headers(kfp: KfpServer) -> dict[str, str]:
    return kfp.requests[-1][2]


def test_a_token_is_sent(client: Client, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    client.ok("list")
    assert "authorization" not in _headers(kfp)
    monkeypatch.setenv("KFP_TOKEN", "abc")
    client.ok("list")
    assert _headers(kfp)["authorization"] == "Bearer abc"


def test_a_token_file_is_read_for_every_request(kfp: KfpServer, home: Path) -> None:
    path = home / "token"
    path.write_text("first\n")
    with connect.connect(settings.load({"token_file": str(path)})) as connection:
        assert _headers(kfp)["authorization"] == "Bearer first"
        path.write_text("second\n")
        connection.runs.run_service_list_runs()
        assert _headers(kfp)["authorization"] == "Bearer second"


def test_a_token_file_that_is_missing(client: Client, kfp: KfpServer) -> None:
    assert "Cannot read the token file gone" in client.fails("list", "--token-file", "gone")


def test_cookies_are_sent(client: Client, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_COOKIES", "oauth2_proxy_kubeflow=abc")
    client.ok("list")
    assert _headers(kfp)["cookie"] == "oauth2_proxy_kubeflow=abc"


def test_a_user_is_named(client: Client, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_USER", "ann@example.com")
    client.ok("list")
    assert _headers(kfp)["kubeflow-userid"] == "ann@example.com"


@pytest.mark.parametrize("suffix", ["/", "/#/runs", "/apis/v2beta1/runs"])
def test_a_pasted_address_is_understood(
    client: Client, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setenv("KFP_ENDPOINT", kfp.url + suffix)
    client.ok("list")


def test_the_ui_may_be_elsewhere(
    client: Client, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_UI", "https://kubeflow.test/_/pipeline/")
    run = kfp.add_run("pets")
    assert (
        f"https://kubeflow.test/_/pipeline/#/runs/details/{run['run_id']}"
        in client.ok("status").out
    )


def test_nothing_is_written_into_the_home(client: Client, kfp: KfpServer, home: Path) -> None:
    before = sorted(home.rglob("*"))
    client.ok("list")
    assert sorted(home.rglob("*")) == before


# --- A forwarded port --------------------------------------------------------------------------


@pytest.fixture
def forwarded(kube: KubeServer) -> collections.abc.Iterator[KfpServer]:
    with kfp_server.running() as kfp:
        kube.add_kfp(int(kfp.url.rsplit(":", 1)[1]))
        yield kfp
        assert kfp.violations == []


def test_a_port_is_forwarded(client: Client, forwarded: KfpServer) -> None:
    run = forwarded.add_run("pets")
    result = client.ok("status")
    assert f"http://localhost:8080/#/runs/details/{run['run_id']}" in result.out


def test_who_gets_a_url_gets_the_command_that_opens_it(
    client: Client, forwarded: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEV_ROOT", "s3://bucket/saev")
    monkeypatch.setenv("SAEV_IMAGE", "registry.test/saev:1")
    result = client.ok("submit", "--config", "config.toml", "--no-check")
    assert result.out.startswith("http://localhost:8080/#/runs/details/")
    assert result.out.count("\n") == 1
    assert "kubectl port-forward -n kubeflow service/ml-pipeline-ui 8080:80" in result.err


def test_large_bodies_pass_through_a_forwarded_port(client: Client, forwarded: KfpServer) -> None:
    for i in range(300):
        forwarded.add_run(f"run-{i:03}-{'x' * 500}")
    with connect.connect(settings.load({})) as connection:
        answer = connection.runs.run_service_list_runs(page_size=300)
    assert len(answer.runs) == 300


@pytest.mark.parametrize(
    ("status", "said"), [(500, r"failed \(500: .*Try again"), (403, r"may not|403")]
)
def test_a_port_that_may_not_be_forwarded(
    client: Client, kube: KubeServer, forwarded: KfpServer, status: int, said: str
) -> None:
    kube.forward_status = status
    err = client.fails("status")
    assert re.search(said, err), err
    assert "certificate" not in err


def test_the_forwarded_port_ends_with_the_connection(forwarded: KfpServer) -> None:
    with connect.connect(settings.load({})) as connection:
        pass
    with pytest.raises(ClusterError), connection.explained("list runs"):
        connection.runs.run_service_list_runs()


def test_a_forwarding_that_breaks_is_made_anew(
    forwarded: KfpServer, kube: KubeServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """As when a pod is replaced, or a load balancer ends what is idle: no traceback, no waiting."""
    with connect.connect(settings.load({"timeout": 300.0})) as connection:
        for broken in range(3):
            for forwarding in kube.forwarding:
                with contextlib.suppress(OSError):
                    forwarding.shutdown(socket.SHUT_RDWR)
            for _ in range(2):  # the first may find that its connection has ended
                with contextlib.suppress(ClusterError), connection.explained("list runs"):
                    connection.runs.run_service_list_runs()
            assert len(kube.forwarding) > broken
        assert connection.runs.run_service_list_runs().total_size == 0
    assert "Traceback" not in capfd.readouterr().err


def test_no_such_service(client: Client, kube: KubeServer) -> None:
    said = client.fails("list")
    assert f"There is no service ml-pipeline in namespace kubeflow of {kube.url}" in said
    assert "set KFP_SYSTEM_NAMESPACE" in said


def test_no_ready_pod(client: Client, forwarded: KfpServer, kube: KubeServer) -> None:
    pod = kube.objects["pods", "kubeflow", "ml-pipeline-0"]
    pod["status"]["conditions"][0]["status"] = "False"
    said = client.fails("list")
    assert "none of its 1 pods in namespace kubeflow is ready" in said
    assert "kubectl get pods -n kubeflow -l app=ml-pipeline" in said


def test_a_pod_that_does_not_listen(client: Client, forwarded: KfpServer, kube: KubeServer) -> None:
    kube.forwards["ml-pipeline-0"] = 9
    said = client.fails("list")
    assert "service/ml-pipeline in namespace kubeflow" in said
    assert "cannot be reached" in said


@pytest.mark.parametrize(
    ("status", "said"), [(401, "Log in to the cluster"), (403, "administrator")]
)
def test_kubernetes_refuses(client: Client, kube: KubeServer, status: int, said: str) -> None:
    kube.statuses["services"] = status
    assert said in client.fails("list")


def test_kubernetes_cannot_be_reached(client: Client, kube: KubeServer, home: Path) -> None:
    path = home / "kubeconfig"
    path.write_text(path.read_text().replace(kube.url, "http://127.0.0.1:9"))
    said = client.fails("list")
    assert "the Kubernetes API at http://127.0.0.1:9 cannot be reached (connection refused)" in said
    assert "Check KUBECONFIG" in said


def test_something_else_is_no_kubernetes(client: Client, kfp: KfpServer, kube: KubeServer) -> None:
    path = Path("kubeconfig")
    path.write_text(path.read_text().replace(kube.url, kfp.url))
    kfp.answer_other("/version", "text/plain", "hello")
    result = client("doctor", "--no-pod")
    assert result.status == 0
    assert f"what answers at {kfp.url} is not the Kubernetes API. Check KUBECONFIG" in result.out


# --- Settings ----------------------------------------------------------------------------------


def test_flag_before_environment_before_file_before_default(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.load({}).experiment == "saev"
    home.joinpath("cluster.toml").write_text(
        'experiment = "file"\nnamespace = "file"\nui = "http://f"\n'
    )
    monkeypatch.setenv("KFP_EXPERIMENT", "environment")
    monkeypatch.setenv("KFP_NAMESPACE", "environment")
    found = settings.load({"namespace": "flag", "context": ""})
    assert (found.namespace, found.experiment, found.ui) == ("flag", "environment", "http://f")
    assert found.kfp_namespace == "kubeflow"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("endpont = 'http://x'", "Unknown key 'endpont' in cluster.toml. Did you mean endpoint?"),
        ("timeout = 'long'", "Invalid cluster.toml: timeout"),
        ("endpoint = 'x'", "Invalid cluster.toml: endpoint"),
        ("timeout = ", "cluster.toml is not valid TOML"),
    ],
)
def test_a_wrong_file_is_named(home: Path, text: str, said: str) -> None:
    home.joinpath("cluster.toml").write_text(text)
    with pytest.raises(ConfigError, match=said.replace("?", "\\?")):
        settings.load({})


def test_a_wrong_variable_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match="KFP_TIMEOUT"):
        settings.load({})


def test_a_file_that_is_named_must_exist(client: Client, home: Path) -> None:
    assert "other.toml" in client.fails("list", "--cluster-file", "other.toml")


def test_parameters_of_the_file_are_those_of_runs(
    client: Client, kfp: KfpServer, home: Path
) -> None:
    home.joinpath("cluster.toml").write_text(
        'cpu_image = "registry.test/cpu:1"\n[parameters]\ngpu_count = 2\ntrain_gpus = 8\n'
        "n_parts = 3\n[compile]\nparallelism = 5\n"
    )
    argv = ("submit", "--config", "config.toml", "--no-check", "--param", "n_parts=4")
    client.ok(*argv)
    parameters = kfp.runs[0]["runtime_config"]["parameters"]
    assert parameters["n_parts"] == 4
    text = str(kfp.versions[0]["pipeline_spec"])
    assert [text.count(f"'resourceCount': '{n}'") for n in (2, 8)] == [2, 1]
    assert "registry.test/cpu:1" in text
    assert "'parallelismLimit': 5" in text
    home.joinpath("cluster.toml").write_text("[compile]\nparalelism = 5\n")
    assert "paralelism: unknown key" in client.fails(*argv)


def test_the_example_is_valid_and_complete(home: Path) -> None:
    example = Path(__file__).parents[2] / "cluster.example.toml"
    text = example.read_text()
    assert settings.load({}, str(example)) == settings.Settings()
    for key in settings.Settings.model_fields:
        assert f"\n# {key} = " in text or f"\n# [{key}]" in text or key in ("token", "cookies"), key
    uncommented = "\n".join(
        line.removeprefix("# ") for line in text.splitlines() if not line.startswith("## ")
    )
    home.joinpath("all.toml").write_text(uncommented)
    assert settings.load({}, "all.toml").parameters["n_parts"] == 4
