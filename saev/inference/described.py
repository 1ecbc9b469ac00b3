"""Which activations an SAE encodes, as far as its run, its results or a shards folder says."""

from saev import storage
from saev.config.base import Tokens
from saev.config.source import ActivationSource, check
from saev.errors import ConfigError
from saev.inference import files, provenance
from saev.inference.results import Results
from saev.nn.sae import SparseAutoencoder
from saev.shards.protocol import Metadata


class Describe:
    """Which activations an SAE encodes: those of results, of a shards folder, or of its training.

    Args:
        shards: URL of a shards folder, or "".
        results: what was measured, or None.
        layer: block number, if it is given.
        tokens: if they are given.
        allow: only warn if the SAE was trained on another model.
    """

    def __init__(
        self,
        shards: str,
        results: Results | None,
        layer: int | None,
        tokens: Tokens | None,
        *,
        allow: bool,
    ):
        self._shards = storage.normalize(shards) if shards else ""
        self._metadata = Metadata.read(self._shards) if shards else None
        self._results, self._layer, self._tokens, self._allow = results, layer, tokens, allow

    def __call__(self, run: str, sae: SparseAutoencoder) -> tuple[ActivationSource, str]:
        """The activations, and the URL of the file or folder that describes them.

        Raises:
            ConfigError: what has to be known of them was not recorded.
        """
        found, record = self._find(run, sae)
        if found.image_spec is None:
            raise ConfigError(
                f"{record} does not say how images were cropped and scaled for the model, because "
                "an earlier version or another program wrote it. Name a shards folder that says "
                "it with --shards URL."
            )
        return found, record

    def _find(self, run: str, sae: SparseAutoencoder) -> tuple[ActivationSource, str]:
        if self._results is not None and "source" in self._results.metrics:
            record = storage.join(self._results.url, files.METRICS)
            return ActivationSource.from_dict(
                self._results.metrics["source"], source=record
            ), record
        trained = provenance.trained_on(run, sae.metadata)
        layer = self._layer
        if layer is None and trained is not None:
            layer = trained.layer
        tokens = self._tokens or (trained.tokens if trained else None) or "content"
        if self._metadata is not None:
            found, record = (
                self._recorded(self._metadata, run, trained, layer, tokens),
                self._shards,
            )
        elif trained is not None and trained.family is not None:
            chosen = {"layer": layer, "tokens": tokens}
            found, record = trained.model_copy(update=chosen), run
        else:
            raise ConfigError(
                f"{run} does not say which activations it was trained on. Name a shards folder of "
                "its model with --shards URL."
            )
        if found.layer is None:
            raise ConfigError(f"{run} does not say which layer it reads. Name it with --layer N.")
        return found, record

    def _recorded(
        self,
        metadata: Metadata,
        run: str,
        trained: ActivationSource | None,
        layer: int | None,
        tokens: Tokens,
    ) -> ActivationSource:
        if layer is None and len(metadata.layers) == 1:
            layer = metadata.layers[0]
        if layer is not None and layer not in metadata.layers:
            raise ConfigError(
                f"{run} reads layer {layer}, {self._shards} has the layers "
                f"{', '.join(map(str, metadata.layers))}. Name other shards, or a layer."
            )
        found = metadata.source(layer, tokens)
        if trained is not None:
            sae = f"The SAE at {run}"
            check(trained, found, sae=sae, shards=self._shards, allow=self._allow)
        return found
