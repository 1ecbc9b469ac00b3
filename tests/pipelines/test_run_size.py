"""How large a run may become: figures of a real backend, and what is refused."""

import functools
import json
import typing as tp

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines import budget, parameters
from pipelines.definition import Compiled, compile_pipeline
from pipelines.options import CompileOptions, PipelineName
from saev.errors import ConfigError


@functools.cache
def compiled(name: PipelineName) -> Compiled:
    """A pipeline; compiling takes seconds."""
    options = CompileOptions(image="example.org/saev:1", cpu_image="example.org/saev-cpu:1")
    return compile_pipeline(name, options)


@pytest.mark.parametrize(
    ("n_parts", "measured"),
    # A run of two slots a step on KFP 2.17.0, its iterations cloned with ids of their own, the
    # nodes compressed and encoded as Argo does.
    [(2, 165_997), (8, 251_061), (16, 363_937), (25, 490_777), (50, 843_513)],
)
def test_sizes_are_those_of_a_real_backend(n_parts: int, measured: int) -> None:
    assert budget.n_bytes("saev", {"n_parts": n_parts}) == pytest.approx(measured, rel=0.05)


def test_datasets_count_as_they_do_on_a_real_backend() -> None:
    """A run of two datasets, one slot a step; Argo itself compressed its nodes."""
    values = {"n_parts": 1, "max_datasets": 2}
    assert budget.n_bytes("saev-incoming", values) == pytest.approx(200_012, rel=0.06)


@pytest.mark.parametrize("name", ["saev", "saev-incoming"])
def test_the_loops_that_are_counted_are_those_of_the_pipeline(name: PipelineName) -> None:
    raw = next(yaml.safe_load_all(compiled(name).text))
    spec = json_format.ParseDict(raw, pipeline_spec_pb2.PipelineSpec())

    def count(dag: tp.Any) -> int:
        """Iterations of one graph with 2 slots and 3 datasets."""
        total = 0
        for key, task in dag.tasks.items():
            inside = spec.components[task.component_ref.name]
            times = 3 if key == "datasets" else 2 if task.HasField("parameter_iterator") else 1
            below = count(inside.dag) if inside.HasField("dag") else 0
            total += times * (below or task.HasField("parameter_iterator"))
        return total

    values = {"n_parts": 2, "max_datasets": 3}
    datasets = 3 * 6 if name == "saev-incoming" else 0
    assert budget.n_iterations(name, values) == count(spec.root.dag) + datasets


@pytest.mark.parametrize("name", ["saev", "saev-incoming"])
def test_what_the_pipelines_have_by_default_fits(name: PipelineName) -> None:
    found = compiled(name).parameters
    budget.check(name, {key: p.default for key, p in found.items() if not p.required})


def complete(name: PipelineName, **values: tp.Any) -> dict[str, tp.Any]:
    required = {"root": "s3://b/saev", "config": {}, "dataset": "s3://b/x"}
    return parameters.complete(compiled(name), {**required, **values})


def test_no_number_of_parts_and_saes_makes_a_run_larger() -> None:
    """Only pods count, so the largest job of the issue (64 parts, 200 SAEs) is any other."""
    assert "max_datasets" not in complete("saev", n_parts=41)
    with pytest.raises(ConfigError, match=r"n_parts = 64, .* 256 iterations.* n_parts = 41\."):
        complete("saev", n_parts=64)


def test_a_schedule_takes_as_many_datasets_as_fit() -> None:
    assert complete("saev-incoming")["max_datasets"] == 4
    assert complete("saev-incoming", n_parts=16)["max_datasets"] == 2
    assert complete("saev-incoming", n_parts=1)["max_datasets"] == 10
    assert complete("saev-incoming", n_parts=2, max_datasets=11)["max_datasets"] == 11
    with pytest.raises(ConfigError, match="What fits is n_parts = 2 or max_datasets = 4"):
        complete("saev-incoming", n_parts=8, max_datasets=11)


def test_a_long_config_leaves_room_for_fewer() -> None:
    config = {"sweep": ["x" * 90_000]}
    most = max(n for n in range(1, 42) if _fits(n, config))
    bytes_each = 4 * 3_700
    assert 41 - most == pytest.approx(4 * len(json.dumps(config)) / bytes_each, abs=1.5)


def _fits(n_parts: int, config: dict[str, tp.Any]) -> bool:
    try:
        complete("saev", n_parts=n_parts, config=config)
    except ConfigError:
        return False
    return True
