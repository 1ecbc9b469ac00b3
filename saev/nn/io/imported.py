"""What readers of other projects' files are told by the user, and what they return."""

import dataclasses
import logging
import typing as tp

from torch import Tensor

from saev.config.sae import Activation, SaeConfig
from saev.errors import CheckpointError
from saev.nn.folding import Weights, fold_input
from saev.nn.sae import SparseAutoencoder
from saev.once import say_once

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the files do not say and a user has to. Defaults mean: not given."""

    subtract_b_dec: bool = False
    """The encoder of a published sae.pt saw x - b_dec."""
    centre: Tensor | None = None
    """[d_model], subtracted from x before the SAE saw it."""
    scale: float | None = None
    """The factor by which x - centre was multiplied."""
    top_k: int | None = None
    """Latents kept per token, where a state dict does not record it."""

    def given(self) -> list[str]:
        """Names of those that are given."""
        fields = dataclasses.fields(self)
        return [f.name for f in fields if getattr(self, f.name) is not f.default]


@dataclasses.dataclass(frozen=True)
class Imported:
    """z = x·W_enc + b_enc, f = activation(z), x̂ = f·W_dec + b_dec, of any floating type."""

    activation: Activation
    weights: Weights
    source: str
    """The file of the weights."""
    needs_scale: bool = False
    """Whether its config says that its input was scaled, but not by which factor."""
    may_need_scale: bool = False
    """Whether its input may have been centred and scaled without its files saying so."""

    def to_sae(self, options: Options) -> SparseAutoencoder:
        """The SAE on activations as they were recorded.

        Raises:
            CheckpointError: more latents are kept than there are, or its input has to be scaled.
            ConfigError: centre or scale do not fit.
        """
        d_model, d_sae = self.weights["W_enc"].shape
        cfg = SaeConfig(d_model=d_model, d_sae=d_sae, activation=self.activation)
        sae = SparseAutoencoder.from_tensors(cfg, self.weights, source=self.source)
        if options.centre is None and options.scale is None:
            self._check_scale()
            return sae
        scale = 1.0 if options.scale is None else options.scale
        weights = fold_input(self.weights, options.centre, scale)
        return SparseAutoencoder.from_tensors(cfg, weights, source=self.source)

    def _check_scale(self) -> None:
        if self.needs_scale:
            raise CheckpointError(
                f"{self.source} was trained on scaled activations (normalize_activations is "
                "expected_average_only_in), but its folder does not record the factor. Give it as "
                "`scale`; 1 if it has been folded in already."
            )
        if self.may_need_scale:
            say_once(
                logger,
                f"{self.source} may have been trained on (x - mean)/scale: the published saev of "
                "that time did so by default, and its files do not say. It is read as if nothing "
                "was scaled. osunlp's DINOv2 SAE needs `centre` and `scale`, those of CLIP and "
                "BioCLIP do not (docs/python-api.md).",
            )


class Reader(tp.NamedTuple):
    """How to read SAEs of one project."""

    project: str
    """Name of the project in messages."""
    files: tuple[str, ...]
    """Names of the objects in its folders. The reader gets the URL of the object if there is one
    name, of the folder if there are several."""
    read: tp.Callable[[str, Options], Imported]
    """Reads the file or folder at a URL."""
    takes: frozenset[str] = frozenset()
    """Options that this project's files need, beside centre and scale."""
