"""Short names of SAEs, such as ``topk32-s6144``, made of the config keys in which they differ."""

import typing as tp

from saev.config import TrainConfig

_BASE = ("sae.activation.kind", "sae.activation.top_k", "objective.target_l0", "sae.d_sae")
"""Keys that every name contains."""
_FIRST = (
    *_BASE, "objective.kind", "train_data.layer", "objective.sparsity_coeff", "lr",
)  # fmt: skip
"""Keys that people compare, the most important first. All other keys come after them."""
_SECOND = frozenset({"seed", "data_seed"})
"""Keys that come last, so that a name has them only if nothing else differs."""
_NEVER = frozenset({"runs_root", "tag", "sweep", "device", "wandb_project", "sae.exp_factor"})
_SHORT = {
    "objective.target_l0": "l", "sae.d_sae": "s", "train_data.layer": "layer",
    "objective.sparsity_coeff": "coeff",
}  # fmt: skip
"""What a key is called in names; by default its last part."""
_PLAIN = "vanilla"
"""The objective that names leave out."""


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
    """Keys that distinguish SAEs which the keys before them do not distinguish."""
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
    """An SAE's name and settings by short keys, for TensorBoard's table of runs."""
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
