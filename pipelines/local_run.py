"""Runs the whole pipeline on this machine, with each step in its own container.

kfp.local goes through the pipeline. Some of its functions are replaced here, for three reasons. Its
container runner can report a failed container as successful. Its loops confuse the outputs of steps
of the same graph. Its reports replace `print` for a while. When two steps run at once, replacements
stay and form a longer and longer chain, so that printing a line takes for ever after some loops.
"""

import contextlib
import io
import typing as tp
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import docker.types
from kfp import local
from kfp.compiler import pipeline_spec_builder
from kfp.local import docker_task_handler, logging_utils
from kfp.local import status as kfp_status
from kfp.local.orchestrator import enhanced_dag_orchestrator

from pipelines import parameters, prepare
from pipelines.arguments import RunLocal
from pipelines.definition import build, compile_pipeline
from pipelines.errors import RunFailedError
from pipelines.options import CompileOptions, PipelineName
from pipelines.runners import Containers, Processes, Runner
from saev import storage
from saev.config.run import RunFile
from saev.config.stages import images_of, resolve_stages
from saev.errors import ConfigError

_MOST_DATASETS = 10
"""Most datasets of one call, if max_datasets is not given."""


def run(cfg: RunLocal) -> str:
    """Run the pipeline.

    Returns:
        URL of the root's index.html.

    Raises:
        ConfigError: config, dataset or images are wrong. Nothing was started.
        RunFailedError: a step failed. Finished work is kept, and the same call continues.
        KeyboardInterrupt: raised after the containers were stopped.
    """
    file = RunFile.portable(cfg.config)
    dataset = storage.normalize(cfg.dataset) if cfg.dataset else ""
    root = storage.normalize(cfg.root)
    source = storage.normalize(cfg.config)
    if dataset and storage.local_path(dataset) and not Path(dataset).exists():
        raise ConfigError(f"The dataset {dataset} does not exist. Check the path.")
    resolve_stages(file, root, images_of(file, dataset), source)
    options = CompileOptions(image=cfg.image, cpu_image=cfg.cpu_image, retries=0)
    values: dict[str, tp.Any] = {
        "dataset": dataset,
        "root": root,
        "config": prepare.plain(file, source),
        "n_parts": cfg.n_parts,
    }
    firing, one = (compile_pipeline(name, options) for name in ("saev-incoming", "saev"))
    pipeline = one if cfg.pipeline == "saev" else prepare.combined(firing, one)
    pairs = parameters.parse(cfg.param)
    values |= parameters.check(pipeline, pairs, "--param")
    parameters.check_pods(pairs, "--param")  # pod parameters are checked, but have no effect here
    outputs = Path(cfg.outputs).absolute()
    outputs.mkdir(parents=True, exist_ok=True)
    runner = _runner(cfg, _mounts(file, dataset, root))
    runner.check()
    # Steps write to standard error. kfp's own reports on standard output are dropped.
    with runner.stopped_by_signals(), contextlib.redirect_stdout(io.StringIO()):
        if cfg.pipeline == "saev":
            _walk("saev", options, values, runner, outputs)
        else:
            of_firing, of_run = prepare.split_parameters(firing, one, values)
            of_run |= {k: values[k] for k in ("root", "config", "claim_hours") if k in values}
            _fire(options, of_firing, of_run, runner, outputs)
    return storage.join(root, "index.html")


def _fire(
    options: CompileOptions,
    of_firing: dict[str, tp.Any],
    of_run: dict[str, tp.Any],
    runner: Runner,
    outputs: Path,
) -> None:
    """Do the work of a firing and of Kubeflow. Each dataset is claimed just before its run."""
    for _ in range(of_firing.get("max_datasets", _MOST_DATASETS)):
        one_more = {**of_firing, "max_datasets": 1}
        started = _walk("saev-incoming", options, one_more, runner, outputs)
        if not started:
            return
        for run in started:
            own = {key: run[key] for key in ("dataset", "claim")}
            _walk("saev", options, {**of_run, **own}, runner, outputs)


def _runner(cfg: RunLocal, mounts: list[docker.types.Mount]) -> Runner:
    if cfg.runner == "process":
        return Processes()
    return Containers(
        uuid.uuid4().hex[:12],
        (cfg.image, cfg.cpu_image),
        mounts,
        network=cfg.network,
        user=cfg.user,
        gpus=cfg.gpus,
    )


def _walk(
    name: PipelineName,
    options: CompileOptions,
    arguments: dict[str, tp.Any],
    runner: Runner,
    outputs: Path,
) -> tp.Any:
    """Run a pipeline. Returns its output, None if it has none."""

    def run_task(handler: docker_task_handler.DockerTaskHandler) -> kfp_status.Status:
        code = runner.run(handler.image, handler.full_command, handler.pipeline_root)
        return kfp_status.Status.SUCCESS if code == 0 else kfp_status.Status.FAILURE

    replaced: tuple[tuple[tp.Any, str, tp.Any], ...] = (
        (docker_task_handler.DockerTaskHandler, "run", run_task),
        (enhanced_dag_orchestrator, "_run_parallel_for_task", _run_loop),
        (logging_utils, "indented_print", contextlib.nullcontext),
        (logging_utils, "local_logger_context", contextlib.nullcontext),
    )
    originals = [getattr(module, attribute) for module, attribute, _ in replaced]
    for module, attribute, ours in replaced:
        setattr(module, attribute, ours)
    local.init(runner=local.DockerRunner(), pipeline_root=str(outputs))
    try:
        # kfp warns about settings that only have an effect on a cluster.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = build(name, options)(**arguments)
    except RuntimeError as err:
        if runner.interrupted:
            raise KeyboardInterrupt from err
        first = runner.failures[0] if runner.failures else str(err)
        raise RunFailedError(
            f"{first} Finished work is kept: the same command continues from there."
        ) from err
    finally:
        for (module, attribute, _), original in zip(replaced, originals, strict=True):
            setattr(module, attribute, original)
    if runner.interrupted:
        raise KeyboardInterrupt
    return next(iter(done.outputs.values()), None)


# --- Mounts --------------------------------------------------------------------------------------


def _mounts(file: RunFile, dataset: str, root: str) -> list[docker.types.Mount]:
    """Mounts of local folders at the same paths, so that results contain this machine's paths."""
    mounts: dict[str, docker.types.Mount] = {}
    place = storage.local_path(root)
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
        mounts[str(place)] = docker.types.Mount(str(place), str(place), type="bind")
    for text in (dataset, *_texts(file.to_dict())):
        path = Path(text.rpartition("@")[2])
        if path.is_absolute() and path.exists() and str(path) not in mounts:
            mounts[str(path)] = docker.types.Mount(
                str(path), str(path), type="bind", read_only=True
            )
    return list(mounts.values())


def _texts(obj: tp.Any) -> Iterator[str]:
    if isinstance(obj, dict):
        for value in obj.values():
            yield from _texts(value)
    elif isinstance(obj, list):
        for value in obj:
            yield from _texts(value)
    elif isinstance(obj, str):
        yield obj


# --- Loops ---------------------------------------------------------------------------------------

_kfp_run_loop = enhanced_dag_orchestrator._run_parallel_for_task


def _run_loop(*, task_spec: tp.Any, io_store: tp.Any, **more: tp.Any) -> bool:
    """Run a loop with kfp's function, after the outputs of other steps are put in as constants.

    kfp's function searches for the loop's list only among the inputs of the graph, and uses every
    other output of a step as the loop's item.
    """
    resolved = type(task_spec)()
    resolved.CopyFrom(task_spec)
    for name, spec in resolved.inputs.parameters.items():
        if spec.HasField("task_output_parameter"):
            output = spec.task_output_parameter
            value = io_store.get_task_output(output.producer_task, output.output_parameter_key)
            spec.runtime_value.constant.CopyFrom(pipeline_spec_builder.to_protobuf_value(value))
            if name == resolved.parameter_iterator.items.input_parameter:
                io_store.put_parent_input(name, value)
    return bool(_kfp_run_loop(task_spec=resolved, io_store=io_store, **more))
