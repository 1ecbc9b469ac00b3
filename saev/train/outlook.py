"""Messages before training begins: what is going to be trained, and on how much data."""

import logging
import typing as tp
from collections.abc import Iterator

from saev.config.train import TOKENS_PER_LATENT
from saev.once import say_once
from saev.train.banks import decided
from saev.train.members import Group
from saev.train.sides import Places

logger = logging.getLogger(__name__)


def of(groups: tp.Sequence[Group]) -> Iterator[str]:
    """A line for each group. Warns of SAEs that are too wide for their data.

    Args:
        groups: resolved, not yet published.
    """
    places = Places()
    for group in groups:
        config, n = group.members[0].config, len(group.members)
        n_tokens = max(1, places.n_tokens(config.train_data))
        shards = places[config.train_data.shards]
        per_image = 1 if config.train_data.tokens == "special" else shards.content_tokens
        n_train = decided(config.n_train)
        in_all = f", {n * n_train:,} SAE-tokens in all" if n > 1 else ""
        yield (
            f"Training {n} SAE{'s' * (n != 1)} on {n_train:,} tokens{' each' * (n != 1)}: "
            f"{n_train / n_tokens:.3g} epochs of {n_tokens:,}{in_all}."
        )
        for d_sae in sorted({decided(member.config.sae.d_sae) for member in group.members}):
            _warn_of_width(d_sae, n_tokens, per_image)


def _warn_of_width(d_sae: int, n_tokens: int, per_image: int) -> None:
    wanted = TOKENS_PER_LATENT * d_sae
    if n_tokens < wanted:
        say_once(
            logger,
            f"{n_tokens:,} tokens are few for {d_sae:,} latents: many of them will never fire, and "
            f"the others know these images only. {-(-wanted // per_image):,} images or more "
            "make a dictionary of this size; --d-sae (d_sae under [train.sae] of a config) makes a "
            "smaller one.",
        )
