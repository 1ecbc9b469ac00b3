"""Options and results of the readers of other projects' files."""

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
    """Facts that the files do not record, so that the user has to give them. A default means that
    an option was not given."""

    subtract_b_dec: bool = False
    """Whether the encoder of a published sae.pt takes x - b_dec."""
    centre: Tensor | None = None
    """[d_model]; the SAE was trained on (x - centre)·scale."""
    scale: float | None = None
    """The factor in (x - centre)·scale."""
    top_k: int | None = None
    """Latents kept per token, if the state dict does not record it."""

    def given(self) -> list[str]:
        """Names of the options that were given."""
        fields = dataclasses.fields(self)
        return [f.name for f in fields if getattr(self, f.name) is not f.default]


@dataclasses.dataclass(frozen=True)
class Imported:
    """An SAE in saev's form: z = x·W_enc + b_enc, f = activation(z), x̂ = f·W_dec + b_dec. Weights
    are of any floating type."""

    activation: Activation
    weights: Weights
    source: str
    """The file of the weights."""
    needs_scale: bool = False
    """Whether its config says that inputs were scaled, without recording the factor."""
    may_need_scale: bool = False
    """Whether inputs may have been centred and scaled without a record in its files."""

    def to_sae(self, options: Options) -> SparseAutoencoder:
        """The SAE on recorded activations.

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
                "that time did so by default, and its files do not record it. It is read as if "
                "nothing was scaled. osunlp's DINOv2 SAE needs `centre` and `scale`, those of CLIP "
                "and BioCLIP do not (docs/python-api.md).",
            )


class Reader(tp.NamedTuple):
    """How to read SAEs of one project."""

    project: str
    """Name of the project in messages."""
    files: tuple[str, ...]
    """Names of the objects in its folders. If there is one name, the reader gets the URL of the
    object. If there are several, it gets the URL of the folder."""
    read: tp.Callable[[str, Options], Imported]
    """Reads the file or folder at a URL."""
    takes: frozenset[str] = frozenset()
    """Options that this project's files need, beside centre and scale."""
