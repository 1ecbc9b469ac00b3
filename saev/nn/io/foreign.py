"""SAEs of other projects, one module per format. The module is chosen by the file's content."""

import typing as tp

from saev import storage
from saev.errors import CheckpointError
from saev.nn.io import (
    dictionary_learning,
    files,
    gemma_scope,
    overcomplete,
    published,
    saelens,
    sparsify,
)
from saev.nn.io.imported import Imported, Options, Reader

READERS = tuple(
    module.READER
    for module in (saelens, sparsify, published, dictionary_learning, gemma_scope, overcomplete)
)


class Found(tp.NamedTuple):
    """An SAE of another project."""

    reader: Reader
    url: str
    """Its file or folder."""

    def read(self, options: Options) -> Imported:
        """Read it.

        Raises:
            CheckpointError: it cannot be imported, or an option does not fit its format.
        """
        for name in options.given():
            if name in ("centre", "scale") or name in self.reader.takes:
                continue
            takers = [reader.project for reader in READERS if name in reader.takes]
            raise CheckpointError(
                f"{name} is for SAEs of {' and '.join(takers)}, but {self.url} is of "
                f"{self.reader.project}. Leave it out."
            )
        return self.reader.read(self.url, options)


def find_in_folder(url: str, names: frozenset[str]) -> Found | None:
    """The SAE in a folder that holds objects with these names; None if there is none."""
    for reader in READERS:
        if reader.files and names.issuperset(reader.files):
            is_folder = len(reader.files) > 1
            return Found(reader, url if is_folder else storage.join(url, reader.files[0]))
    return None


def find_in_file(url: str) -> Found | None:
    """The SAE in a file, recognised by its content; None if the format is unknown.

    Raises:
        CheckpointError: it is a state dict of an unknown kind.
    """
    name = storage.name(url)
    if name.endswith((".safetensors", ".json")):  # one of the objects of a folder
        folder = storage.parent(url)
        names = frozenset(entry.name for entry in storage.list_dir(folder))
        return find_in_folder(folder, names)
    with storage.open_read(url) as file:
        head = file.read(1)
    if head == b"{":
        return Found(published.READER, url)
    if name.endswith(".npz"):
        return Found(gemma_scope.READER, url)
    if head != b"P":  # of PK, a zip archive
        return None
    tensors = files.read_state_dict(url)
    for module in (dictionary_learning, overcomplete):
        if module.fits(tensors):
            return Found(module.READER, url)
    raise CheckpointError(
        f"{url} is a state dict of {_seems(tensors)}, with {files.names(tensors)}. Only those of "
        f"{overcomplete.READER.project} and {dictionary_learning.READER.project} can be imported."
    )


def _seems(tensors: tp.Collection[str]) -> str:
    for marks, project in _STATE_DICTS:
        if marks <= set(tensors):
            return project
    return "an unknown kind"


_STATE_DICTS = (
    ({"pre_bias", "latent_bias", "encoder.weight"}, "OpenAI's sparse_autoencoder"),
    ({"W_enc", "b_enc", "W_dec", "b_dec"}, "an SAE without its config"),
    ({"encoder.weight", "decoder.weight"}, "an autoencoder of unknown activation"),
)

_SEEMS = (
    (("shards.json",), "the activations of saev shards, on which SAEs are trained"),
    (("metadata.json", "acts000000.bin"), "activations, on which SAEs are trained"),
    (("adapter_config.json",), "an adapter of PEFT"),
    (("open_clip_config.json",), "a CLIP model of open_clip"),
    (("params.safetensors",), "an SAE of Gemma Scope 2, which cannot be imported"),
    (("trainer_state.safetensors",), "a training state of SAELens"),
    (("weights.pt", "config.json"), "an SAE of ViT-Prisma, which cannot be imported"),
    (("cfg.json",), "the config of an SAE of SAELens or sparsify without its weights"),
    (("config.json", "model.safetensors"), "a model of transformers"),
    (("config.json", "pytorch_model.bin"), "a model of transformers"),
    (("resume",), "a run of saev that is not finished"),
    (("metrics.json", "mean_values.safetensors"), "results of saev inference"),
)


_MAX_FOLDERS = 20
"""Most subfolders to look into."""


def describe(url: str) -> str:
    """A sentence about the probable content of a folder without an SAE; "" if it is unclear."""
    entries = storage.list_dir(url)
    names = {entry.name for entry in entries}
    for marks, what in _SEEMS:
        if names.issuperset(marks):
            return f"It seems to hold {what}."
    folders = sorted(entry.name for entry in entries if entry.is_dir)[:_MAX_FOLDERS]
    inner = [name for name in folders if _holds_sae(storage.join(url, name))]
    if inner:
        return f"Folders in it hold SAEs: give one of {files.names(inner)}."
    states = [name for name in names if name.endswith((".pt", ".pth", ".npz"))]
    if states:
        return f"If one of {files.names(states)} is an SAE, give that file."
    return ""


def _holds_sae(url: str) -> bool:
    names = frozenset(entry.name for entry in storage.list_dir(url))
    return find_in_folder(url, names) is not None or {"sae.safetensors", "config.json"} <= names
