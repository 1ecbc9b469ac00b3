"""The vectors of a shards folder that a config selects.

Selecting reads only labels.bin and copies nothing. Unwanted vectors are left out of the index.
"""

import copy
import typing as tp

import numpy as np

from saev.config.loaders import DataConfig
from saev.errors import ConfigError
from saev.shards import Shards
from saev.shards.protocol import in_validation

_CHUNK_EXAMPLES = 1 << 16


class Selection:
    """The wanted layers, examples and tokens.

    Args:
        shards: the folder.
        cfg: the config.
        labels: whether token labels will be needed.
        example_range: only examples in [start, stop).

    Raises:
        ConfigError: the layer was not recorded, there is no class token, there are no labels, or
            no tokens are selected (an ``example_range`` may be without tokens).
    """

    def __init__(
        self,
        shards: Shards,
        cfg: DataConfig,
        *,
        labels: bool = False,
        example_range: tuple[int, int] | None = None,
    ):
        self.layers = selected_layers(shards, cfg.layer)
        """Block numbers."""
        self.tokens = cfg.tokens
        self.has_cls = shards.metadata.cls_token
        self.content_tokens = shards.content_tokens
        self._check_tokens(shards, labels)
        by_label = bool(cfg.ignore_labels) and cfg.tokens != "special"
        self.labels = _read_labels(shards, cfg) if labels or by_label else None
        """Labels, uint8 [n_examples, content_tokens], if they are needed."""
        self.ignored: np.ndarray | None = None
        """Mask of the ignored labels, bool [256]."""
        if by_label:
            self.ignored = np.zeros(256, dtype=bool)
            self.ignored[list(cfg.ignore_labels)] = True

        self._shard_starts = shards.shard_starts
        self._choose(_examples(shards, cfg, example_range))
        if not len(self.examples) and example_range is None:
            raise ConfigError(_nothing_left(shards, cfg))

    def _choose(self, examples: np.ndarray) -> None:
        rows = self._count_rows(examples)
        wanted = rows > 0
        self.examples = examples[wanted]
        """Examples with wanted rows, int64, ascending."""
        self.cum_rows = np.append(0, np.cumsum(rows[wanted], dtype=np.int64))
        """int64 [n + 1], wanted rows of one layer before each wanted example."""
        self.shard_bounds = np.searchsorted(self.examples, self._shard_starts).astype(np.int64)
        """int64 [n_shards + 1], where each shard begins in `examples`."""

    def only(self, examples: np.ndarray) -> tp.Self:
        """The same of some of the wanted examples, int64, ascending. Reads nothing."""
        fewer = copy.copy(self)
        fewer._choose(examples)
        return fewer

    def _check_tokens(self, shards: Shards, labels: bool) -> None:
        if self.tokens == "special" and not self.has_cls:
            raise ConfigError(
                f"tokens=special, but {shards.url} has no class token. Use tokens=content, or "
                "record a model that has one with --cls-token."
            )
        if self.tokens == "special" and labels:
            raise ConfigError(
                "Token labels were asked for with tokens=special, but only content tokens have "
                "labels. Use tokens=content or tokens=all."
            )

    @property
    def n_tokens(self) -> int:
        """Wanted rows, over all layers."""
        return int(self.cum_rows[-1]) * len(self.layers)

    @property
    def max_shard_examples(self) -> int:
        """Most wanted examples in a shard."""
        return int(np.diff(self.shard_bounds).max(initial=0))

    @property
    def kept_tokens(self) -> int:
        """Tokens of an example that a window holds.

        With tokens=special, only the class token is kept. Otherwise all tokens are kept as they are
        in the file, because a class token is small beside hundreds of content tokens.
        """
        return 1 if self.tokens == "special" else self.content_tokens + int(self.has_cls)

    def mask(self, examples: np.ndarray) -> np.ndarray:
        """Mask of the wanted tokens among the kept tokens of examples, bool [n, kept_tokens]."""
        mask = np.ones((len(examples), self.kept_tokens), dtype=bool)
        first = int(self.has_cls)
        if self.tokens == "content" and self.has_cls:
            mask[:, 0] = False
        if self.ignored is not None:
            assert self.labels is not None
            np.logical_not(self.ignored[self.labels[examples]], out=mask[:, first:])
        return mask

    def rows(self, examples: np.ndarray) -> np.ndarray:
        """Positions of the wanted rows in a window of examples, int64."""
        return np.flatnonzero(self.mask(examples))

    def _count_rows(self, examples: np.ndarray) -> np.ndarray:
        if self.ignored is None:
            per_example = int(self.mask(np.zeros(1, np.int64)).sum())
            return np.full(len(examples), per_example, dtype=np.int64)
        chunks = [
            self.mask(examples[i : i + _CHUNK_EXAMPLES]).sum(axis=1)
            for i in range(0, len(examples), _CHUNK_EXAMPLES)
        ]
        return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)


def selected_layers(shards: Shards, layer: int | str | None) -> tuple[int, ...]:
    """The block numbers of `DataConfig.layer`. Raises ConfigError if one was not recorded."""
    if layer == "all":
        return shards.layers
    assert not isinstance(layer, str)
    return (shards.layers[shards.layer_index(layer)],)


def _read_labels(shards: Shards, cfg: DataConfig) -> np.ndarray:
    labels = shards.labels()
    if labels is None:
        why = f"ignore_labels={list(cfg.ignore_labels)}" if cfg.ignore_labels else "Token labels"
        raise ConfigError(
            f"{why} needs labels.bin, which {shards.url} does not have: it was not recorded from a "
            "segmentation dataset (img-seg-folder)."
        )
    return labels


def _examples(shards: Shards, cfg: DataConfig, span: tuple[int, int] | None) -> np.ndarray:
    start, stop = span if span is not None else (0, shards.n_examples)
    if not 0 <= start <= stop <= shards.n_examples:
        raise ConfigError(
            f"Examples {start}:{stop} are not in {shards.url}: it has {shards.n_examples}."
        )
    examples = np.arange(start, stop, dtype=np.int64)
    if cfg.split == "all":
        return examples
    in_val = in_validation(examples, cfg.val_fraction)
    return examples[in_val if cfg.split == "val" else ~in_val]


def _nothing_left(shards: Shards, cfg: DataConfig) -> str:
    if not shards.n_examples:
        return f"{shards.url} has no examples."
    if cfg.split == "val" and not cfg.val_fraction:
        return f"split=val with val_fraction=0 selects nothing of {shards.url}. Set val_fraction."
    return (
        f"No tokens are left of {shards.url}: tokens={cfg.tokens}, "
        f"ignore_labels={list(cfg.ignore_labels)}, split={cfg.split}, "
        f"val_fraction={cfg.val_fraction:g}. Select more."
    )
