"""From what the user wrote to what is trained: every default decided, runs named and grouped.

Only metadata is read, so this is cheap enough for a pipeline's planning step.
"""

import logging
import math
import typing as tp

from saev import storage
from saev.config import BatchTopK, DataConfig, LoaderConfig, Objective, TopK, TrainConfig
from saev.config.sweeps import UNSWEPT, resolve
from saev.config.train import default_batch_size
from saev.errors import ConfigError
from saev.shards import Shards

logger = logging.getLogger(__name__)

NUMERICS = 1
"""Counts changes of the training algorithm: part of every run id, so that a run trained by an
older version is not taken for one that a newer version would train."""

RUN_ID_DIGITS = 12
RUN = "run.json"
"""The object of a run folder that is written last."""
VAL_FRACTION = 0.1
"""Share of examples kept for evaluation when training and evaluation name the same folder."""

_UNHASHED_DATA = ("n_threads", "verify")
"""How data is read, not what is read."""


class Member(tp.NamedTuple):
    """One SAE of a sweep."""

    run_id: str
    """Name of the run folder."""
    config: TrainConfig
    """Fully resolved."""

    @property
    def url(self) -> str:
        """The run folder."""
        return storage.join(self.config.runs_root, self.run_id)

    @property
    def published(self) -> bool:
        """Whether it is trained and complete."""
        return storage.exists(storage.join(self.url, RUN))


class Group(tp.NamedTuple):
    """SAEs that are trained on the same batches: one work item."""

    group_id: str
    members: tuple[Member, ...]

    def to_item(self) -> dict[str, tp.Any]:
        """As plain JSON."""
        members = [{"run_id": m.run_id, "config": m.config.to_dict()} for m in self.members]
        return {"group": self.group_id, "members": members}

    @classmethod
    def from_item(cls, item: tp.Mapping[str, tp.Any]) -> "Group":
        """The inverse of :meth:`to_item`."""
        members = (
            Member(m["run_id"], TrainConfig.from_dict(m["config"], source="work item"))
            for m in item["members"]
        )
        return cls(item["group"], tuple(members))


def groups(
    cfg: TrainConfig,
    explicit: tp.Collection[str] = (),
    table: tp.Mapping[str, tp.Any] | None = None,
) -> list[Group]:
    """Every SAE that ``cfg`` and its sweep ask for, grouped by the batches they can share.

    Args:
        cfg: what the command line said.
        explicit, table: see :func:`saev.config.sweeps.resolve`.

    Raises:
        ConfigError: a combination is wrong or does not fit the shards.
        StorageError: a shards folder cannot be read.
    """
    places = _Places()
    by_data: dict[str, list[Member]] = {}
    seen: set[str] = set()
    for raw in resolve(cfg, explicit, table):
        config = resolve_one(raw, places)
        member = Member(run_id(config, places), config)
        if member.run_id in seen:  # equal after all defaults: d_sae = 1536 and exp_factor = 4
            logger.warning("Run %s is asked for twice; it is trained once.", member.run_id)
            continue
        seen.add(member.run_id)
        by_data.setdefault(_data_key(config), []).append(member)
    _warn_of_idle_axes([m for members in by_data.values() for m in members])
    found = []
    for members in by_data.values():
        size = cfg.max_parallel or len(members)
        for start in range(0, len(members), size):
            part = tuple(members[start : start + size])
            found.append(Group(_digest([m.run_id for m in part]), part))
    return found


def resolve_one(cfg: TrainConfig, places: "_Places | None" = None) -> TrainConfig:
    """``cfg`` with every default decided that depends on the data or on other values."""
    places = places or _Places()
    if not cfg.train_data.shards:
        raise ConfigError(
            "--train-data.shards is missing: give the URL that `saev shards` printed."
        )
    train, val = _resolve_data(cfg, places)
    d_model = places[train.shards].d_model
    for flag, data in (("--train-data", train), ("--val-data", val)):
        _check_tokens(flag, data, places)
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
    batch_size = cfg.batch_size or default_batch_size(cfg.n_train)
    n_steps = math.ceil(cfg.n_train / batch_size)
    return cfg.model_copy(
        update={
            "runs_root": storage.normalize(cfg.runs_root),
            "sweep": "",
            "batch_size": batch_size,
            "train_data": train,
            "val_data": val,
            "sae": cfg.sae.model_copy(update={"d_model": d_model, "d_sae": d_sae}),
            "objective": default_objective(cfg),
            "lr": cfg.lr or default_lr(d_sae, cfg.optim),
            "n_lr_warmup": _or(cfg.n_lr_warmup, round(LR_WARMUP * n_steps)),
            "n_sparsity_warmup": _or(cfg.n_sparsity_warmup, round(SPARSITY_WARMUP * n_steps)),
            "dead_after": cfg.dead_after or default_dead_after(cfg.n_train),
        }
    )


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
    """With ``k_aux`` half of k for TopK and BatchTopK.

    AuxK latents then compete for a token as they would if they were alive. Gao et al. take half of
    d_model, and there are always more dead latents than that; here there are fewer, so all of them
    would share each residual, as a small dense autoencoder that never wakes up.
    """
    top_k = getattr(cfg.sae.activation, "top_k", 0)
    if cfg.objective.k_aux is not None or not top_k:
        return cfg.objective
    return cfg.objective.model_copy(update={"k_aux": max(1, top_k // 2)})


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


# --- Data ---------------------------------------------------------------------------------------


class _Places(dict[str, Shards]):
    """Opened shards folders by URL."""

    def __missing__(self, url: str) -> Shards:
        self[url] = Shards.open(url)
        return self[url]


def _resolve_data(cfg: TrainConfig, places: _Places) -> tuple[LoaderConfig, LoaderConfig]:
    """Both sides with URL, layer and split decided."""
    train, val = cfg.train_data, cfg.val_data
    train = train.model_copy(update={"shards": storage.normalize(train.shards)})
    if not val.shards:  # as training, but for what was set
        chosen = {k: v for k, v in val if v != LoaderConfig.model_fields[k].default}
        inherited = {"split": "all"} if train.split == "all" else {"split": "val"}
        val = train.model_copy(update={**inherited, **chosen, "shards": train.shards})
    val = val.model_copy(update={"shards": storage.normalize(val.shards)})
    same = train.shards == val.shards
    if same and train.split == "all" and val.split in ("all", "val"):
        fractions = {d.val_fraction for d in (cfg.train_data, cfg.val_data) if d.val_fraction}
        if len(fractions) > 1:
            raise ConfigError(
                "--train-data.val-fraction and --val-data.val-fraction are "
                f"{' and '.join(map(str, sorted(fractions)))}: the two sides of one folder would "
                "overlap. Give one of them."
            )
        if cfg.n_val or fractions:
            fraction = fractions.pop() if fractions else VAL_FRACTION
            train = train.model_copy(update={"split": "train", "val_fraction": fraction})
            val = val.model_copy(update={"split": "val", "val_fraction": fraction})
    return _with_layer(train, places), _with_layer(val, places)


def _with_layer(data: LoaderConfig, places: _Places) -> LoaderConfig:
    shards = places[data.shards]
    if data.layer == "all":
        raise ConfigError(
            "An SAE is trained on one layer, and layer is 'all'. Name one, or sweep them: "
            "[data] layer = [...]."
        )
    layer = shards.layers[shards.layer_index(data.layer)]
    return data.model_copy(update={"layer": layer})


def _check_tokens(flag: str, data: DataConfig, places: _Places) -> None:
    shards = places[data.shards]
    if data.tokens == "special" and not shards.metadata.cls_token:
        raise ConfigError(f"{flag}.tokens is special, but {data.shards} has no class token.")
    if data.ignore_labels and not shards.has_labels:
        raise ConfigError(
            f"{flag}.ignore-labels is given, but {data.shards} has no labels.bin. Record a "
            "segmentation dataset, or leave the flag out."
        )
    if not shards.n_examples:
        raise ConfigError(f"{data.shards} has no examples.")


# --- Names --------------------------------------------------------------------------------------


def run_id(config: TrainConfig, places: "_Places | None" = None) -> str:
    """Content address of a resolved config: equal work has equal names.

    Left out is what does not change the result: where it is written, the tag, the device, how often
    it is saved and logged, and how data is read. The shards count by the hash of their metadata, so
    a copy of a folder elsewhere is the same folder.
    """
    places = places or _Places()
    raw = {k: v for k, v in config.identity().items() if k not in UNSWEPT}
    sides = ("train_data", "val_data") if config.n_val else ("train_data",)
    if not config.n_val:
        del raw["val_data"]
    for side in sides:
        data = {k: v for k, v in raw[side].items() if k not in _UNHASHED_DATA}
        shards = places[data["shards"]]
        data["shards"] = [shards.metadata.hash, shards.n_examples]
        raw[side] = data
    del raw["sae"]["exp_factor"]  # d_sae says it
    return _digest({"numerics": NUMERICS, "config": raw})


def _data_key(config: TrainConfig) -> str:
    """Equal for configs that can share every batch."""
    keys = ("train_data", "val_data", "batch_size", "n_train", "n_val", "data_seed")
    more = ("runs_root", "device", "bf16")  # one process has one of each
    raw = config.to_dict()
    return storage.canonical_json({key: raw[key] for key in keys + more})


def _digest(obj: tp.Any) -> str:
    return storage.content_hash(obj, RUN_ID_DIGITS)


def _warn_of_idle_axes(members: tp.Sequence[Member]) -> None:
    """A sweep of a penalty that the activation does not use trains repetitions."""
    sparse = [m for m in members if isinstance(m.config.sae.activation, TopK | BatchTopK)]
    coefficients = {m.config.objective.sparsity_coeff for m in sparse}
    if len(coefficients) > 1:
        logger.warning(
            "objective.sparsity_coeff is swept, but %s has no sparsity penalty: those SAEs differ "
            "in their seeds alone. Choose sae.activation:relu or jump-relu.",
            " and ".join(sorted({m.config.sae.activation.kind for m in sparse})),
        )
