"""Opens what the page of an SAE is made from: its results, its shards and their images."""

import functools
import typing as tp

from saev import storage
from saev.config import VisualsConfig
from saev.config.source import ActivationSource, check
from saev.errors import ConfigError
from saev.inference.results import Results
from saev.shards import protocol
from saev.visuals.choose import Choice, choose
from saev.visuals.source import Source, read_class_names, recorded_data
from saev.visuals.views import Images


class Opened:
    """An SAE's results and the images that they belong to. Images are opened when they are needed.

    Args:
        cfg: the config.
        images: the images, shared with other SAEs.

    Raises:
        ConfigError: shards and inference do not fit together.
        StorageError: one of them is missing.
    """

    def __init__(self, cfg: VisualsConfig, images: Images):
        self.cfg = cfg
        self._images = images
        self.shards = images.shards(cfg.shards)
        self.results = self._open_results()
        self.other_model = self._check_model()
        """How the activations differ from those of training, if a difference was allowed."""

    def _open_results(self) -> Results:
        shards_hash = self.shards.metadata.hash
        if not self.cfg.inference:
            run = storage.normalize(self.cfg.run)
            return Results.find(run, shards_hash, self.shards.url)
        results = Results.open(self.cfg.inference)
        found = results.metrics.get("shards_hash")
        if found != shards_hash:
            raise ConfigError(
                f"{results.url} was measured on shards {found}, but --shards {self.shards.url} are "
                f"{shards_hash}. Give the shards that inference ran on."
            )
        return results

    def _check_model(self) -> tuple[str, ...]:
        trained_on = self.results.trained_on(self.cfg.run)
        if trained_on is None:
            return ()
        return check(
            trained_on, self.activations, sae=f"The SAE at {storage.normalize(self.cfg.run)}",
            shards=self.shards.url, allow=self.cfg.allow_other_model,
        )  # fmt: skip

    @property
    def activations(self) -> ActivationSource:
        """The activations on which the SAE was measured."""
        metrics = self.results.metrics
        return self.shards.metadata.source(metrics.get("layer"), metrics.get("tokens"))

    @functools.cached_property
    def choice(self) -> Choice:
        """The latents that the config chooses."""
        return choose(self.cfg, self.results.frequency, self.results.mean_values)

    @property
    def source(self) -> Source:
        """The images. They are opened once, at the first use by any SAE."""
        return self._images.source(self.shards, self.cfg.data)

    def mask_names(self) -> dict[int, str]:
        """Names of the values of masks, if they are known. Opens no images."""
        data = self.cfg.data
        if data is None:
            try:
                data = recorded_data(self.shards)
            except ConfigError:  # the location of the images is unknown, or not trusted
                return {}
        return read_class_names(data)

    @property
    def other_data(self) -> tp.Any:
        """The dataset's config, as a part of keys. None if it is the recorded dataset, also in
        another place."""
        given = self.cfg.identity()["data"]
        if given is None or self.shards.metadata.data_digest is None:
            return given
        plain, recorded = map(_without_place, (given, self.shards.metadata.data))
        return None if plain == recorded else plain


def _without_place(data: tp.Any) -> tp.Any:
    """A dataset's config without the location, and without what the images' digest covers."""
    plain = protocol.without_place(data)
    if not isinstance(plain, dict):
        return plain
    return {k: v for k, v in plain.items() if k not in ("name", "version")}
