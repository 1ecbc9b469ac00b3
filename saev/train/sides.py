"""The two sides of a run's data: which activations it trains on, and which it is measured on."""

import logging
import typing as tp

from saev import storage
from saev.config import DataConfig, LoaderConfig, TrainConfig, ValDataConfig
from saev.config.source import ActivationSource, check, compare
from saev.errors import ConfigError
from saev.limits import VAL_FRACTION
from saev.loaders.selection import Selection
from saev.once import say_once
from saev.shards.folders import Folders

logger = logging.getLogger(__name__)

_MOST_LABELS = 1 << 28
"""Bytes of labels.bin that are read to count tokens exactly."""


class Places(Folders):
    """Shards folders, opened once, and how many tokens configs select in them."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[str, int] = {}

    def n_tokens(self, data: DataConfig) -> int:
        """Tokens that a config selects, maybe none; of very large folders, labels are not read."""
        shards = self[data.shards]
        if shards.n_examples * shards.content_tokens > _MOST_LABELS:
            data = data.model_copy(update={"ignore_labels": ()})
        key = storage.canonical_json(data.to_dict())
        if key not in self._counts:
            whole = (0, shards.n_examples)  # with a range, a selection may be empty
            self._counts[key] = Selection(shards, data, example_range=whole).n_tokens
        return self._counts[key]


class Sides(tp.NamedTuple):
    """Both sides with URL, layer and split decided."""

    train: LoaderConfig
    val: LoaderConfig
    n_val: int
    """Tokens to evaluate on; 0 if there are too few examples to keep any."""


def decide(cfg: TrainConfig, places: Places, *, before: bool = False) -> Sides:
    """Which activations a config trains on and evaluates on.

    Args:
        cfg: with URLs of complete folders.
        places: the folders.
        before: decide as version 0.1.0 did. If val_data named other shards, its other keys had the
            defaults of a loader, not the values of training.

    Raises:
        ConfigError: nothing is left on one side, or a key does not fit its folder.
    """
    train = cfg.train_data
    train = train.model_copy(update={"shards": storage.normalize(train.shards)})
    given = ValDataConfig.model_validate(cfg.val_data).given()
    asked = {f"--{side}-data.val-fraction": f for side, f in _fractions(train, given)}
    val = _val_side(train, given, before)
    train, val = _with_layer("--train-data", train, places), _with_layer("--val-data", val, places)
    for flag, data in (("--train-data", train), ("--val-data", val)):
        _check_tokens(flag, data, places)
    n_val = cfg.n_val
    if train.shards == val.shards and train.split == "all" and given.get("split", "val") == "val":
        if len(fractions := sorted(set(asked.values()))) > 1:
            raise ConfigError(
                f"{' and '.join(asked)} are {' and '.join(map(str, fractions))}: the two sides of "
                "one folder would overlap. Give one of them."
            )
        fraction = {"val_fraction": fractions[0] if fractions else VAL_FRACTION}
        parts = (
            train.model_copy(update={"split": "train", **fraction}),
            val.model_copy(update={"split": "val", **fraction}),
        )
        if not asked and n_val and not all(places.n_tokens(part) for part in parts):
            say_once(
                logger,
                f"{train.shards} has {places[train.shards].n_examples} images, too few to keep "
                f"{VAL_FRACTION:.0%} of them for evaluation: SAEs are trained on all of them and "
                "evaluated on none. Name other shards with --val-data.shards to evaluate on.",
            )
            n_val = 0
        elif n_val or asked:
            train, val = parts
    _check_not_empty(train, val, n_val, asked, places)
    return Sides(train, val, n_val)


def _fractions(
    train: LoaderConfig, given: tp.Mapping[str, tp.Any]
) -> tp.Iterator[tuple[str, float]]:
    """The fractions that were asked for, by side."""
    if train.val_fraction:
        yield "train", train.val_fraction
    if given.get("val_fraction"):
        yield "val", given["val_fraction"]


def _val_side(train: LoaderConfig, given: tp.Mapping[str, tp.Any], before: bool) -> LoaderConfig:
    """The training side with the keys that were given for evaluation. Its split is not final."""
    shards = storage.normalize(given["shards"]) if given["shards"] else train.shards
    if before and given["shards"]:
        return LoaderConfig(**{**given, "shards": shards})
    if shards != train.shards:
        split = {"split": "all", "val_fraction": 0.0}
    else:
        split = {"split": "all" if train.split == "all" else "val"}
    return train.model_copy(update={**split, **given, "shards": shards})


def _with_layer(flag: str, data: LoaderConfig, places: Places) -> LoaderConfig:
    shards = places[data.shards]
    if data.layer == "all":
        raise ConfigError(
            f"An SAE is trained on one layer, and {flag}.layer is 'all'. Name one, or sweep them: "
            "[data] layer = [...]."
        )
    layer = shards.layers[shards.layer_index(data.layer)]
    return data.model_copy(update={"layer": layer})


def _check_tokens(flag: str, data: DataConfig, places: Places) -> None:
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


def _check_not_empty(
    train: LoaderConfig,
    val: LoaderConfig,
    n_val: int,
    asked: tp.Mapping[str, float],
    places: Places,
) -> None:
    """Refuse an empty side now, because reading the activations may take days."""
    for what, flag, data in (("train", "--train-data", train), ("evaluate", "--val-data", val)):
        if (what == "evaluate" and not n_val) or places.n_tokens(data):
            continue
        n = places[data.shards].n_examples
        if data.split == "all" or not asked:
            raise ConfigError(
                f"Nothing is left to {what} on: {flag}.tokens {data.tokens}, {flag}.ignore-labels "
                f"{list(data.ignore_labels)}, {flag}.split {data.split} and {flag}.val-fraction "
                f"{data.val_fraction:g} select none of the {n} images of {data.shards}. Select "
                "less narrowly."
            )
        name = next(iter(asked))
        other = "Raise it" if what == "evaluate" else "Lower it"
        raise ConfigError(
            f"{name} is {asked[name]:g}, which leaves none of the {n} images of {data.shards} to "
            f"{what} on. {other}, or give --n-val 0 without it to train on all and evaluate on "
            "none."
        )


# --- Are both of one model? ----------------------------------------------------------------------


def sources(config: TrainConfig, places: Places) -> tuple[ActivationSource, ActivationSource]:
    """What the activations of both sides of a resolved config are."""
    train, val = (
        places[data.shards].metadata.source(tp.cast(int, data.layer), data.tokens)
        for data in (config.train_data, config.val_loader())
    )
    return train, val


def check_model(config: TrainConfig, places: Places) -> None:
    """Refuse to evaluate on activations of another model; see :func:`saev.config.source.check`.

    Raises:
        ConfigError: both sides differ in model, preprocessing or image size, and that is not
            allowed.
    """
    if config.n_val:
        train, val = sources(config, places)
        check(
            train, val, sae=f"An SAE of --train-data.shards {config.train_data.shards}",
            shards=f"--val-data.shards {config.val_data.shards}", allow=config.allow_other_model,
        )  # fmt: skip


def other_model(config: TrainConfig, places: Places) -> list[str]:
    """How the activations of the evaluation differ from those of training, such as in the model."""
    return compare(*sources(config, places)).refused if config.n_val else []
