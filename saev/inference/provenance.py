"""Finds out which activations an SAE was trained on. Needs no torch."""

import contextlib
import logging
import typing as tp

from saev import storage
from saev.config.source import ActivationSource
from saev.config.train import TrainConfig
from saev.errors import SaevError
from saev.once import say_once
from saev.shards.protocol import Metadata

logger = logging.getLogger(__name__)

CHECKPOINT = ("checkpoint", "config.json")


def read_run(run: str) -> TrainConfig | None:
    """The config of a run's training; None if ``run`` is not a run folder."""
    config = storage.join(run, "config.json") if not run.startswith("hf-hub:") else ""
    is_run = config and storage.is_dir(storage.join(run, "checkpoint")) and storage.exists(config)
    return TrainConfig.of_run(run) if is_run else None


def trained_on(
    run: str, metadata: tp.Mapping[str, tp.Any] | None = None
) -> ActivationSource | None:
    """The source of the activations, as a run or a checkpoint records it.

    Runs of version 0.1.0 recorded less. Missing values are taken from the shards folder that the
    run names, if it still exists.

    Args:
        run: URL of a run folder, or another name of the SAE for messages.
        metadata: of the checkpoint; by default, those of the run's checkpoint are read.

    Returns:
        The source; None if nothing is known, as for imported SAEs.
    """
    trained = read_run(run)
    if metadata is None:
        metadata = _read_metadata(run) if trained else {}
    found = ActivationSource.from_dict(dict(metadata), source=f"the checkpoint of {run}")
    if trained is None and found.family is None:
        say_once(
            logger,
            f"{run} does not say which activations it was trained on. So it is not checked whether "
            "it fits the model, layer and preprocessing of these activations.",
        )
        return None
    if "image_spec" in metadata or trained is None:  # nothing is missing, or there is no run
        return found
    data = trained.train_data
    layer = data.layer if isinstance(data.layer, int) else None
    found = found.filled(ActivationSource(layer=layer, tokens=data.tokens))
    earlier = _shards_of(run, data.shards, found)
    how = f"taken from {data.shards}" if earlier else "not known, since its shards are gone"
    say_once(
        logger,
        f"{run} was trained by version 0.1.0 of saev, which did not record the weights and the "
        f"preprocessing of the model. They are {how}.",
    )
    return found.filled(earlier) if earlier else found


def _read_metadata(run: str) -> dict[str, tp.Any]:
    place = storage.join(run, *CHECKPOINT)
    raw = storage.find_sealed(place, remedy="Restore the run folder from a copy.")
    found = raw.record.get("metadata") if raw else None
    return found if isinstance(found, dict) else {}


def _shards_of(run: str, url: str, found: ActivationSource) -> ActivationSource | None:
    """The source of the shards that the run was trained on; None if they are gone or others."""
    with contextlib.suppress(SaevError):
        place = storage.recorded_folder(url, storage.join(run, "config.json"), "")
        earlier = Metadata.read(place).source()
        if found.shards in (None, earlier.shards):
            return earlier
    return None
