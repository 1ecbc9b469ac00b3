"""The compiled pipelines, as the backend will read them.

kfp's compiler and loader let specifications through that the backend refuses, so every message is
parsed as the backend parses it, and every reference is followed.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import typing as tp
from pathlib import Path

import pytest
import yaml
from compiling import compile_anew, compile_pipeline
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines import options
from pipelines.definition import Compiled
from pipelines.options import CompileOptions, PodOptions
from saev import cli
from saev.config.environment import CONFIG_ENV, SECRET_ENV
from saev.config.steps import STEPS
from saev.launch.pods import PodSettings
from saev.steps.environment import FOLDERS
from saev.steps.supervisor import Policy

ROOT = Path(__file__).parents[2]
OPTIONS = CompileOptions(image="example.org/saev:1", cpu_image="example.org/saev-cpu:1")
PVC = OPTIONS.model_copy(update={"storage": "pvc"})
JOB = OPTIONS.model_copy(update={"launch": "job"})
MACHINES = OPTIONS.model_copy(
    update={"pods": PodOptions(train_nodes="3", train_gpus="8", queue="big", cpu="16")}
)
PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")


class Ir(tp.NamedTuple):
    """A compiled pipeline, parsed."""

    compiled: Compiled
    spec: pipeline_spec_pb2.PipelineSpec
    executors: dict[str, tp.Any]
    kubernetes: dict[str, kubernetes_executor_config_pb2.KubernetesExecutorConfig]

    @property
    def launched(self) -> set[str]:
        """Steps whose slots are pods that another pod makes."""
        words = [dict(itertools.pairwise(e.container.args)) for e in self.executors.values()]
        return {found["--step"] for found in words if "--step" in found}

    def dags(self) -> dict[str, pipeline_spec_pb2.ComponentSpec]:
        found = {name: c for name, c in self.spec.components.items() if c.HasField("dag")}
        return {"root": self.spec.root, **found}

    def tasks(self) -> tp.Iterator[tuple[pipeline_spec_pb2.ComponentSpec, str, tp.Any]]:
        """Every task with the graph that it is in."""
        for dag in self.dags().values():
            for name, task in dag.dag.tasks.items():
                yield dag, name, task


@pytest.fixture(
    scope="module",
    params=[
        ("saev", OPTIONS),
        ("saev", PVC),
        ("saev", JOB),
        ("saev", MACHINES),
        ("saev-incoming", OPTIONS),
        ("saev-incoming", PVC),
    ],
    ids=["one-object", "one-pvc", "one-job", "one-machines", "incoming-object", "incoming-pvc"],
)
def ir(request: pytest.FixtureRequest) -> Ir:
    return parse(compile_pipeline(*request.param))


def parse(compiled: Compiled) -> Ir:
    """A pipeline as the backend parses it."""
    raw, platforms = yaml.load_all(compiled.text, yaml.CSafeLoader)
    spec = json_format.ParseDict(raw, pipeline_spec_pb2.PipelineSpec())
    deployment = json_format.ParseDict(
        json_format.MessageToDict(spec.deployment_spec),
        pipeline_spec_pb2.PipelineDeploymentConfig(),
    )
    assert list(platforms) == ["platforms"]
    assert list(platforms["platforms"]) == ["kubernetes"]
    configs = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    kubernetes = {
        name: json_format.ParseDict(
            config, kubernetes_executor_config_pb2.KubernetesExecutorConfig()
        )
        for name, config in configs.items()
    }
    return Ir(compiled, spec, dict(deployment.executors.items()), kubernetes)


def test_every_reference_resolves(ir: Ir) -> None:
    used = set()
    for _, name, task in ir.tasks():
        component = ir.spec.components[task.component_ref.name]
        used.add(task.component_ref.name)
        assert component.HasField("dag") or component.executor_label in ir.executors, name
    assert used == set(ir.spec.components), "a component that nothing uses"
    labels = {c.executor_label for c in ir.spec.components.values() if c.executor_label}
    assert labels == set(ir.executors) == set(ir.kubernetes)


def test_every_input_of_a_task_is_there(ir: Ir) -> None:
    """Among them resources given as parameters, which kfp does not hand on into loops."""
    for dag, name, task in ir.tasks():
        inputs = dag.input_definitions.parameters
        for key, source in task.inputs.parameters.items():
            if source.component_input_parameter:
                assert source.component_input_parameter in inputs, f"{name}: {key}"
            if source.HasField("task_output_parameter"):
                producer = source.task_output_parameter
                made_by = ir.spec.components[
                    dag.dag.tasks[producer.producer_task].component_ref.name
                ]
                outputs = made_by.output_definitions.parameters
                assert producer.output_parameter_key in outputs, f"{name}: {key}"
                assert producer.producer_task in task.dependent_tasks
        component = ir.spec.components[task.component_ref.name]
        for key, wanted in component.input_definitions.parameters.items():
            if not wanted.is_optional:
                is_item = task.parameter_iterator.item_input == key
                assert is_item or key in task.inputs.parameters, f"{name} lacks {key}"


def test_every_value_has_the_type_that_is_expected(ir: Ir) -> None:
    """The backend turns anything into a text, numbers into each other, and nothing else."""
    kinds = pipeline_spec_pb2.ParameterType
    numbers = {kinds.NUMBER_INTEGER, kinds.NUMBER_DOUBLE}
    for dag, name, task in ir.tasks():
        component = ir.spec.components[task.component_ref.name]
        for key, source in task.inputs.parameters.items():
            if key not in component.input_definitions.parameters:
                continue
            wanted = component.input_definitions.parameters[key].parameter_type
            if source.component_input_parameter:
                given = dag.input_definitions.parameters[source.component_input_parameter]
            elif source.HasField("task_output_parameter"):
                output = source.task_output_parameter
                made_by = dag.dag.tasks[output.producer_task].component_ref.name
                outputs = ir.spec.components[made_by].output_definitions.parameters
                given = outputs[output.output_parameter_key]
            else:
                continue
            fits = given.parameter_type == wanted or wanted == kinds.STRING
            assert fits or {given.parameter_type, wanted} <= numbers, f"{name}: {key}"


def test_kubernetes_settings_name_parameters_of_the_graph(ir: Ir) -> None:
    for dag, name, task in ir.tasks():
        label = ir.spec.components[task.component_ref.name].executor_label
        if not label:
            continue
        text = json_format.MessageToJson(ir.kubernetes[label])
        for reference in re.findall(r'"componentInputParameter": "([^"]+)"', text):
            assert reference in dag.input_definitions.parameters, f"{name}: {reference}"
        resources = json_format.MessageToJson(ir.executors[label].container.resources)
        for reference in PLACEHOLDER.findall(json.loads(json.dumps(resources))):
            assert reference in task.inputs.parameters, f"{name}: {reference}"


def test_every_command_is_one_that_the_image_understands(ir: Ir) -> None:
    seen = set()
    for component in ir.spec.components.values():
        if not component.executor_label:
            continue
        container = ir.executors[component.executor_label].container
        assert container.command[:4] == ["python", "-m", "saev.steps.supervisor", "step"]
        numbers = {
            name
            for name, p in component.input_definitions.parameters.items()
            if p.parameter_type in (1, 2)  # NUMBER_DOUBLE, NUMBER_INTEGER
        }
        words = [*container.command[3:]]
        for arg in container.args:
            names = PLACEHOLDER.findall(arg)
            words.append("2" if set(names) & numbers else arg)
        cfg = cli.parse(words)
        assert isinstance(cfg, STEPS[container.command[4]])
        seen.add(container.command[4])
    firing = {"fire"}
    is_firing = ir.compiled.name == "saev-incoming"
    others = {"check"} | firing | (ir.launched or {"launch"})
    assert seen == (firing if is_firing else set(STEPS) - others)


def test_pods(ir: Ir) -> None:
    gpu_steps = set()
    for component in ir.spec.components.values():
        if not component.executor_label:
            continue
        container = ir.executors[component.executor_label].container
        pod, step = ir.kubernetes[component.executor_label], container.command[4]
        labels = dict(pod.pod_metadata.labels)
        assert labels["app.kubernetes.io/part-of"] == "saev"
        launched = dict(itertools.pairwise(container.args)).get("--step")
        assert labels["app.kubernetes.io/component"] == launched or step
        mounts = {m.mount_path for m in pod.empty_dir_mounts}
        assert "/tmp" in mounts
        assert (pod.active_deadline_seconds > 0) == (step != "launch")
        kill = json.loads(dict(pod.pod_metadata.annotations)["workflows.argoproj.io/kill-cmd-main"])
        assert kill == [*container.command[:3], "--signal", "%d"]
        assert not container.env
        assert pod.security_context.run_as_non_root
        volumes = [*pod.secret_as_volume, *pod.config_map_as_volume]
        assert all(volume.optional for volume in volumes)
        assert [volume.mount_path for volume in volumes] == [str(f) for f, _ in FOLDERS]
        assert not [*pod.secret_as_env, *pod.config_map_as_env]
        is_small = step in ("fire", "discover", "report", "launch", "outcome")
        assert container.image == (OPTIONS.cpu_image if is_small else OPTIONS.image)
        if container.resources.HasField("accelerator"):
            gpu_steps.add(step)
            assert container.resources.accelerator.resource_type == "nvidia.com/gpu"
            assert container.resources.accelerator.resource_count == "1"
            assert "/dev/shm" in mounts
            assert [t.key for t in pod.tolerations] == ["nvidia.com/gpu"]
    is_firing = ir.compiled.name == "saev-incoming"
    assert gpu_steps == (set() if is_firing else {"extract", "train", "infer"} - ir.launched)


def test_a_group_is_trained_on_several_machines() -> None:
    ir = parse(compile_pipeline("saev", MACHINES))
    assert ir.launched == {"train"}
    flags = dict(itertools.pairwise(ir.executors["exec-train"].container.args))
    assert (flags["--machines"], flags["--queue"]) == ("3", "big")
    settings = PodSettings.from_dict(json.loads(flags["--pods"]), source="--pods")
    assert (settings.image, settings.gpus, settings.cpu) == (OPTIONS.image, 8, "16")
    assert settings.timeout_seconds == MACHINES.timeout_seconds("train")
    outcome = ir.spec.root.dag.tasks["outcome"].inputs.parameters["launched"]
    assert outcome.runtime_value.constant.string_value == "trainjobs"
    both = MACHINES.model_copy(update={"launch": "job"})
    ir = parse(compile_pipeline("saev", both))
    assert ir.launched == {"extract", "train", "infer", "summarise"}
    outcome = ir.spec.root.dag.tasks["outcome"].inputs.parameters["launched"]
    assert outcome.runtime_value.constant.string_value == "jobs,trainjobs"
    one = OPTIONS.model_copy(update={"pods": PodOptions(train_nodes="1")})
    assert compile_pipeline("saev", one).digest == compile_pipeline("saev", OPTIONS).digest


def test_pods_are_as_the_parameters_say() -> None:
    """In Kubernetes' own words, which KFP's driver passes on."""
    toleration = {"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
    values = {
        "gpu_type": "amd.com/gpu", "gpu_count": "2", "train_gpus": "4", "cpu": "3", "memory": "9Gi",
        "node_selector": {"disk": "ssd", "zone": "b"}, "tolerations": [toleration, {"key": "b"}],
        "storage_secret": "keys", "config_map": "env", "pvc_name": "disk",
        "image_pull_secret": "reg",
    }  # fmt: skip
    parsed = parse(compile_pipeline("saev", PVC.model_copy(update={"pods": PodOptions.of(values)})))
    for label, executor in parsed.executors.items():
        step = executor.container.command[4]
        pod = json_format.MessageToDict(parsed.kubernetes[label])
        constant = lambda name: {"runtimeValue": {"constant": name}}  # noqa: E731
        assert pod["secretAsVolume"][0]["secretNameParameter"] == constant("keys")
        assert pod["configMapAsVolume"][0]["configMapNameParameter"] == constant("env")
        assert pod["imagePullSecret"] == [{"secretNameParameter": constant("reg")}]
        assert pod["pvcMount"][0]["pvcNameParameter"] == constant("disk")
        resources = json_format.MessageToDict(executor.container.resources)
        if step in ("extract", "train", "infer"):
            assert pod["nodeSelector"] == {"labels": {"disk": "ssd", "zone": "b"}}
            assert pod["tolerations"] == [{**toleration, "tolerationSeconds": "60"}, {"key": "b"}]
            assert resources == {
                "resourceCpuLimit": "3",
                "resourceMemoryLimit": "9Gi",
                "accelerator": {
                    "resourceType": "amd.com/gpu",
                    "resourceCount": "4" if step == "train" else "2",
                },
            }
        else:
            assert "nodeSelector" not in pod
            assert "tolerations" not in pod
            memory = "1Gi" if executor.container.image == OPTIONS.cpu_image else "4Gi"
            assert resources == {
                "resourceCpuRequest": "250m", "resourceCpuLimit": "2",
                "resourceMemoryRequest": memory, "resourceMemoryLimit": "8Gi",
            }  # fmt: skip


def test_no_gpus_are_no_request_for_gpus() -> None:
    pods = PodOptions.of({"gpu_count": "0"})
    parsed = parse(compile_pipeline("saev", OPTIONS.model_copy(update={"pods": pods})))
    for executor in parsed.executors.values():
        assert not executor.container.resources.HasField("accelerator")


@pytest.mark.parametrize(
    "values",
    [
        {"storage_secret": "saev", "config_map": "saev"},  # two volumes of one name
        {"config_map": "saev.config"},  # no name of a volume
        {"storage_secret": "s" * 64},
        {"config_map": "tmp"},
    ],
)
def test_what_cannot_be_a_volume_becomes_variables(values: dict[str, str]) -> None:
    pods = PodOptions.of(values)
    parsed = parse(compile_pipeline("saev", OPTIONS.model_copy(update={"pods": pods})))
    for pod in parsed.kubernetes.values():
        assert not [*pod.secret_as_volume, *pod.config_map_as_volume]
        for source, keys in zip(
            (pod.secret_as_env[0], pod.config_map_as_env[0]), (SECRET_ENV, CONFIG_ENV), strict=True
        ):
            assert source.optional
            assert tuple(pair.env_var for pair in source.key_to_env) == keys


def test_a_volume_is_mounted_where_it_is_asked_for(ir: Ir, request: pytest.FixtureRequest) -> None:
    wanted = "pvc" in request.node.callspec.id
    for pod in ir.kubernetes.values():
        assert [m.mount_path for m in pod.pvc_mount] == (["/data"] if wanted else [])


def test_failures_are_tried_again_and_nothing_is_cached(ir: Ir) -> None:
    for _, name, task in ir.tasks():
        assert not task.caching_options.enable_cache
        label = ir.spec.components[task.component_ref.name].executor_label
        if label:
            retry = task.retry_policy
            assert retry.max_retry_count == 3, name
            assert retry.backoff_duration.seconds > 0
            # It counts from the start of the first attempt: the last one has to fit in.
            longest = ir.kubernetes[label].active_deadline_seconds
            assert retry.backoff_max_duration.seconds > 4 * longest, name


def test_loops_have_names_and_limits(ir: Ir) -> None:
    loops = {t.task_info.name: t for _, _, t in ir.tasks() if t.HasField("parameter_iterator")}
    expected = {"extract-all", "train-all", "infer-all", "summarise-all"}
    has_none = ir.compiled.name == "saev-incoming" or ir.compiled.is_launched
    assert set(loops) == (set() if has_none else expected)
    assert all(t.iterator_policy.parallelism_limit == 8 for t in loops.values())


def test_paths_in_the_ui_are_made_of_names(ir: Ir) -> None:
    keys = {key for _, key, _ in ir.tasks()} | set(ir.spec.components)
    assert not [key for key in keys if re.search(r"-\d+$", key)]
    is_firing = ir.compiled.name == "saev-incoming"
    root = {"fire"} if is_firing else {"pipeline", "outcome"}
    assert {key for key, task in ir.spec.root.dag.tasks.items()} == root
    for _, key, task in ir.tasks():
        assert key == task.task_info.name


def test_what_is_repeated_for_each_pod_is_small(ir: Ir) -> None:
    """A description in a component would be stored about ten times for each of its pods."""
    for name, component in ir.spec.components.items():
        raw = json_format.MessageToJson(component.input_definitions)
        assert "description" not in raw, name
    for _, name, task in ir.tasks():
        component = ir.spec.components[task.component_ref.name]
        inputs = set(component.input_definitions.parameters)
        if task.HasField("parameter_iterator"):
            assert inputs == {"job", "slot", "slots"}
        elif component.executor_label and name not in ("fire", "discover", "outcome"):
            words = " ".join(ir.executors[component.executor_label].container.args)
            assert set(PLACEHOLDER.findall(words)) == inputs <= {"job", "slot", "n_parts"}
            assert set(task.inputs.parameters) == inputs


def test_the_outcome_is_recorded_whatever_happens(ir: Ir) -> None:
    if ir.compiled.name == "saev-incoming":  # a firing's claims are for the runs that it starts
        assert set(ir.spec.root.dag.tasks) == {"fire"}
        return
    task = ir.spec.root.dag.tasks["outcome"]
    all_completed = pipeline_spec_pb2.PipelineTaskSpec.TriggerPolicy.ALL_UPSTREAM_TASKS_COMPLETED
    assert task.trigger_policy.strategy == all_completed
    assert task.inputs.parameters["status"].HasField("task_final_status")


def test_everything_waits_for_what_it_reads(ir: Ir) -> None:
    """Loops and steps that launch have no outputs, so what follows them must name them."""
    found = 0
    suffix = "" if ir.compiled.is_launched else "-all"
    for dag in ir.dags().values():
        tasks = dag.dag.tasks
        loops = {t.task_info.name: key for key, t in tasks.items() if t.task_info.name}
        for after, before in (
            ("publish", f"extract{suffix}"),
            (f"infer{suffix}", f"train{suffix}"),
            (f"summarise{suffix}", f"infer{suffix}"),
            ("report", f"summarise{suffix}"),
            (f"extract{suffix}", "plan"),
            (f"train{suffix}", "publish"),
            (f"infer{suffix}", "publish"),
            (f"summarise{suffix}", "publish"),
        ):
            if before in loops:
                assert loops[before] in tasks[loops[after]].dependent_tasks
                found += 1
    assert found == (0 if ir.compiled.name == "saev-incoming" else 8)


def test_parameters_are_documented(ir: Ir) -> None:
    for name, parameter in ir.compiled.parameters.items():
        assert len(parameter.description) > 10, name
    required = {name for name, p in ir.compiled.parameters.items() if p.required}
    assert required - {"dataset"} == {"root", "config"}


def test_equal_options_give_equal_versions() -> None:
    first, again = (compile_anew("saev", OPTIONS) for _ in range(2))
    assert first.digest == again.digest
    other = OPTIONS.model_copy(update={"image": "example.org/saev:2"})
    assert compile_pipeline("saev", other).digest != first.digest


@pytest.mark.slow
def test_every_process_compiles_the_same() -> None:
    """Python hashes texts anew in every process, and kfp prints a dict in that order."""
    script = (
        "from pipelines.definition import compile_pipeline as c; "
        "from pipelines.options import CompileOptions as o; import sys; "
        "names = 'saev', 'saev-incoming'; "
        "sys.stdout.write(''.join(c(n, o(image='a', cpu_image='b')).text for n in names))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")  # which give two orders
    ]
    first, second = (process.communicate()[0] for process in processes)
    assert first == second
    assert "PIPELINE DEFINITION" not in first
    assert next(yaml.safe_load_all(first.split("---")[0]))["pipelineInfo"]["name"] == "saev"


def test_no_retries_is_no_retry_policy() -> None:
    text = compile_pipeline("saev", OPTIONS.model_copy(update={"retries": 0})).text
    assert "retryPolicy" not in text


def test_the_supervisor_knows_how_often_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual number is not said, as Kubernetes would store it ten times for each pod."""
    for retries in (OPTIONS.retries, 0, 7):
        parsed = parse(compile_pipeline("saev", OPTIONS.model_copy(update={"retries": retries})))
        for executor in parsed.executors.values():
            monkeypatch.delenv("SAEV_RETRIES", raising=False)
            for variable in executor.container.env:
                monkeypatch.setenv(variable.name, variable.value)
            assert Policy.from_environment().retries == retries


def test_timeouts_of_unknown_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="positive hours of steps among"):
        CompileOptions(image="a", cpu_image="b", timeout_hours={"extrakt": 2})
    assert (
        options.CompileOptions(
            image="a", cpu_image="b", timeout_hours={"train": 2}
        ).timeout_seconds("train")
        == 7200
    )
