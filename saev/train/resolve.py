"""Resolves the user's config: decides every default, names the runs, and groups the SAEs.

This reads only metadata, so it is cheap enough for a pipeline's planning step.
"""

import logging
import math
import typing as tp

from saev import storage
from saev.config import (
    Activation,
    BatchTopK,
    LoaderConfig,
    Objective,
    TopK,
    TrainConfig,
    ValDataConfig,
)
from saev.config.sweeps import UNSWEPT, RequestedSae, requested_saes
from saev.config.train import MOST_TOKENS, default_batch_size, default_n_train
from saev.errors import ConfigError
from saev.once import say_once
from saev.train import earlier
from saev.train.idle import Sized, warn_of_idle_axes
from saev.train.members import Group, Member, digest
from saev.train.sides import Places, check_model, decide, other_model

logger = logging.getLogger(__name__)

NUMERICS = {"top-k": 1, "relu": 1, "batch-top-k": 2, "jump-relu": 2}
"""Version of the training algorithm, by kind of activation. It is a part of every run id, so that a
run of an older algorithm is not taken for a run of the current one."""

_UNHASHED_DATA = ("n_threads", "verify")
"""Keys that decide how data is read, but not which data."""


def groups(
    cfg: TrainConfig,
    explicit: tp.Collection[str] = (),
    table: tp.Mapping[str, tp.Any] | None = None,
) -> list[Group]:
    """Every SAE that ``cfg`` and its sweep ask for, grouped by the batches they can share.

    An SAE that an earlier version trained, or began to train, under another name keeps that name.

    Args:
        cfg: what the command line said.
        explicit, table: see :func:`saev.config.sweeps.requested_saes`.

    Raises:
        ConfigError: a combination is wrong or does not fit the shards.
        StorageError: a shards folder or the runs' root cannot be read.
    """
    places = Places()
    wanted: dict[str, earlier.Wanted] = {}
    for one in requested_saes(cfg, explicit, table):
        config = resolve_one(one.config, places)
        if one.position is not None:
            config = config.model_copy(update={"seed": derived_seed(config)})
        member = Member(run_id(config, places), config)
        if member.run_id in wanted:  # such as d_sae = 1536 and exp_factor = 4, for d_model = 384
            logger.warning("Run %s is asked for twice; it is trained once.", member.run_id)
        found = wanted.setdefault(member.run_id, earlier.Wanted(member, []))
        found.older.extend(_older(one, member, places))
    configs = [one.member.config for one in wanted.values()]
    warn_of_idle_axes([Sized(c, _hashed(c), places.n_tokens(c.train_data)) for c in configs])
    by_data: dict[str, list[earlier.Wanted]] = {}
    for found in wanted.values():
        by_data.setdefault(_data_key(found.member.config), []).append(found)
    return earlier.choose(list(by_data.values()), cfg.max_parallel)


def _older(one: RequestedSae, member: Member, places: Places) -> tp.Iterator[Member]:
    """The same SAE under the name that version 0.1.0 gave it, if that is another one."""
    seed = one.config.seed + (one.position or 0)
    try:
        config = resolve_one(one.config.model_copy(update={"seed": seed}), places, before=True)
    except ConfigError:  # version 0.1.0 refused such a config
        return
    # It read --val-data.shards with a memory limit of their own, 2 GiB by default.
    val_buffer_mb = LoaderConfig().buffer_mb if one.config.val_data.shards else None
    name = run_id(config, places, val_buffer_mb=val_buffer_mb)
    if name != member.run_id:
        yield Member(name, config, rules=1)


def derived_seed(config: TrainConfig) -> int:
    """The seed of an SAE in a sweep: a hash of its config, which contains the seed that was given.

    It depends neither on the other SAEs of the sweep nor on the place of the data.
    """
    raw = _hashed(config)
    for side in ("train_data", "val_data"):
        raw.get(side, {}).pop("shards", None)
    return int(storage.content_hash(raw, 8), 16) >> 1


def resolve_one(
    cfg: TrainConfig, places: Places | None = None, *, before: bool = False
) -> TrainConfig:
    """``cfg`` with all defaults that depend on the data or on other values.

    Args:
        cfg: what was asked for.
        places: opened shards folders.
        before: resolve by the rules of version 0.1.0, to find its runs.
    """
    places = places or Places()
    if not cfg.train_data.shards:
        raise ConfigError(
            "--train-data.shards is missing: give the URL that `saev shards` printed."
        )
    train, val, n_val = decide(cfg, places, before=before)
    d_model = places[train.shards].d_model
    if cfg.sae.d_model not in (None, d_model):
        raise ConfigError(
            f"--sae.d-model is {cfg.sae.d_model}, but {train.shards} holds activations of width "
            f"{d_model}. Leave the flag out, or choose the shards of another model."
        )
    if places[val.shards].d_model != d_model:
        raise ConfigError(
            f"--val-data.shards {val.shards} holds activations of width "
            f"{places[val.shards].d_model}, but --train-data.shards of width {d_model}."
        )
    d_sae = cfg.sae.d_sae or cfg.sae.exp_factor * d_model
    activation = cfg.sae.activation
    if isinstance(activation, TopK | BatchTopK) and activation.top_k > d_sae:
        raise ConfigError(
            f"--sae.activation.top-k is {activation.top_k}, but the SAE has only {d_sae} latents."
        )
    if cfg.objective.target_l0 is not None:
        _check_target(cfg.objective.target_l0, activation, d_sae)
    n_train = cfg.n_train or default_n_train(places.n_tokens(train))
    if before and cfg.n_train is None:
        n_train = MOST_TOKENS
    batch_size = cfg.batch_size or default_batch_size(n_train)
    n_steps = math.ceil(n_train / min(batch_size, places.n_tokens(train)))
    if before:  # version 0.1.0 allowed batches of more tokens than there are
        n_steps = math.ceil(n_train / batch_size)
    found = cfg.model_copy(
        update={
            "runs_root": storage.normalize(cfg.runs_root),
            "sweep": "",
            "n_train": n_train,
            "batch_size": batch_size,
            "train_data": train,
            "val_data": ValDataConfig.from_dict(val.to_dict()),
            "n_val": n_val,
            "sae": cfg.sae.model_copy(update={"d_model": d_model, "d_sae": d_sae}),
            "objective": default_objective(cfg),
            "lr": cfg.lr or default_lr(d_sae, cfg.optim),
            "n_lr_warmup": _warmup(cfg, "n_lr_warmup", n_steps, places, before),
            "n_sparsity_warmup": _warmup(cfg, "n_sparsity_warmup", n_steps, places, before),
            "dead_after": cfg.dead_after or default_dead_after(n_train),
        }
    )
    if not before:
        check_model(found, places)
    return found


# --- More defaults, chosen by the experiment in docs/training.md -------------------------------

LR_WARMUP = 0.05
"""Share of the run."""
SPARSITY_WARMUP = 0.2
"""Share of the run."""
DEAD_AFTER = 0.03
"""Share of the run."""


def default_lr(d_sae: int, optim: str) -> float:
    """Peak learning rate: falls with the fourth root of the width, as measured in docs/training.md.

    Gao et al. 2024 find the square root, for much longer runs of wider SAEs.
    """
    peak = 3e-3 if optim == "adam" else 1.5e-2
    return float(f"{peak * (1536 / d_sae) ** 0.25:.4g}")


def default_dead_after(n_train: int) -> int:
    """Tokens without firing that make a latent dead: 10M, but at most a small share of the run."""
    return max(1, min(10_000_000, round(DEAD_AFTER * n_train)))


def default_objective(cfg: TrainConfig) -> Objective:
    """The objective with its defaults: λ if there is a penalty without a target L0, and ``k_aux``
    as half of k or of the target L0, if there is one.

    With this ``k_aux``, dead latents compete for each token, as live latents do. Gao et al. use
    d_model / 2, and have more dead latents than that. Here there are often fewer dead latents, so
    that all of them would be active on every token. They would learn a small dense autoencoder
    together, and stay dead.
    """
    objective, top_k = cfg.objective, getattr(cfg.sae.activation, "top_k", 0)
    found: dict[str, tp.Any] = {}
    if not top_k and objective.target_l0 is None:
        found["sparsity_coeff"] = objective.coefficient
    k = top_k or objective.target_l0
    if objective.k_aux is None and k:
        found["k_aux"] = max(1, int(k // 2))
    return objective.model_copy(update=found)


def _check_target(target: float, activation: Activation, d_sae: int) -> None:
    if isinstance(activation, TopK | BatchTopK):
        raise ConfigError(
            f"--objective.target-l0 is {target:g}, but {activation.kind} keeps top_k latents: set "
            "--sae.activation.top-k, or choose sae.activation:relu or jump-relu."
        )
    if target > d_sae / 2:
        raise ConfigError(
            f"--objective.target-l0 is {target:g}, but the SAE has only {d_sae} latents, of which "
            "at most half can be active. Lower it or raise --sae.d-sae."
        )


LONGEST_WARMUP = 0.5
"""A warm-up that is longer than the run is cut to this share of the run."""


def _warmup(cfg: TrainConfig, key: str, n_steps: int, places: Places, before: bool) -> int:
    """Steps of a warm-up: the given number or, by default, a share of the run.

    A warm-up that is longer than the run is cut. Otherwise the learning rate, or the penalty, would
    never reach the value that was asked for.
    """
    wanted: int | None = getattr(cfg, key)
    if wanted is None:
        return round(
            {"n_lr_warmup": LR_WARMUP, "n_sparsity_warmup": SPARSITY_WARMUP}[key] * n_steps
        )
    if wanted <= n_steps:
        return wanted
    cut = max(1, math.floor(LONGEST_WARMUP * n_steps))
    if not before:
        flag = "--" + key.replace("_", "-")
        say_once(
            logger,
            f"{flag} is {wanted}, but the run has only {n_steps} steps: the warm-up is cut to "
            f"{cut}, half of them.",
        )
    return cut


# --- Names --------------------------------------------------------------------------------------


def run_id(
    config: TrainConfig, places: Places | None = None, *, val_buffer_mb: float | None = None
) -> str:
    """Content address of a resolved config: equal trainings have equal names.

    Keys that do not change the result are left out: the place of the run, the tag, the device, how
    often it is saved and logged, and how data is read. Shards are identified by the hash of their
    metadata, so a copy of a folder gives the same name.

    Args:
        config: the resolved config.
        places: opened shards folders.
        val_buffer_mb: buffer_mb of the evaluation, if it is not that of training.
    """
    places = places or Places()
    raw = _hashed(config)
    if val_buffer_mb is not None and "val_data" in raw:
        raw["val_data"]["buffer_mb"] = val_buffer_mb
    for side in ("train_data", "val_data"):
        if side in raw:
            shards = places[raw[side]["shards"]]
            raw[side]["shards"] = [shards.metadata.hash, shards.n_examples]
    # Version 0.1.0 evaluated on activations of another model without a warning. Its runs need other
    # names than runs that record the difference.
    other = {"other_model": True} if other_model(config, places) else {}
    numerics = NUMERICS[config.sae.activation.kind]
    return digest({"numerics": numerics, "config": raw, **other})


def _hashed(config: TrainConfig) -> dict[str, tp.Any]:
    """The keys of a resolved config that decide the result, with the shards as URLs."""
    raw = {k: v for k, v in config.identity().items() if k not in UNSWEPT}
    if not config.n_val:
        del raw["val_data"]
    for side in ("train_data", "val_data"):
        if side in raw:
            raw[side] = {k: v for k, v in raw[side].items() if k not in _UNHASHED_DATA}
    del raw["sae"]["exp_factor"]  # d_sae follows from it
    return raw


def _data_key(config: TrainConfig) -> str:
    """Equal for configs that can share every batch."""
    keys = ("train_data", "val_data", "batch_size", "n_train", "n_val", "data_seed")
    more = ("runs_root", "device", "bf16")  # one process has one of each
    raw = config.to_dict()
    return storage.canonical_json({key: raw[key] for key in keys + more})
