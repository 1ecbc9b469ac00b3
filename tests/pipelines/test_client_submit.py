"""`submit`: what is checked before the network, what is sent, and waiting for the run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from client import Client
from compiling import compile_pipeline
from kfp_server import KfpServer, look, step, task
from kube_server import KubeServer

from pipelines import steps, submit, watch
from pipelines.options import CompileOptions

ROOT = Path(__file__).parents[2]
SUBMIT = ("submit", "--dataset", "s3://bucket/pets", "--config", "config.toml", "--no-check")


def test_a_run_is_started(client: Client, kfp: KfpServer) -> None:
    result = client.ok(*SUBMIT, "--name", "first")
    [run] = kfp.runs
    assert result.out == f"{kfp.url}/#/runs/details/{run['run_id']}\n"
    assert run["display_name"] == "first"
    assert run["service_account"] == "saev-steps"
    [experiment] = kfp.experiments
    assert (experiment["display_name"], run["experiment_id"]) == (
        "saev",
        experiment["experiment_id"],
    )


def test_parameters_are_sent_with_the_sweep_inside(client: Client, kfp: KfpServer) -> None:
    client.ok(*SUBMIT, "--param", "n_parts=4")
    parameters = kfp.runs[0]["runtime_config"]["parameters"]
    assert parameters["dataset"] == "s3://bucket/pets"
    assert parameters["root"] == "s3://bucket/saev"
    assert parameters["n_parts"] == 4
    assert parameters["config"]["sweep"]["sae"]["activation"]["top_k"] == [8, 16]
    assert "sweep" not in parameters["config"]["train"]
    assert "null" not in json.dumps(parameters)


def test_how_pods_are_made_is_compiled_into_the_version(client: Client, kfp: KfpServer) -> None:
    """The same parameters as before, which KFP would store anew for each pod of a run."""
    words = ("gpu_count=2", 'node_selector={"disk": "ssd"}', "memory=64Gi", "config_map=other")
    client.ok(*SUBMIT, "--param", *words)
    client.ok(*SUBMIT)
    client.ok(*SUBMIT, "--param", *words)
    assert len(kfp.versions) == 2
    used = [run["pipeline_version_reference"]["pipeline_version_id"] for run in kfp.runs]
    assert used[0] == used[2] != used[1]
    for run in kfp.runs:
        assert run["runtime_config"]["parameters"].keys() == {"config", "dataset", "root"}
    both = kfp.versions[0]["pipeline_spec"]
    container = both["pipeline_spec"]["deploymentSpec"]["executors"]["exec-train"]["container"]
    assert container["resources"]["accelerator"]["resourceCount"] == "2"
    assert container["resources"]["resourceMemoryLimit"] == "64Gi"
    executors = both["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors["exec-infer"]["nodeSelector"] == {"labels": {"disk": "ssd"}}
    names = [pod["configMapAsVolume"][0]["configMapNameParameter"] for pod in executors.values()]
    assert names == [{"runtimeValue": {"constant": "other"}}] * 9


def test_a_dataset_that_is_being_processed(client: Client, kfp: KfpServer) -> None:
    """Its claim is taken over, which ends the other run: that is said before."""
    client.ok(*SUBMIT, "--name", "first")
    kfp.runs[0]["state"] = "RUNNING"
    parameters = kfp.runs[0]["runtime_config"]["parameters"]
    kfp.add_run("over", runtime_config={"parameters": parameters})
    for name, change in (
        ("elsewhere", {"root": "s3://bucket/other"}),
        ("other-config", {"config": {"data": {}}}),
        ("other-data", {"dataset": "s3://bucket/pet"}),
    ):
        kfp.add_run(name, "RUNNING", runtime_config={"parameters": {**parameters, **change}})
    scheduled = {**parameters, "dataset": "s3://bucket", "marker": "_SUCCESS"}
    kfp.add_run("nightly", "RUNNING", runtime_config={"parameters": scheduled})
    said = client.ok(*SUBMIT, "--name", "second").err
    lines = [line for line in said.splitlines() if "this dataset with this config" in line]
    assert len(lines) == 2
    assert "Run nightly (" in lines[0]
    assert "may be processing" in lines[0]
    assert f"Run first ({kfp.runs[0]['run_id']}) is processing this dataset" in lines[1]
    assert "The new run takes it over: the other run stops at its next safe point" in lines[1]
    assert f"`make cancel RUN={kfp.runs[0]['run_id']}`" in lines[1]


def test_who_may_not_list_runs_may_start_them(client: Client, kfp: KfpServer) -> None:
    kfp.fail("/runs$", 403, method="GET")
    assert "not checked whether another run processes" in client.ok(*SUBMIT).err
    assert len(kfp.runs) == 1


def test_a_run_is_named_after_dataset_and_time(client: Client, kfp: KfpServer) -> None:
    client.ok(*SUBMIT)
    assert kfp.runs[0]["display_name"].startswith("pets-20")


def test_a_version_is_uploaded_once_per_content(
    client: Client, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.ok(*SUBMIT)
    client.ok(*SUBMIT)
    assert len(kfp.versions) == len(kfp.pipelines) == len(kfp.experiments) == 1
    monkeypatch.setenv("SAEV_IMAGE", "registry.test/saev:2")
    client.ok(*SUBMIT)
    assert len(kfp.versions) == 2
    assert len(kfp.pipelines) == 1
    used = [run["pipeline_version_reference"]["pipeline_version_id"] for run in kfp.runs]
    assert used[0] == used[1] != used[2]
    expected = CompileOptions(image="registry.test/saev:1", cpu_image="registry.test/saev:1")
    assert kfp.versions[0]["display_name"] == compile_pipeline("saev", expected).digest


def test_who_loses_a_race_to_upload_uses_the_winners(client: Client, kfp: KfpServer) -> None:
    """Everything that was absent at the first look is there when it is made."""
    client.ok(*SUBMIT)
    kept = [list(items) for items in (kfp.experiments, kfp.pipelines, kfp.versions)]
    first_looks = {"experiments": 0, "pipelines": 1, "versions": 2}
    for path, index in first_looks.items():
        kfp.faults.clear()
        name = {"experiments": "experiments", "pipelines": "pipelines"}.get(
            path, "pipeline_versions"
        )
        kfp._fault("GET", rf"/{path}$", lambda h, n=name: h.answer(200, {"total_size": 0}), 1)
        client.ok(*SUBMIT)
        assert [kfp.experiments, kfp.pipelines, kfp.versions][index] == kept[index]
        posts = [path for method, path, _ in kfp.requests if method == "POST"]
        assert len(posts) > index


def test_a_shared_kfp_gets_the_namespace_with_every_request(
    client: Client, shared_kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_NAMESPACE", "team-a")
    client.ok(*SUBMIT)
    assert shared_kfp.experiments[0]["namespace"] == "team-a"
    assert shared_kfp.pipelines[0]["namespace"] == "team-a"
    for method, path, _ in shared_kfp.requests:
        if method == "GET" and path.split("?")[0].endswith(("/experiments", "/pipelines")):
            assert "namespace=team-a" in path


def test_a_shared_kfp_needs_a_namespace(client: Client, shared_kfp: KfpServer) -> None:
    assert "multi-user" in (said := client.fails(*SUBMIT))
    assert "Set KFP_NAMESPACE" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--param", "n_part=4"], "has no parameter 'n_part' (--param). Did you mean n_parts?"),
        (["--param", "n_parts"], "'n_parts' is not KEY=VALUE"),
        (["--param", "n_parts=1", "n_parts=2"], "n_parts is given twice"),
        (["--param", "n_parts=many"], "is 'many', expected a whole number"),
        (["--param", "n_parts=1.5"], "expected a whole number"),
        (["--param", "n_parts=0"], "expected at least 1"),
        (["--param", "node_selector=[]"], "expected a JSON object"),
        (["--param", "tolerations=x"], "expected a JSON list"),
        (["--param", "memory=32GB"], "not 32GB"),
        (["--param", "gpu_count=-1"], "expected a whole number of GPUs"),
        (["--param", "pvc_name=My Volume"], "expected a Kubernetes name"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--dataset", "pictures"], "'pictures', which pods cannot find"),
        (["--dataset", "/data/pictures"], "the pods mount no volume"),
        (["--dataset", "/home/pictures", "--storage", "pvc"], "only what is below /data"),
        (["--root", "out"], "the root is 'out', which pods cannot find"),
        (["--endpoint", "kubeflow.test"], "expected a URL that begins with https://"),
    ],
)
def test_mistakes_are_found_without_a_request(
    client: Client, kfp: KfpServer, argv: list[str], said: str
) -> None:
    merged = [*SUBMIT]
    for flag in ("--dataset", "--config"):
        if argv[0] == flag:
            merged[merged.index(flag) + 1] = argv[1]
            argv = argv[2:]
            break
    assert said in client.fails(*merged, *argv)
    assert kfp.requests == []


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (("n_train", "n_trian"), "n_trian: unknown key"),
        (('family = "dinov2"', 'family = 3'), "family"),
        (('sweep = "sweep.toml"', 'sweep = "gone.toml"'), "gone.toml"),
        (("[train]", "[train"), "not valid TOML"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_found_without_a_request(
    client: Client, kfp: KfpServer, home: Path, edit: tuple[str, str], said: str
) -> None:
    path = home / "config.toml"
    path.write_text(path.read_text().replace(*edit))
    assert said in client.fails(*SUBMIT)
    assert kfp.requests == []


def test_a_wrong_sweep_is_found_without_a_request(
    client: Client, kfp: KfpServer, home: Path
) -> None:
    home.joinpath("sweep.toml").write_text("[sae.activation]\nkind = 'top-k'\ntop_kk = [1]\n")
    assert "top_kk" in client.fails(*SUBMIT)
    assert kfp.requests == []


def test_what_every_cluster_needs_is_asked_for(
    client: Client, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAEV_IMAGE")
    assert "make image" in client.fails(*SUBMIT)
    monkeypatch.delenv("SAEV_ROOT")
    assert "Set SAEV_ROOT" in client.fails(*SUBMIT)
    assert kfp.requests == []


@pytest.mark.parametrize(
    ("root", "said"),
    [
        (None, "No dataset: say DATASET=s3://… (--dataset), or add a [data] table to"),
        ("~/pictures", "config.toml is '~/pictures', which pods cannot find"),
    ],
)
def test_a_dataset_is_needed(
    client: Client, kfp: KfpServer, home: Path, root: str | None, said: str
) -> None:
    path = home / "config.toml"
    text = path.read_text()
    data = text[: text.index("[shards]")]
    new = data.replace("s3://bucket/default", root) if root else ""
    path.write_text(text.replace(data, new))
    assert said in client.fails("submit", "--config", "config.toml")
    assert kfp.requests == []


# --- Dataset and root --------------------------------------------------------------------------


def test_dataset_and_root_are_looked_at(
    client: Client, kfp: KfpServer, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saev import storage

    monkeypatch.setenv("SAEV_ROOT", f"{s3}/submit/root")
    storage.write_bytes(f"{s3}/submit/pets/a.png", b"png")
    argv = ("submit", "--config", "config.toml", "--dataset")
    result = client.ok(*argv, f"{s3}/submit/pets")
    assert f"ok: {s3}/submit/pets is readable" in result.err
    assert f"ok: {s3}/submit/root is writable" in result.err
    assert "/submit/cats: it does not exist" in client.fails(*argv, f"{s3}/submit/cats")
    assert len(kfp.runs) == 1


def test_who_has_no_credentials_may_submit(kfp: KfpServer, home: Path) -> None:
    aws = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    env = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    command = [sys.executable, "-m", "pipelines", "submit", "--config", "config.toml"]
    result = subprocess.run(
        [*command, "--dataset", "s3://bucket/pets"],
        env={**env, **aws, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=home,
        timeout=120,
        check=True,
    )
    assert "not checked from here: s3://bucket/pets" in result.stderr
    assert result.stdout == f"{kfp.url}/#/runs/details/{kfp.runs[0]['run_id']}\n"


def test_a_path_on_the_volume_is_not_looked_for_here(client: Client, kfp: KfpServer) -> None:
    argv = ("submit", "--config", "config.toml", "--storage", "pvc", "--root", "/data/saev")
    result = client.ok(*argv, "--dataset", "/data/pets")
    assert "not checked: /data/pets, which is on the pods' volume" in result.err
    assert not Path("/data/saev").exists()


# --- Waiting -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)


def _before_training() -> list[list[dict]]:
    names = ("discover", "plan", "publish")
    return [*(step(name, "SUCCEEDED") for name in names), step("extract", *["SUCCEEDED"] * 8)]


def test_waiting_tells_each_change_once(client: Client, kfp: KfpServer) -> None:
    kfp.script = [
        look("PENDING"),
        look("RUNNING", step("discover", "RUNNING")),
        look("RUNNING", step("discover", "RUNNING")),
        look("RUNNING", step("discover", "SUCCEEDED"), step("extract", "SUCCEEDED", "RUNNING")),
        look("SUCCEEDED", *_before_training()),
    ]
    result = client.ok(*SUBMIT, "--wait", "--name", "r")
    assert result.out.count("\n") == 1
    assert result.err.count("discover: 0/1 done, 1 running") == 1
    assert "extract: 1/2 done, 1 running" in result.err
    assert "extract: 8/8 done" in result.err
    assert "r succeeded after" in result.err


def test_a_failed_run_ends_with_the_failing_steps_log(
    client: Client, kfp: KfpServer, kube: KubeServer
) -> None:
    kfp.script = [look("FAILED", *_before_training(), step("train", "SUCCEEDED", "FAILED"))]
    kfp.on_start = lambda run_id: _pods(kube, run_id)
    result = client(*SUBMIT, "--wait", "--name", "r")
    assert result.status == 1
    assert "line 99\n" in result.err
    assert "line 60\n" not in result.err
    assert "main: OOMKilled, exit status 137" in result.err
    assert "r failed in step train after" in result.err.splitlines()[-1]
    assert "`make logs RUN=" in result.err.splitlines()[-1]


def _pods(kube: KubeServer, run_id: str) -> None:
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    status = {"name": "main", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
    for name, component, phase in (
        ("saev-ok", "train", "Succeeded"),
        ("saev-bad", "train", "Failed"),
        ("saev-other", "extract", "Failed"),
    ):
        kube.add(
            "pods", name, "kubeflow",
            labels={"pipeline/runid": run_id, "app.kubernetes.io/component": component},
            spec={"containers": [{"name": "main", "image": "i"}]},
            status={"phase": phase, "containerStatuses": [{**status, "state": killed}]}
            if name == "saev-bad" else {"phase": phase},
        )  # fmt: skip
    kube.logs["saev-bad"] = "".join(f"line {i}\n" for i in range(100))
    kube.logs["saev-ok"] = "fine\n"


LAUNCHER = """\
I1127 09:10:00.123456      23 launcher_v2.go:180] publish success.
E1127 09:10:00.123456      23 launcher_v2.go:449] Component failed to execute successfully: x
F1127 09:10:00.123456      23 main.go:59] failed to execute component: exit status 1
time="2026-11-27T09:10:01.000Z" level=info msg="sub-process exited" argo=true error="<nil>"
Error: exit status 1
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("saev: error: It is damaged. Repair it.", "It is damaged. Repair it."),
        ("saev: permanent error: It is damaged. Repair it.", "It is damaged. Repair it."),
        ("saev: passing error, tried 4 times: No answer.", "passing error, tried 4 times: No an"),
    ],
)
def test_the_steps_error_is_the_last_word(
    client: Client, kfp: KfpServer, kube: KubeServer, line: str, said: str
) -> None:
    """What KFP's launcher and Argo write behind it does not push it out of the tail."""
    kfp.script = [look("FAILED", *_before_training(), step("train", "FAILED"))]

    def start(run_id: str) -> None:
        _pods(kube, run_id)
        earlier = "saev: error: An earlier one.\nreading 1\nreading 2\n"
        kube.logs["saev-bad"] = f"{earlier}{line}\n{LAUNCHER * 20}"

    kfp.on_start = start
    lines = client(*SUBMIT, "--wait", "--name", "r").err.splitlines()
    assert "r failed in step train after" in lines[-1]
    assert f"The step's error: {said}" in lines[-1]
    assert "reading 1" in lines
    assert not any(word in line for line in lines for word in (".go:", "argo=true", "Error: exit"))


def test_without_kubernetes_a_failed_run_says_what_kfp_knows(
    client: Client, kfp: KfpServer
) -> None:
    bad = [task("train-driver", "SUCCEEDED"), task("train", "FAILED", "OOMKilled (exit code 137)")]
    kfp.script = [look("FAILED", *_before_training(), bad)]
    result = client(*SUBMIT, "--wait")
    assert result.status == 1
    assert "KFP says: OOMKilled (exit code 137)" in result.err


def test_without_anything_known_the_reason_is_told(client: Client, kfp: KfpServer) -> None:
    kfp.script = [look("FAILED", step("train", "FAILED"))]
    result = client(*SUBMIT, "--wait")
    assert result.status == 1
    assert "No log of the failed step: There is no kubeconfig" in result.err


def test_a_driver_that_fails_is_its_steps_failure(client: Client, kfp: KfpServer) -> None:
    kfp.script = [look("FAILED", step("discover", "SUCCEEDED"), [task("extract-driver", "FAILED")])]
    assert "failed in step extract" in client(*SUBMIT, "--wait").err


def test_a_canceled_run_is_no_success(client: Client, kfp: KfpServer) -> None:
    kfp.script = [look("CANCELED", step("discover", "SUCCEEDED"))]
    result = client(*SUBMIT, "--wait")
    assert result.status == 1
    assert "was canceled after" in result.err


def test_waiting_survives_errors_of_the_server(client: Client, kfp: KfpServer) -> None:
    kfp.script = [look("RUNNING", step("discover", "RUNNING")), look("SUCCEEDED")]
    kfp.fail("/runs/[0-9a-f-]+$", 503, "upstream connect error", times=2)
    kfp.drop("/runs/[0-9a-f-]+$", times=2)
    result = client.ok(*SUBMIT, "--wait")
    assert "upstream connect error" in result.err
    assert "Waiting goes on." in result.err


def test_waiting_ends_when_the_user_is_refused(client: Client, kfp: KfpServer) -> None:
    kfp.fail("/runs/[0-9a-f-]+$", 401, times=-1)
    result = client(*SUBMIT, "--wait")
    assert result.status == 1
    assert "does not know you (401)" in result.err
    assert "The run goes on; `make watch RUN=" in result.err


def test_ctrl_c_leaves_the_run_alone(kfp: KfpServer, home: Path) -> None:
    kfp.script = [look("RUNNING", step("discover", "RUNNING"))]
    command = [sys.executable, "-m", "pipelines", *SUBMIT, "--wait"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
    )
    assert process.stdout
    assert process.stderr
    url = process.stdout.readline().strip()
    for line in process.stderr:
        if "discover: 0/1 done" in line:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    run_id = url.rsplit("/", 1)[-1]
    assert f"The run goes on. `make watch RUN={run_id}` watches it again" in rest
    assert f"`make cancel RUN={run_id}` stops it" in rest
    assert kfp.runs[0]["state"] == "RUNNING"
    assert not any(":terminate" in path for _, path, _ in kfp.requests)


def test_the_steps_are_those_of_the_pipelines() -> None:
    """Every step of the compiled pipelines has a place in the table, and every place a step."""
    import yaml

    found = set()
    for name in ("saev", "saev-incoming"):
        options = CompileOptions(image="registry.test/a:1", cpu_image="registry.test/b:1")
        text = compile_pipeline(name, options).text
        spec = next(yaml.load_all(text, yaml.CSafeLoader))
        dags = [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]
        for dag in dags:
            for key, node in dag["tasks"].items():
                if "executorLabel" in spec["components"][node["componentRef"]["name"]]:
                    found.add(key)
    assert found == {*steps.STEPS, *steps.FIRING}


@pytest.mark.parametrize(
    ("dataset", "data", "name"),
    [
        ("s3://bucket/images/pets", {}, "pets"),
        ("s3://bucket/pets/", {"kind": "img-folder", "root": "/other"}, "pets"),
        ("", {"kind": "img-folder", "root": "/data/photos/*.jpg"}, "photos"),
        ("", {"kind": "imagenet", "name": "org/imagenet-1k"}, "imagenet-1k"),
        ("", {"kind": "fake-img"}, "fake-img"),
        ("", {}, "saev"),
        ("s3://bucket/" + "x" * 200, {}, "x" * 60),
    ],
)
def test_a_run_is_called_after_its_dataset(dataset: str, data: dict, name: str) -> None:
    config = {"data": data} if data else {}
    assert submit.dataset_name({"dataset": dataset, "config": config}) == name
