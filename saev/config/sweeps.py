"""Sweeps: a TOML file of lists becomes many training configs. Does not import torch.

A list is an axis of a grid, and every combination is one SAE. ``[[grid]]`` tables are separate
grids, for parameters that depend on each other. Keys outside of them are for all grids.

    lr = [1e-4, 3e-4]              # two learning rates ...
    [sae]
    d_sae = [6144, 12288]          # ... times two widths
    [[grid]]                       # ... times (two ReLU coefficients and three values of k)
    sae.activation.kind = "relu"
    objective.sparsity_coeff = [1e-4, 3e-4]
    [[grid]]
    sae.activation.kind = "top-k"
    sae.activation.top_k = [16, 32, 64]

Precedence is per leaf: command line, then sweep, then default.
"""

import functools
import itertools
import json
import logging
import types
import typing as tp
from collections.abc import Iterator, Mapping

import pydantic

from saev import storage
from saev.config.base import Config, configs_in, describe_validation_error
from saev.config.loaders import LoaderConfig, ValDataConfig
from saev.config.run import read_toml
from saev.config.sae import BatchTopK, TopK
from saev.config.train import TrainConfig
from saev.errors import ConfigError, did_you_mean
from saev.once import say_once

logger = logging.getLogger(__name__)

_SCALES = ("scale_mean", "scale_norm", "batch_size", "n_train", "n_val")
ALIASES: dict[str, tuple[str, ...]] = {
    "sae.sparsity_coeff": ("objective.sparsity_coeff",),
    "sae.aux_coeff": ("objective.aux_coeff",),
    "sae.top_k": ("sae.activation.top_k",),
    "data.seed": ("data_seed",),
    **{f"data.{key}": (key,) for key in _SCALES},
    **{f"data.{key}": (f"train_data.{key}",) for key in LoaderConfig.model_fields},
    **{
        f"data.{key}": (f"train_data.{key}", f"val_data.{key}")
        for key in ValDataConfig.model_fields
        if key != "split"  # training and evaluation are different sides of a split
    },
}
"""Short names that a sweep may use. A name with two targets sets both to the same value."""

UNSWEPT = frozenset(
    (
        *("runs_root", "tag", "sweep", "device", "max_parallel", "log_every", "wandb_project"),
        *("checkpoint_every", "checkpoint_minutes", "n_ranks", "kernels", "allow_other_model"),
    )
)
"""Keys that do not affect trained weights. A list of their values would train equal SAEs twice."""

Point = dict[str, tp.Any]
"""One SAE's values by dotted key."""


class RequestedSae(tp.NamedTuple):
    """One SAE that the user requested."""

    config: TrainConfig
    """Its config, before defaults are resolved. Unless seeds are swept, all SAEs of a sweep have
    the same seed here."""
    position: int | None
    """Its number in the sweep. None if the user gave its seed: without a sweep, or if seeds are
    swept."""


def requested_saes(
    cfg: TrainConfig,
    explicit: tp.Collection[str] = (),
    table: Mapping[str, tp.Any] | None = None,
) -> tuple[RequestedSae, ...]:
    """All SAEs that the user requested, in a fixed order; one if there is no sweep.

    Args:
        cfg: config of the command line.
        explicit: dotted keys that the command line set. A sweep does not override them.
        table: content of the sweep, if it is not a file.

    Raises:
        ConfigError: the file does not parse, a key is unknown, a value has the wrong type, or a
            combination is invalid.
    """
    cfg = cfg.model_copy(update={"val_data": ValDataConfig.model_validate(cfg.val_data)})
    if table:
        source = "the table [sweep]"
    elif cfg.sweep:
        source, table = storage.normalize(cfg.sweep), read_toml(cfg.sweep)
    else:
        _check_penalties([(cfg, Combination({}, 0, frozenset()))], explicit, "The command")
        return (RequestedSae(cfg, None),)
    points = list(expand(table, source, explicit))
    base = cfg.to_dict() | {"sweep": ""}
    applied = [(_apply(base, one.point, explicit, source), one) for one in points]
    _check_penalties(applied, explicit, source)
    members: dict[str, tuple[TrainConfig, bool]] = {}
    for member, one in applied:
        key = storage.canonical_json(member.to_dict())
        members.setdefault(key, (member, "seed" in one.point))
    if len(members) < len(points):
        n_repeated = len(points) - len(members)
        say_once(logger, f"{source}: {n_repeated} of {len(points)} combinations are repeated.")
    return tuple(
        RequestedSae(member, None if swept_seed else index)
        for index, (member, swept_seed) in enumerate(members.values())
    )


def requested_configs(
    cfg: TrainConfig,
    explicit: tp.Collection[str] = (),
    table: Mapping[str, tp.Any] | None = None,
) -> tuple[TrainConfig, ...]:
    """The configs of :func:`requested_saes`."""
    return tuple(one.config for one in requested_saes(cfg, explicit, table))


class Combination(tp.NamedTuple):
    """One point of a sweep."""

    point: Point
    """Values by dotted key."""
    grid: int
    """Number of its grid."""
    own: frozenset[str]
    """Keys of its ``[[grid]]`` table. The other keys are for all grids."""


_PENALTY, _KIND = "objective.sparsity_coeff", "sae.activation.kind"


def _check_penalties(
    members: tp.Sequence[tuple[TrainConfig, Combination]],
    explicit: tp.Collection[str],
    source: str,
) -> None:
    """Refuse a sparsity penalty that no SAE uses.

    A penalty for several grids, or several kinds of activation, is accepted if one of these SAEs
    uses it. Two more cases are accepted. A sweep of penalties without an activation is the guide's
    example; there is a warning later. In a stored config, the user did not choose the penalty.
    """

    def scope(one: Combination) -> int | None:
        return one.grid if _PENALTY in one.own and _PENALTY not in explicit else None

    used = {scope(one) for m, one in members if not isinstance(m.sae.activation, TopK | BatchTopK)}
    for member, one in members:
        activation, penalty = member.sae.activation, member.objective.sparsity_coeff
        swept = _PENALTY in one.point and _PENALTY not in explicit
        chosen = _KIND in one.point or _KIND in explicit or not isinstance(activation, TopK)
        given = _PENALTY in explicit or not (penalty is None or _is_resolved(member))
        if penalty and scope(one) not in used and (chosen if swept else given):
            raise ConfigError(
                f"{source}: {_PENALTY} is {penalty:g}, but {activation.kind} has no sparsity "
                "penalty: it keeps top_k latents. Leave the penalty out, or choose "
                "sae.activation:relu or jump-relu."
            )


def _is_resolved(config: TrainConfig) -> bool:
    """Whether training stored this config, with all defaults resolved. Version 0.1.0 wrote a
    penalty into all stored configs, and sweeps of the penalty alone still do."""
    needed = (config.batch_size, config.lr, config.n_lr_warmup, config.dead_after, config.sae.d_sae)
    return None not in needed


def expand(
    table: Mapping[str, tp.Any], source: str, explicit: tp.Collection[str] = ()
) -> Iterator[Combination]:
    """Every combination of a sweep, without keys that the command line set."""
    raw = dict(table)
    grids = raw.pop("grid", [{}])
    if not isinstance(grids, list) or not all(isinstance(g, dict) for g in grids):
        raise ConfigError(f"{source}: 'grid' is one table; write [[grid]] for each grid.")
    shared = _axes(raw, source)
    pinned: set[str] = set()
    for number, grid in enumerate(grids):
        own = _axes(grid, source)
        axes = shared | own
        pinned |= {key for key in axes if key in explicit}
        axes = {key: values for key, values in axes.items() if key not in explicit}
        for values in itertools.product(*axes.values()):
            point = dict(itertools.chain.from_iterable(v.items() for v in values))
            yield Combination(point, number, frozenset(own))
    if pinned:
        logger.info("%s: %s come from the command line.", source, ", ".join(sorted(pinned)))


def _axes(table: Mapping[str, tp.Any], source: str) -> dict[str, list[Point]]:
    """The axes of one grid: dotted key → its choices. Each choice sets one or more keys."""
    axes: dict[str, list[Point]] = {}
    for name, value in _flatten(table, ()):
        if name in _removed():
            logger.warning("%s: %s was removed and does nothing (see CHANGELOG).", source, name)
            continue
        targets = ALIASES.get(name, (name,))
        for target in targets:
            if target not in leaves():
                raise ConfigError(f"{source}: {_unknown(name)}")
        choices = _choices(name, targets[0], value, source)
        axes[targets[0]] = [dict.fromkeys(targets, choice) for choice in choices]
    return axes


def _flatten(table: Mapping[str, tp.Any], path: tuple[str, ...]) -> Iterator[tuple[str, tp.Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*path, key))
        else:
            yield ".".join((*path, key)).replace("-", "_"), value


def _choices(name: str, leaf: str, value: tp.Any, source: str) -> list[tp.Any]:
    is_tuple = any(_is_tuple(t) for t, _ in leaves()[leaf])
    if is_tuple:  # one list is the tuple itself, a list of lists is an axis
        swept = isinstance(value, list) and bool(value) and all(isinstance(v, list) for v in value)
    else:
        swept = isinstance(value, list)
    choices = value if swept else [value]
    if not choices:
        raise ConfigError(f"{source}: {name} is an empty list, which makes a grid of no SAEs.")
    if swept and leaf in UNSWEPT and len(choices) > 1:
        raise ConfigError(
            f"{source}: {name} does not change what is trained, so a list of it would train the "
            "same SAE several times. Give one value."
        )
    return [_check(name, leaf, choice, source) for choice in choices]


def _is_tuple(annotation: tp.Any) -> bool:
    """Whether a type is a tuple, or a union with a tuple."""
    if tp.get_origin(annotation) in (tp.Union, types.UnionType):
        return any(_is_tuple(t) for t in tp.get_args(annotation))
    return tp.get_origin(annotation) is tuple


def _check(name: str, leaf: str, value: tp.Any, source: str) -> tp.Any:
    """``value``, if it has the type of its key. Types are not converted, except that 1e6 is an
    integer."""
    problems = []
    for kind, metadata in leaves()[leaf]:
        annotated: tp.Any = tp.Annotated[kind, *metadata] if metadata else kind
        adapter: pydantic.TypeAdapter[tp.Any] = pydantic.TypeAdapter(annotated)
        candidates = [value]
        if isinstance(value, float) and value.is_integer():
            candidates.append(int(value))
        for candidate in candidates:
            try:
                adapter.validate_json(json.dumps(candidate, default=str), strict=True)
                return candidate
            except pydantic.ValidationError as err:
                problems.append(err.errors()[0]["msg"])
    raise ConfigError(
        f"{source}: {name}: {problems[-1][0].lower()}{problems[-1][1:]}, found {value!r}."
    )


def _unknown(name: str) -> str:
    known = sorted({*leaves(), *ALIASES})
    hint = did_you_mean(name, known)
    if not hint:  # perhaps the right key in the wrong table
        last = name.rsplit(".", 1)[-1]
        hint = did_you_mean(last, [key for key in known if key.rsplit(".", 1)[-1] == last])
    return f"unknown key {name}.{hint} Keys are the flags of `saev train`."


# --- The keys that exist ----------------------------------------------------------------------


@functools.cache
def leaves() -> dict[str, tuple[tuple[tp.Any, tuple[tp.Any, ...]], ...]]:
    """Dotted key of every leaf of TrainConfig → its possible (type, pydantic metadata)."""
    found: dict[str, list[tuple[tp.Any, tuple[tp.Any, ...]]]] = {}

    def walk(model: type[Config], path: tuple[str, ...]) -> None:
        for name, field in model.model_fields.items():
            models = configs_in(field.annotation)
            for inner in models:
                walk(inner, (*path, name))
            if not models:
                entry = (field.annotation, tuple(field.metadata))
                kinds = found.setdefault(".".join((*path, name)), [])
                if entry not in kinds:
                    kinds.append(entry)

    walk(TrainConfig, ())
    return {key: tuple(kinds) for key, kinds in found.items()}


@functools.cache
def _removed() -> frozenset[str]:
    """Dotted keys of earlier versions that no key replaced."""
    found = {f"data.{old}" for old in LoaderConfig.removed}

    def walk(model: type[Config], path: tuple[str, ...]) -> None:
        found.update(".".join((*path, old)) for old, new in model.removed.items() if not new)
        for name, field in model.model_fields.items():
            for inner in configs_in(field.annotation):
                walk(inner, (*path, name))

    walk(TrainConfig, ())
    return frozenset(found - leaves().keys())


@functools.cache
def _kinds() -> dict[str, dict[str, type[Config]]]:
    """Dotted key of every union of configs → its members by their `kind`."""
    unions: dict[str, dict[str, type[Config]]] = {}

    def walk(model: type[Config], path: tuple[str, ...]) -> None:
        for name, field in model.model_fields.items():
            models = configs_in(field.annotation)
            if len(models) > 1:
                unions[".".join((*path, name))] = {
                    m.model_fields["kind"].default: m for m in models
                }
            elif models:
                walk(models[0], (*path, name))

    walk(TrainConfig, ())
    return unions


# --- Applying values --------------------------------------------------------------------------


def _apply(
    base: dict[str, tp.Any], point: Point, explicit: tp.Collection[str], source: str
) -> TrainConfig:
    raw = json.loads(json.dumps(base))
    # Kinds come first, because they determine which other keys exist.
    for leaf in sorted(point, key=lambda key: not key.endswith(".kind")):
        if leaf in explicit:
            continue
        parent, _, name = leaf.rpartition(".")
        node = _node(raw, parent)
        if name == "kind":
            _switch(raw, parent, point[leaf])
            continue
        if parent in _kinds():
            member = _kinds()[parent][node["kind"]]
            if name not in member.model_fields:
                raise ConfigError(
                    f"{source}: {leaf} is set, but {parent} is {node['kind']}, which has no "
                    f"{name}. Set {parent}.kind too, or put the kinds in separate [[grid]] tables."
                )
        node[name] = point[leaf]
    try:
        return TrainConfig.model_validate(raw)
    except pydantic.ValidationError as err:
        raise ConfigError(describe_validation_error(err, source, TrainConfig)) from err


def _switch(raw: dict[str, tp.Any], path: str, kind: str) -> None:
    """Change the kind of a union. Values that are not defaults are kept if the new kind has the
    key."""
    parent, _, name = path.rpartition(".")
    node = _node(raw, path)
    old, new = _kinds()[path][node["kind"]], _kinds()[path][kind]
    kept = {
        key: value
        for key, value in node.items()
        if key in new.model_fields and value != old.model_fields[key].default
    }
    _node(raw, parent)[name] = new.model_validate(kept | {"kind": kind}).to_dict()


def _node(raw: dict[str, tp.Any], path: str) -> dict[str, tp.Any]:
    for part in path.split(".") if path else ():
        raw = raw[part]
    return raw
