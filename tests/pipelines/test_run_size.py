"""How large a run may become: figures of a real backend, and what is refused."""

import json
import typing as tp
from pathlib import Path

import pytest
import yaml
from client import Client
from compiling import compile_pipeline
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from kfp_server import KfpServer

from pipelines import budget, parameters
from pipelines.definition import Compiled
from pipelines.options import CompileOptions, PipelineName
from saev.errors import ConfigError

SUBMIT = ("submit", "--dataset", "s3://bucket/pets", "--config", "config.toml", "--no-check")


CONFIG: dict[str, tp.Any] = {
    "inference": {},
    "shards": {
        "ckpt": "test_vit/random", "family": "timm", "image_size": 64, "layers": [-1],
        "max_tokens_per_shard": 204,
    },
    "train": {
        "max_parallel": 1, "n_train": 600, "sae": {"d_sae": 64},
        "train_data": {"val_fraction": 0.25},
    },
    "visuals": {"n_latents": 1},
}  # fmt: skip


def compiled(name: PipelineName, image: str = "saev:small1") -> Compiled:
    return compile_pipeline(name, CompileOptions(image=image, cpu_image=image))


def complete(**values: tp.Any) -> dict[str, tp.Any]:
    """What `make submit` would send."""
    required = {"root": "s3://b/saev", "config": {}, "dataset": "s3://b/x"}
    return parameters.complete(compiled("saev"), {**required, **values})


# Runs on KFP 2.17.0 (stock manifests, Argo 4.0.5) in which every loop had all of its slots: as many
# parts and SAEs in groups of their own. JSON of the whole Workflow at the end, when it was largest.
@pytest.mark.parametrize(("n_parts", "measured"), [(2, 543_545), (4, 795_172)])
def test_sizes_are_those_of_a_real_backend(n_parts: int, measured: int) -> None:
    config = {**CONFIG, "sweep": {"sae": {"activation": {"top_k": list(range(2, n_parts + 2))}}}}
    root = "s3://saev/small/saev-conformance-31aa26/out"
    values = {"n_parts": n_parts, "root": root, "config": config}
    assert budget.n_bytes(compiled("saev"), values) == pytest.approx(measured, rel=0.02)


def test_the_pods_that_are_counted_are_those_of_the_pipeline() -> None:
    raw = next(yaml.load_all(compiled("saev").text, yaml.CSafeLoader))
    spec = json_format.ParseDict(raw, pipeline_spec_pb2.PipelineSpec())

    def count(dag: tp.Any) -> int:
        """Pods of one graph with 6 slots in each loop, and 3 in the last."""
        total = 0
        for name, task in dag.tasks.items():
            inside = spec.components[task.component_ref.name]
            slots = 3 if name == "summarise-all" else 6
            times = slots if task.HasField("parameter_iterator") else 1
            total += times * (count(inside.dag) if inside.HasField("dag") else 1)
        return total

    def n_bytes(root: str) -> int:
        return budget.n_bytes(compiled("saev"), {"n_parts": 6, "root": root})

    assert n_bytes("s3://b/12345678") - n_bytes("s3://b/1") == 7 * 12 * count(spec.root.dag)


def test_a_long_name_of_the_image_counts() -> None:
    """It is stored eight times for each pod."""
    short, long = (compiled("saev", image) for image in ("saev:1", f"registry.test/{'x' * 86}"))
    sizes = [budget.n_bytes(pipeline, {"n_parts": 1}) for pipeline in (short, long)]
    assert sizes[1] - sizes[0] == (100 - 6) * 8 * (5 + 3 + 1)


def test_what_a_pipeline_has_by_default_fits() -> None:
    assert "n_parts" not in complete()


def test_no_number_of_parts_and_saes_makes_a_run_larger() -> None:
    """Only pods count, so the largest job of the issue (64 parts, 200 SAEs) is any other."""
    most = budget.most_parts(compiled("saev"), {"root": "s3://b/saev", "config": {}})
    with pytest.raises(ConfigError, match=rf"With n_parts = 64, .* n_parts = {most} fits"):
        complete(n_parts=64)
    assert complete(n_parts=most)["n_parts"] == most


def test_a_long_config_leaves_room_for_fewer() -> None:
    def most(config: tp.Any) -> int:
        return budget.most_parts(compiled("saev"), {"root": "s3://b/saev", "config": config})

    sizes = [most({"sweep": ["x" * 1000] * n}) for n in (0, 10, 20, 30, 60)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] == 0
    with pytest.raises(ConfigError, match="Split the sweep"):
        complete(config={"sweep": ["x" * 90_000]})
    values = [{"n_parts": 1, "config": config} for config in ({}, {"a": "b" * 1000})]
    empty, full = (budget.n_bytes(compiled("saev"), v) for v in values)
    once = len(json.dumps({"a": "b" * 1000}))
    assert 15 * (once - 2) < full - empty < 15 * once + 12 * 4 * 4


def test_a_setting_of_an_earlier_version_goes_on(
    client: Client, kfp: KfpServer, home: Path
) -> None:
    """n_parts up to 41 were taken. A cluster.toml with such a number is no mistake of today."""
    home.joinpath("cluster.toml").write_text("[parameters]\nn_parts = 16\n")
    said = client.ok(*SUBMIT).err
    sent = kfp.runs[0]["runtime_config"]["parameters"]["n_parts"]
    assert f"n_parts is {sent} instead of 16: with more pods, a run becomes too large" in said
    assert 4 <= sent < 16
    assert "instead of" not in client.ok(*SUBMIT, "--param", "n_parts=2").err
    assert kfp.runs[1]["runtime_config"]["parameters"]["n_parts"] == 2
    refused = client.fails(*SUBMIT, "--param", "n_parts=16")
    assert f"n_parts = {sent} fits" in refused
    assert 'For more pods, set launch = "job" in cluster.toml' in refused
    assert len(kfp.runs) == 2


def test_pods_of_a_job_are_no_part_of_the_object(
    client: Client, kfp: KfpServer, home: Path
) -> None:
    text = '[parameters]\nn_parts = 64\n[compile]\nlaunch = "job"\n'
    home.joinpath("cluster.toml").write_text(text)
    assert "instead of" not in client.ok(*SUBMIT).err
    client.ok(*SUBMIT, "--param", "n_parts=200")
    sent = [run["runtime_config"]["parameters"]["n_parts"] for run in kfp.runs]
    assert sent == [64, 200]
