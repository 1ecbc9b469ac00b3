"""What SAEs are called: short names such as ``topk32-s6144``, which say in what they differ."""

import typing as tp

from saev.config import TrainConfig

_BASE = ("sae.activation.kind", "sae.activation.top_k", "objective.target_l0", "sae.d_sae")
"""In every name."""
_FIRST = (
    *_BASE, "objective.kind", "train_data.layer", "objective.sparsity_coeff", "lr",
)  # fmt: skip
"""What people compare, most wanted first. All other keys come after them."""
_SECOND = frozenset({"seed", "data_seed"})
"""What is named last, where nothing else differs: a sweep gives each SAE its own seed."""
_NEVER = frozenset({"runs_root", "tag", "sweep", "device", "wandb_project", "sae.exp_factor"})
_SHORT = {
    "objective.target_l0": "l", "sae.d_sae": "s", "train_data.layer": "layer",
    "objective.sparsity_coeff": "coeff",
}  # fmt: skip
"""What stands before the value of a key; by default its last part."""
_PLAIN = "vanilla"
"""The objective that is not named, unless others are."""


def of(configs: tp.Sequence[TrainConfig]) -> list[str]:
    """One name for each SAE, such as ``topk32-s6144`` or ``relu-s6144-coeff0.001``.

    A name has the activation, k or the target L0, and the number of latents. Beyond that it has as
    few keys as tell the SAEs apart, so that values that follow from others, such as a learning rate
    that was chosen from d_sae, are in none. SAEs whose configs are equal have equal names.

    Args:
        configs: resolved, as they stand in run folders.
    """
    plain = [_flat(config.to_dict()) for config in configs]
    telling = _telling(plain)
    return ["-".join(_words(one, telling)) for one in plain]


def _words(one: dict[str, str], telling: tp.Sequence[str]) -> tp.Iterator[str]:
    kind = one["sae.activation.kind"].replace("-", "")
    yield kind + one.get("sae.activation.top_k", "")
    for key in _BASE[2:]:
        if key in one:
            yield _said(key, one[key])
    if one["objective.kind"] != _PLAIN:
        yield one["objective.kind"]
    for key in telling:
        if key in one and key not in _BASE and key != "objective.kind":
            yield _said(key, one[key])


def _telling(plain: tp.Sequence[dict[str, str]]) -> list[str]:
    """Keys that tell apart what the keys before them do not."""
    keys = {key for one in plain for key in one if key not in _NEVER}
    last = len(_FIRST)

    def rank(key: str) -> tuple[bool, int, str]:
        return key in _SECOND, _FIRST.index(key) if key in _FIRST else last, key

    chosen: list[str] = []
    n_groups = 1
    for key in sorted(keys, key=rank):
        n_now = len({tuple(one.get(k) for k in (*chosen, key)) for one in plain})
        if n_now > n_groups:
            chosen.append(key)
            n_groups = n_now
    return chosen


def hyperparameters(config: TrainConfig) -> dict[str, str | float]:
    """What an SAE is and how it was trained, by short keys, for tables of other programs."""
    found: dict[str, str | float] = {"name": of([config])[0]}
    plain = _flat(config.to_dict())
    for key in (*_FIRST, "tag", "optim", "n_train", "batch_size", "seed"):
        if value := plain.get(key):
            try:
                found[key] = float(value)
            except ValueError:
                found[key] = value
    return found


def _flat(value: tp.Any, prefix: str = "") -> dict[str, str]:
    """The values of nested tables as texts, by dotted key; keys without a value are left out."""
    if isinstance(value, dict):
        found: dict[str, str] = {}
        for key, inner in value.items():
            found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return found
    if value is None:
        return {}
    return {prefix: f"{value:g}" if isinstance(value, float) else str(value)}


def _said(key: str, value: str) -> str:
    word = _SHORT.get(key, key.rsplit(".", 1)[-1])
    # A name like n_prefixes needs something between it and its number.
    return f"{word}{'=' if '_' in word else ''}{value}"
