"""What SAEs are called beside each other: by what their configs differ in."""

import typing as tp

from saev.config import TrainConfig

_FIRST = (
    "train_data.layer", "sae.activation.kind", "sae.activation.top_k", "objective.target_l0",
    "objective.sparsity_coeff", "sae.d_sae", "objective.kind", "lr",
)  # fmt: skip
"""What people compare, most wanted first. All other keys come after them."""
_SECOND = frozenset({"seed", "data_seed"})
"""What is named last, where nothing else differs: a sweep gives each SAE its own seed."""
_NEVER = frozenset({"runs_root", "tag", "sweep", "device", "wandb_project", "sae.exp_factor"})


def of(configs: tp.Sequence[TrainConfig]) -> list[str]:
    """One name for each SAE, such as ``top_k 32, lr 0.001``.

    A name has as few keys as tell the SAEs apart, so that values that follow from others, such as a
    learning rate that was chosen from d_sae, are in none. SAEs whose configs are equal have equal
    names.

    Args:
        configs: resolved, as they stand in run folders.
    """
    plain = [_flat(config.to_dict()) for config in configs]
    chosen = _telling(plain)
    if not chosen:
        chosen = ["sae.activation.kind", "sae.activation.top_k", "train_data.layer"]
    return [", ".join(_said(key, one[key]) for key in chosen if key in one) for one in plain]


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
    name = key.rsplit(".", 1)[-1]
    return value if name == "kind" else f"{name} {value}"
