"""What is measured: an SAE, tokens, and the folder that their hash names."""

import contextlib
import functools
import hashlib
import typing as tp
from collections.abc import Sequence

import numpy as np
import torch

from saev import known, storage
from saev.config.inference import InferenceConfig
from saev.config.loaders import DataConfig
from saev.config.sae import SaeConfig
from saev.config.source import ActivationSource, check, compare
from saev.config.train import RUN, TrainConfig, open_run
from saev.device import choose_device
from saev.errors import ConfigError, CorruptDataError
from saev.failures import Failures
from saev.grouping import group_by, measuring_bytes
from saev.inference import embeddings, files, provenance, sides
from saev.inference.provenance import read_run
from saev.inference.source import TokenSource
from saev.nn.codes import encode
from saev.nn.io.load import HUB_PREFIX, load_sae
from saev.nn.sae import SparseAutoencoder
from saev.shards import Shards
from saev.shards.folders import Folders

FORMAT = 2
"""Part of the hash; raised when the same inputs would give other bytes."""

_MAX_LATENT_VALUES = 1 << 25
"""Most latent values, zeros included, of one step: 128 MB."""
_MAX_READ_BYTES = 1 << 26
_SAMPLE_TOKENS = 8192
_HASH_DIGITS = 16


class Opened(Folders):
    """Shards folders and their tokens, each opened once for all SAEs that read it."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[str, TokenSource] = {}

    def source(self, shards: Shards, data: DataConfig, *, labels: bool) -> TokenSource:
        """Reads the tokens of a folder that a config selects."""
        key = storage.content_hash([shards.url, data.to_dict(), labels])
        if key not in self._sources:
            self._sources[key] = TokenSource(shards, data, labels=labels)
        return self._sources[key]

    def close(self) -> None:
        """Close all folders."""
        super().close()
        self._sources.clear()


class Pass:
    """An SAE and the activations that it is run over. Each is opened when it is first needed.

    Args:
        cfg: the config.
        opened: what is open already, and stays open for other SAEs.

    Raises:
        ConfigError: there is no such device. Other methods: layer, widths, tokens or labels do not
            fit, or --out is needed.
        StorageError: shards or SAE are missing or damaged.
    """

    def __init__(self, cfg: InferenceConfig, opened: Opened | None = None):
        self.cfg = cfg
        self._others = opened or Opened()
        self.run = cfg.run if cfg.run.startswith(HUB_PREFIX) else storage.normalize(cfg.run)
        self.device = choose_device(cfg.device)

    @functools.cached_property
    def _trained(self) -> TrainConfig | None:
        return read_run(self.run)

    @functools.cached_property
    def _opened(self) -> tuple[Shards, DataConfig]:
        return open_shards(self.cfg, self._trained, self._others)

    @property
    def shards(self) -> Shards:
        """The activations."""
        return self._opened[0]

    @property
    def data(self) -> DataConfig:
        """Which of them, with shards and layer filled in."""
        return self._opened[1]

    @functools.cached_property
    def has_concepts(self) -> bool:
        """Whether tokens have labels to align latents with."""
        return self.cfg.concepts and self.data.tokens != "special" and self.shards.has_labels

    @functools.cached_property
    def source(self) -> TokenSource:
        """Reads the tokens."""
        return self._others.source(self.shards, self.data, labels=self.has_concepts)

    def sides(self, examples: np.ndarray) -> np.ndarray:
        """Which side of the SAE's training each example is on; see :mod:`saev.inference.sides`."""
        trained_hash = self.trained_on.shards if self.trained_on else None
        return sides.of_examples(self.shards, examples, self._trained, trained_hash)

    def embedder(self, shard: int) -> embeddings.Embedder:
        """Makes the embeddings of a shard's images."""
        wanted = embeddings.sample(self.source.examples)
        inside = np.intersect1d(wanted, self.source.shard_examples(shard), assume_unique=True)
        return embeddings.Embedder(self.shards, self.data, inside)

    @property
    def embedding_source(self) -> TokenSource:
        """Reads the tokens that embeddings are made of."""
        return self._others.source(self.shards, embeddings.config(self.shards), labels=False)

    @property
    def memory(self) -> int:
        """Most bytes that it takes. An SAE that is no run of training is loaded to know it."""
        cfg = self._trained.sae if self._trained else self.sae.cfg
        return memory_of(cfg, self.shards, self.cfg.n_top)

    @functools.cached_property
    def sae(self) -> SparseAutoencoder:
        """The SAE, which fits the activations."""
        cfg = self.cfg
        sae = load_sae(
            self.run,
            self.device,
            subtract_b_dec=cfg.subtract_b_dec,
            centre=cfg.centre or None,
            scale=cfg.scale,
            top_k=cfg.top_k,
        )
        if sae.d_model != self.shards.d_model:
            raise ConfigError(
                f"The SAE at {self.run} reads activations of width {sae.d_model}, those in "
                f"{self.shards.url} have width {self.shards.d_model}. Use shards of the model that "
                "it was trained on."
            )
        return sae

    @functools.cached_property
    def trained_on(self) -> ActivationSource | None:
        """What the SAE was trained on; None if that was not recorded."""
        metadata = self.sae.metadata if self._trained is None else None
        return provenance.trained_on(self.run, metadata)

    @property
    def _used(self) -> ActivationSource:
        layer = tp.cast(int, self.data.layer)
        return self.shards.metadata.source(layer, self.data.tokens)

    @functools.cached_property
    def other_model(self) -> tuple[str, ...]:
        """How these activations differ from those of training, if such a difference was allowed."""
        if self.trained_on is None:
            return ()
        return check(
            self.trained_on, self._used, sae=f"The SAE at {self.run}", shards=self.shards.url,
            allow=self.cfg.allow_other_model,
        )  # fmt: skip

    @functools.cached_property
    def _question(self) -> known.Question | None:
        """What decides about the key, as far as it is known without the SAE; None if it is not."""
        if self._trained is None or self.cfg.centre or not storage.exists(self._run_json):
            return None
        run = open_run(self.run)  # lists the checksum of the weights
        is_other = bool(self.trained_on and compare(self.trained_on, self._used).refused)
        if run.files is None or (is_other and not self.cfg.allow_other_model):
            return None
        sae = [run.checksum, {name: row.checksum for name, row in run.files.items()}]
        given = {k: getattr(self.cfg, k) for k in ("subtract_b_dec", "scale", "top_k")}
        return {**given, **_inputs(self.cfg, self.data, self.shards, sae, is_other=is_other)}

    @property
    def _run_json(self) -> str:
        return storage.join(self.run, RUN)

    @functools.cached_property
    def _known(self) -> known.Known | None:
        """The complete results that an equal config has named before."""
        folders = [storage.normalize(self.cfg.out)] if self.cfg.out else []
        if not folders and self._trained is not None:
            entries = storage.list_dir(storage.join(self.run, "inference"), missing_ok=True)
            folders = [entry.url for entry in entries if entry.is_dir]
        question = self._question if folders else None
        found = known.find(folders, question) if question is not None else None
        is_there = found is not None and storage.exists(storage.join(found.url, files.METRICS))
        return found if is_there else None

    @functools.cached_property
    def key(self) -> str:
        """Hash of all that the results depend on."""
        if self._known is not None:
            return self._known.key
        sae, is_other = sae_checksum(self.sae), bool(self.other_model)
        inputs = _inputs(self.cfg, self.data, self.shards, sae, is_other=is_other)
        return storage.content_hash(inputs, _HASH_DIGITS)

    @functools.cached_property
    def url(self) -> str:
        """The folder of the results."""
        if self.cfg.out:
            return storage.normalize(self.cfg.out)
        if self._trained is not None:
            return self._known.url if self._known else storage.join(self.run, "inference", self.key)
        _ = self.sae  # that there is no SAE at all comes first
        raise ConfigError(
            f"{self.run} is not a run folder (no config.json and checkpoint/), so the results have "
            "no place of their own. Say where they go with --out URL."
        )

    def place(self, name: str) -> str:
        """URL of one of the results."""
        return storage.join(self.url, name)

    @property
    def keeps_codes(self) -> bool:
        """Whether all codes are needed once the pass is over."""
        return self.cfg.save or self.has_concepts

    @property
    def examples_per_step(self) -> int:
        """A function of config and sizes alone: other steps could round otherwise."""
        shards = self.shards
        example_bytes = shards.tokens_per_example * shards.d_model * shards.dtype.itemsize
        rows = min(self.cfg.batch_size, _MAX_LATENT_VALUES // self.sae.d_sae)
        tokens = 1 if self.data.tokens == "special" else shards.tokens_per_example
        return max(1, min(rows // tokens, _MAX_READ_BYTES // example_bytes))

    def published(self) -> bool:
        """Whether the results are complete.

        Raises:
            ConfigError: they are those of other inputs.
            CorruptDataError: metrics.json is damaged, or the config that it lists.
        """
        if not storage.exists(self.place(files.METRICS)):
            return False
        folder = storage.Folder.open(self.url, files.METRICS, files.REMEDY)
        if folder.files is not None:
            folder.read_bytes(files.CONFIG)
        self.recorded()  # compares the key that this config has
        return True

    def note(self) -> None:
        """Write down which question published results answer, unless that is known."""
        if self._known is None and self._question is not None:
            known.note(self.url, self._question, self.key)

    def forget(self) -> None:
        """Free the memory of the SAE, which is loaded anew when it is needed again."""
        self.__dict__.pop("sae", None)

    @functools.cached_property
    def dist_latents(self) -> tuple[int, ...]:
        """The latents whose values are kept, once they are claimed."""
        latents = self.recorded().get("dist_latents")
        if not isinstance(latents, list) or not all(
            type(n) is int and 0 <= n < self.sae.d_sae for n in latents
        ):
            raise CorruptDataError(
                f"{self.place(files.CONFIG)} has dist_latents {latents!r:.60}, expected latents of "
                f"the SAE. {files.REMEDY}"
            )
        return tuple(latents)

    def recorded(self) -> dict[str, tp.Any]:
        """What config.json says.

        Raises:
            ConfigError: the folder belongs to other inputs.
        """
        found = storage.read_sealed(self.place(files.CONFIG), remedy=files.REMEDY).record
        if found.get("key") != self.key:
            raise ConfigError(
                f"{self.url} holds the results of other inputs (key {found.get('key')}, expected "
                f"{self.key}). Choose another --out, or delete that folder."
            )
        return found

    def describe(self, dist_latents: tuple[int, ...]) -> dict[str, tp.Any]:
        """What config.json says."""
        resolved = self.cfg.model_copy(update={"data": self.data}).to_dict()
        for name in ("out", "part", "device", "allow_other_model"):  # they change no result
            del resolved[name]
        return {
            "key": self.key,
            "config": resolved,
            "shards_hash": self.shards.metadata.hash,
            "content_tokens": self.shards.content_tokens,
            "d_model": self.sae.d_model,
            "d_sae": self.sae.d_sae,
            "dist_latents": dist_latents,
        }


def memory_of(cfg: SaeConfig, shards: Shards, n_top: int) -> int:
    """Most bytes that an SAE takes while it is measured.

    Args:
        cfg: of the SAE.
        shards: the activations.
        n_top: examples kept per latent.
    """
    d_sae = cfg.d_sae or cfg.exp_factor * shards.d_model
    return measuring_bytes(shards.d_model, d_sae, shards.tokens_per_example, n_top)


def claim(members: Sequence[Pass], failures: Failures[Pass]) -> None:
    """Write config.json of each result unless it is there.

    Args:
        members: of one group: they read the same tokens.
        failures: gets the errors of single SAEs, such as that a folder belongs to other inputs.
    """
    missing = []
    for one in members:
        with failures.of(one):
            if not storage.exists(one.place(files.CONFIG)):
                _ = one.sae
                missing.append(one)
    for one, latents in zip(missing, _choose_dists(missing), strict=True):
        with failures.of(one):
            storage.write_json(one.place(files.CONFIG), storage.seal(one.describe(latents)))
    for one in failures.left(members):
        with failures.of(one):
            _ = one.dist_latents


def _choose_dists(members: Sequence[Pass]) -> list[tuple[int, ...]]:
    """For each SAE latents at even steps from the rarest to the most frequent of a small sample.

    They must be known before the pass, wherever its parts run; so every worker looks at the
    same examples, spread over the dataset.
    """
    wanted = [min(one.cfg.n_dists, one.sae.d_sae) for one in members]
    if not any(wanted):
        return [() for _ in members]
    first, by_size = members[0], group_by(members, lambda one: one.examples_per_step)
    every = first.source.examples
    n_picks = max(1, min(len(every), _SAMPLE_TOKENS // first.shards.tokens_per_example))
    picks = np.linspace(0, len(every) - 1, n_picks).round().astype(np.int64)
    counts = {one: np.zeros(one.sae.d_sae, dtype=np.int64) for one in members}
    for size, chunk in first.source.chunks(every[np.unique(picks)], [*by_size], first.device):
        for one in by_size[size]:
            latents = encode(one.sae, chunk.x).latents
            counts[one] += torch.bincount(latents, minlength=one.sae.d_sae).cpu().numpy()
    return [
        spread_by_frequency(counts[one], n) if n else ()
        for one, n in zip(members, wanted, strict=True)
    ]


def spread_by_frequency(counts: np.ndarray, n: int) -> tuple[int, ...]:
    """``n`` latents at even ranks among those that fire, by frequency; ascending.

    If too few fire, the first silent ones fill up.
    """
    order = np.argsort(counts, kind="stable")
    firing = order[counts[order] > 0]
    if len(firing) <= n:
        silent = np.flatnonzero(counts == 0)[: n - len(firing)]
        return tuple(sorted(map(int, [*firing, *silent])))
    ranks = np.linspace(0, len(firing) - 1, n).round().astype(np.int64)
    return tuple(sorted(map(int, firing[ranks])))


def open_shards(
    cfg: InferenceConfig, trained: TrainConfig | None, folders: Folders
) -> tuple[Shards, DataConfig]:
    """The shards, and `cfg.data` with what was left out filled in from the run.

    Args:
        cfg: the config.
        trained: how the SAE was trained, if it is known.
        folders: what is open already.

    Raises:
        ConfigError: no shards are known, or the layer was not recorded.
    """
    data = cfg.data
    theirs = trained.train_data if trained else DataConfig()
    remedy = "Say which activations with --data.shards URL."
    if data.shards:
        url = data.shards
    elif theirs.shards:
        run = storage.join(cfg.run, "config.json")
        url = storage.recorded_folder(theirs.shards, run, remedy)
    else:
        raise ConfigError(f"No activations. {remedy}")
    shards = folders[url]
    layer = data.layer if data.layer is not None else theirs.layer
    if layer == "all":
        raise ConfigError("Inference reads one layer; --data.layer all is for loaders only.")
    layer = shards.layers[shards.layer_index(layer)]
    return shards, data.model_copy(update={"shards": shards.url, "layer": layer})


def _inputs(
    cfg: InferenceConfig,
    data: DataConfig,
    shards: Shards,
    sae: tp.Any,
    *,
    is_other: bool,
) -> dict[str, tp.Any]:
    """All that results depend on; ``sae`` is what tells the SAE from others."""
    return {
        "format": FORMAT,
        "sae": sae,
        "shards": shards.metadata.hash,
        "n_examples": shards.n_examples,
        "data": {k: v for k, v in data.identity().items() if k != "shards"},
        **{k: getattr(cfg, k) for k in ("n_dists", "n_top", "save", "concepts", "batch_size")},
        # Keys that came later do not change the names of results while they have their defaults.
        **{k: v for k, v in cfg.identity().items() if k in ("image_floor", "npz")},
        # Version 0.1.0 measured on activations of another model without a warning. Its results must
        # not pass for ones that name the difference.
        **({"other_model": True} if is_other else {}),
    }


def current_keys(
    run: str, shards_url: str, recorded: tp.Mapping[str, tp.Mapping[str, tp.Any]]
) -> tuple[str, list[str]]:
    """What this version of saev would name the results of a run on a shards folder.

    Args:
        run: URL of the run folder.
        shards_url: URL of the shards folder.
        recorded: config.json of results that are there, by any name.

    Returns:
        The key that `saev inference` gives without further flags, or with --allow-other-model alone
        where it asks for that flag; and the names of those recorded results that it would accept as
        its own.
    """
    trained, sae = read_run(run), load_sae(run)
    trained_on, checksum = provenance.trained_on(run, sae.metadata), sae_checksum(sae)

    folders = Folders()

    def key(config: tp.Mapping[str, tp.Any]) -> str:
        cfg = InferenceConfig.from_dict({**config, "run": run})
        data = cfg.data.model_copy(update={"shards": shards_url})
        shards, data = open_shards(cfg.model_copy(update={"data": data}), trained, folders)
        used = shards.metadata.source(tp.cast(int, data.layer), data.tokens)
        is_other = trained_on is not None and bool(compare(trained_on, used).refused)
        inputs = _inputs(cfg, data, shards, checksum, is_other=is_other)
        return storage.content_hash(inputs, _HASH_DIGITS)

    current = []
    for name, raw in recorded.items():
        with contextlib.suppress(ConfigError):  # a config of another version
            if raw["key"] == key(raw["config"]):
                current.append(name)
    return key({}), current


def sae_checksum(sae: SparseAutoencoder) -> str:
    """SHA-256 of what the SAE computes: activation and weights, however they are stored."""
    digest = hashlib.sha256(storage.canonical_json(sae.cfg.activation.identity()).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()
