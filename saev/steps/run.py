"""Runs the steps. Modules that need torch are imported by the steps that do."""

import contextlib
import logging
import math
import typing as tp

from saev import storage
from saev.config import steps as cfgs
from saev.config.stages import Stages
from saev.errors import ConfigError, SaevError, StorageError
from saev.inference.results import Results
from saev.progress import Progress
from saev.steps import advice, check, claims, discover, outputs
from saev.steps.discover import Dataset
from saev.visuals import overview

logger = logging.getLogger(__name__)

Item = dict[str, tp.Any]


def run(cfg: tp.Any, progress: Progress | None = None) -> list[str]:
    """Do one step.

    Args:
        cfg: a config of `saev.config.steps`.
        progress: where bars go.

    Returns:
        URLs of what it made or found.

    Raises:
        SaevError: as the stage's functions do. What was finished is kept.
    """
    progress = progress or Progress(quiet=True)
    if isinstance(cfg, cfgs.DiscoverStep):
        return _discover(cfg)
    if isinstance(cfg, cfgs.OutcomeStep):
        return _outcome(cfg)
    if isinstance(cfg, cfgs.CheckStep):
        return check.run(cfg.root, cfg.dataset)
    dataset = Dataset.from_dict(cfgs.parse_json(cfg.dataset, "--dataset"))
    work = _WORK[type(cfg)]
    with contextlib.ExitStack() as stack:
        if cfg.owner:
            place = discover.claims_of(cfg.root, dataset)
            holding = stack.enter_context(claims.held(place, cfg.owner))
            progress.safe_point, progress.may_publish = holding.check, holding.look
        try:
            return work(cfg, dataset, progress)
        except SaevError as err:
            advice.for_config(err, *_TABLES.get(type(cfg), ()))
            raise


def _stages(cfg: cfgs.DatasetStep, dataset: Dataset, device: str = "") -> Stages:
    """The stages' configs, recording on another device if one is given."""
    stages = cfg.stages(dataset.url, dataset.version)
    if not device:
        return stages
    return stages._replace(shards=stages.shards.model_copy(update={"device": device}))


def _parts(n: int, name: str = "", **more: str) -> list[Item]:
    """One item per part."""
    return [{"name": f"{name}part {i} of {n}", **more, "part": f"{i}/{n}"} for i in range(1, n + 1)]


# --- Which datasets ------------------------------------------------------------------------------


def _discover(cfg: cfgs.DiscoverStep) -> list[str]:
    storage.check_writable(cfg.root)
    if cfg.mode == "one":
        found = [discover.one(cfg.root, cfg.dataset, cfg.file, cfg.owner, cfg.claim_hours)]
    else:
        if not cfg.dataset:
            raise ConfigError("--mode incoming needs --dataset, the folder of the datasets.")
        found = discover.incoming(
            cfg.root,
            cfg.dataset,
            cfg.file,
            cfg.owner,
            marker=cfg.marker,
            settle_minutes=cfg.settle_minutes,
            hours=cfg.claim_hours,
            limit=cfg.max_datasets,
        )
    logger.info("%d dataset%s to process.", len(found), "" if len(found) == 1 else "s")
    raw = [dataset._asdict() for dataset in found]
    outputs.write_parameter(cfg.to_first, raw[0] if raw else {})
    outputs.write_items(cfg.to_datasets, raw)
    return [dataset.url or dataset.name for dataset in found]


def _outcome(cfg: cfgs.OutcomeStep) -> list[str]:
    status = cfgs.parse_json(cfg.status, "--status")
    record = discover.end(cfg.root, cfg.owner, status)
    logger.info(
        "Done: %s. Not done: %s.",
        ", ".join(record["done"]) or "nothing",
        ", ".join(record["failed"]) or "nothing",
    )
    return []


# --- Activations ---------------------------------------------------------------------------------


def _plan_shards(cfg: cfgs.PlanShardsStep, dataset: Dataset, progress: Progress) -> list[str]:
    import saev.shards.extract as extract

    del progress
    # Shapes and checksums do not depend on the device, and a planning pod has no GPU.
    recording = extract.Recording(_stages(cfg, dataset, device="cpu").shards)
    items: list[Item] = []
    if not recording.published:
        recording.prepare()
        items = _parts(min(cfg.n_parts, recording.metadata.n_shards))
    logger.info(
        "%s: %d images in %d shards, %d parts to record.",
        recording.url, recording.metadata.n_examples, recording.metadata.n_shards, len(items),
    )  # fmt: skip
    outputs.write_parameter(cfg.to_shards, recording.url)
    outputs.write_items(cfg.to_items, items)
    return [recording.url]


def _extract(cfg: cfgs.ExtractStep, dataset: Dataset, progress: Progress) -> list[str]:
    import saev.shards.extract as extract

    item = _item(cfg.item, "part")
    shards_cfg = _stages(cfg, dataset).shards.model_copy(update={"part": item["part"]})
    recording = extract.Recording(shards_cfg)
    _check_same(cfg.shards, recording.url, dataset)
    return [recording.run(progress)]


def _publish(cfg: cfgs.PublishStep, dataset: Dataset, progress: Progress) -> list[str]:
    import saev.shards.extract as extract
    from saev.shards import Shards

    recording = extract.Recording(_stages(cfg, dataset, device="cpu").shards)
    _check_same(cfg.shards, recording.url, dataset)
    if not recording.published:  # what is complete was checked when it was published
        discover.check_unchanged(dataset)
    url = recording.finish(progress)
    shards = Shards.open(url)
    metadata = shards.metadata
    figures = {
        "n_examples": shards.n_examples,
        "n_tokens": shards.n_examples * shards.tokens_per_example,
        "n_layers": len(metadata.layers),
        "d_model": metadata.d_model,
        "n_shards": len(shards.infos),
        "gigabytes": sum(storage.size(storage.join(url, i.name)) for i in shards.infos) / 1e9,
    }
    outputs.write_metrics(cfg.executor_input, figures)
    outputs.write_parameter(cfg.to_shards, url)
    return [url]


def _check_same(planned: str, found: str, dataset: Dataset) -> None:
    if storage.normalize(planned) != storage.normalize(found):
        raise ConfigError(
            f"The activations of {dataset.url or dataset.name} would go to {found}, but "
            f"{planned} was planned: the dataset, the weights or the version of saev changed in "
            "between. Submit it again."
        )


# --- SAEs ----------------------------------------------------------------------------------------


def _plan_training(cfg: cfgs.PlanTrainingStep, dataset: Dataset, progress: Progress) -> list[str]:
    from saev.train.members import Group, unpublished

    del progress
    groups = [Group.from_item(item) for item in _groups(cfg, _stages(cfg, dataset))]
    items: list[Item] = []
    missing = {m.run_id for m in unpublished([m for group in groups for m in group.members])}
    for i, group in enumerate(groups, start=1):
        n_missing = sum(member.run_id in missing for member in group.members)
        if n_missing:
            name = f"group {i} of {len(groups)}: {n_missing} of {len(group.members)} SAEs"
            runs = [member.run_id for member in group.members]
            items.append({"name": name, "group": group.group_id, "runs": runs})
    n_saes = sum(len(group.members) for group in groups)
    logger.info("%d SAEs in %d groups, %d groups to train.", n_saes, len(groups), len(items))
    outputs.write_items(cfg.to_items, items)
    return [member.url for group in groups for member in group.members]


def _train(cfg: cfgs.TrainStep, dataset: Dataset, progress: Progress) -> list[str]:
    from saev import train

    stages, wanted = _stages(cfg, dataset), _item(cfg.item, "group")
    groups = _groups(cfg, stages)
    members = {member["run_id"]: member for group in groups for member in group["members"]}
    # Items of version 0.1.0 do not name their runs.
    named = {group["group"]: [m["run_id"] for m in group["members"]] for group in groups}
    runs = wanted.get("runs") or named.get(wanted["group"])
    if not runs or not members.keys() >= set(runs):
        raise ConfigError(
            f"There is no group {wanted['group']}: the config or the version of saev changed since "
            "it was planned. Submit the dataset again."
        )
    item = {"group": wanted["group"], "members": [members[run_id] for run_id in runs]}
    return train.work(stages.training(cfg.shards), item, progress)


def _groups(cfg: cfgs.ShardsStep, stages: Stages) -> list[Item]:
    from saev import train

    return train.plan(stages.training(cfg.shards), table=stages.sweep)


# --- What they learned ---------------------------------------------------------------------------


def _plan_inference(cfg: cfgs.PlanInferenceStep, dataset: Dataset, progress: Progress) -> list[str]:
    from saev import inference, train

    del progress
    stages = _stages(cfg, dataset)
    runs = train.finish(stages.training(cfg.shards), table=stages.sweep)
    items: list[Item] = []
    for run_url in runs:
        measuring = stages.measuring(run_url, cfg.shards)
        if inference.find(measuring):
            continue
        n_parts = min(cfg.n_parts, len(inference.plan(measuring)))
        items += _parts(n_parts, f"SAE {storage.name(run_url)}, ", run=run_url)
    logger.info("%d SAEs, %d parts to measure.", len(runs), len(items))
    outputs.write_parameter(cfg.to_runs, runs)
    outputs.write_items(cfg.to_items, items)
    return runs


def _infer(cfg: cfgs.InferStep, dataset: Dataset, progress: Progress) -> list[str]:
    from saev import inference

    item = _item(cfg.item, "run", "part")
    measuring = _stages(cfg, dataset).measuring(item["run"], cfg.shards)
    return [inference.run(measuring.model_copy(update={"part": item["part"]}), progress=progress)]


def _summarise(cfg: cfgs.SummariseStep, dataset: Dataset, progress: Progress) -> list[str]:
    from saev import inference, visuals

    stages = _stages(cfg, dataset)
    measuring = stages.measuring(cfg.run, cfg.shards).model_copy(update={"device": "cpu"})
    measured = inference.finish(measuring, progress)
    showing = stages.showing(cfg.run, cfg.shards, measured)
    index = visuals.run(showing, progress=progress)
    outputs.write_metrics(cfg.executor_input, _figures(Results.open(measured).metrics))
    if cfg.to_page:
        outputs.write_page(cfg.to_page, visuals.book(showing))
    return [measured, index]


_SHOWN = (
    "normalized_mse", "explained_variance", "l0", "l1", "n_dead", "n_almost_dead", "n_dense",
    "d_sae", "n_tokens", "mean_average_precision", "purity_at_16", "coverage_at_0.3", "probe_r",
)  # fmt: skip
"""Keys of metrics.json; the last four only where there are labels."""


def _figures(metrics: tp.Mapping[str, tp.Any]) -> dict[str, float]:
    return {k: metrics[k] for k in _SHOWN if isinstance(metrics.get(k), int | float)}


def _report(cfg: cfgs.ReportStep, dataset: Dataset, progress: Progress) -> list[str]:
    runs = cfgs.parse_json(cfg.runs, "--runs")
    shards = storage.name(cfg.shards)
    sections = [s for s in overview.collect(cfg.root, runs) if s.shards == shards]
    rows = [row for section in sections for row in section.rows]
    missing = set(runs) - {row.run for row in rows}
    if missing:
        raise StorageError(
            f"{len(missing)} of {len(runs)} SAEs have no results on {shards}, such as "
            f"{min(missing)}. Retry the run: what is done is skipped."
        )
    progress.publish_point()
    url = overview.write(cfg.root)
    outputs.write_page(cfg.to_page, overview.render(sections))
    best = min(overview.nmse_of(row.metrics) for row in rows)
    figures = {"n_saes": len(rows)} | ({"best_normalized_mse": best} if math.isfinite(best) else {})
    outputs.write_metrics(cfg.executor_input, figures)
    details = {"shards": cfg.shards, "runs": runs, "page": url}
    if cfg.owner:
        progress.publish_point()
        discover.mark_processed(cfg.root, dataset, cfg.owner, details)
    return [url]


def _item(text: str, *keys: str) -> Item:
    item = cfgs.parse_json(text, "--item")
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in keys):
        raise ConfigError(f"--item is {text}; expected an object with {', '.join(keys)}.")
    logger.info("%s", item.get("name", ""))
    return item


_WORK: dict[type, tp.Callable[[tp.Any, Dataset, Progress], list[str]]] = {
    cfgs.PlanShardsStep: _plan_shards,
    cfgs.ExtractStep: _extract,
    cfgs.PublishStep: _publish,
    cfgs.PlanTrainingStep: _plan_training,
    cfgs.TrainStep: _train,
    cfgs.PlanInferenceStep: _plan_inference,
    cfgs.InferStep: _infer,
    cfgs.SummariseStep: _summarise,
    cfgs.ReportStep: _report,
}

_TABLES: dict[type, tuple[str, ...]] = {
    cfgs.PlanShardsStep: ("shards",),
    cfgs.ExtractStep: ("shards",),
    cfgs.PublishStep: ("shards",),
    cfgs.PlanTrainingStep: ("train",),
    cfgs.TrainStep: ("train",),
    cfgs.PlanInferenceStep: ("inference", "train"),
    cfgs.InferStep: ("inference",),
    cfgs.SummariseStep: ("inference", "visuals"),
}
"""The tables of the config that a step goes by."""
