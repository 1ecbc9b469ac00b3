"""Warns of config keys that have no effect on an SAE, because of the value of another key.

A sweep of such a key trains the same SAE several times, under different run ids. The ids cannot be
made equal: if idle keys were left out of the hash, SAEs that are trained already would get other
ids.
"""

import logging
import typing as tp

from saev import storage
from saev.config import BatchTopK, JumpRelu, TopK, TrainConfig
from saev.config.sae import Matryoshka

logger = logging.getLogger(__name__)


class Sized(tp.NamedTuple):
    """An SAE of a sweep."""

    config: TrainConfig
    """Fully resolved."""
    hashed: tp.Mapping[str, tp.Any]
    """The keys that name its run."""
    n_tokens: int
    """Tokens to train on in an epoch."""


def idle_keys(config: TrainConfig, n_tokens: int) -> dict[str, str]:
    """Dotted keys that do not change this SAE, each with the reason.

    Args:
        config: fully resolved.
        n_tokens: tokens to train on in an epoch.
    """
    activation, objective = config.sae.activation, config.objective
    found: dict[str, str] = {}
    if isinstance(activation, TopK | BatchTopK):
        reason = f"{activation.kind} has no sparsity penalty"
        found |= {"objective.sparsity_coeff": reason, "n_sparsity_warmup": reason}
    elif objective.target_l0 is not None:
        found["n_sparsity_warmup"] = "a target_l0 has no warm-up"
    elif not objective.coefficient:
        found["n_sparsity_warmup"] = "sparsity_coeff is 0"
    if isinstance(activation, BatchTopK) and config.n_val:
        reason = "the threshold is set anew on held-out tokens"
        found["sae.activation.threshold_momentum"] = reason
    if not objective.aux_coeff:
        found["objective.k_aux"] = "aux_coeff is 0"
        if not isinstance(activation, JumpRelu):  # JumpReLU lowers thresholds of dead latents
            found["dead_after"] = "aux_coeff is 0"
    if isinstance(objective, Matryoshka) and objective.n_prefixes == 1:
        found["objective.pareto_alpha"] = "n_prefixes is 1"
    if config.device == "cpu":
        found["bf16"] = "a CPU never uses bfloat16"
    if config.batch_size is not None and config.batch_size >= n_tokens:
        found["batch_size"] = f"there are only {n_tokens} tokens to train on"
    return found


def warn_of_idle_axes(members: tp.Sequence[Sized]) -> None:
    """Warn of swept keys that make SAEs which are equal except for their seeds."""
    alike: dict[str, list[Sized]] = {}
    for member in members:
        alike.setdefault(_effective(member), []).append(member)
    reasons: dict[str, set[str]] = {}
    n_repeated, is_equal = 0, False
    for group in (group for group in alike.values() if len(group) > 1):
        idle = idle_keys(group[0].config, group[0].n_tokens)
        swept = [key for key in idle if len({_text(m.hashed, key) for m in group}) > 1]
        if swept:
            n_repeated += len(group)
            is_equal |= len({m.config.seed for m in group}) < len(group)
        for key in swept:
            reasons.setdefault(key, set()).add(idle[key])
    if not reasons:
        return
    logger.warning(
        "%s: %d SAEs %s. Leave it out of the sweep, or change the other key so that it matters.",
        "; ".join(
            f"{key} is swept, but {' and '.join(sorted(why))}" for key, why in reasons.items()
        ),
        n_repeated,
        "are repetitions of each other" if is_equal else "differ in their seeds alone",
    )


def _effective(member: Sized) -> str:
    """Equal for SAEs that would be equal if they had the same seed."""
    idle = {*idle_keys(member.config, member.n_tokens), "seed"}

    def walk(table: tp.Mapping[str, tp.Any], path: str) -> dict[str, tp.Any]:
        return {
            key: walk(value, f"{path}{key}.") if isinstance(value, dict) else value
            for key, value in table.items()
            if path + key not in idle
        }

    return storage.canonical_json(walk(member.hashed, ""))


def _text(table: tp.Mapping[str, tp.Any], key: str) -> str:
    value: tp.Any = table
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return storage.canonical_json(value)
