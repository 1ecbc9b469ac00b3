"""Names of checkpoints, weights files, and fitting what a file holds into a network."""

import contextlib
import hashlib
import io
import json
import logging
import re
import types
import typing as tp
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from saev import storage
from saev.errors import CorruptDataError, ModelError
from saev.once import say_once

logger = logging.getLogger(__name__)

ARCHITECTURE = "architecture"
"""Key of a safetensors file's metadata that names the architecture its weights belong to."""

RANDOM = "random"
LOCAL_DIR = "local-dir:"
"""Begins the name of a folder that holds a network's config and its weights."""
_SEED = 0
_WEIGHTS_SUFFIX = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_CONTAINERS = (
    *("state_dict_ema", "model_ema", "state_dict", "model"),  # as timm looks for them
    *("teacher", "encoder", "module"),
)
"""Keys under which training scripts keep the weights, most wanted first."""


class CkptName(tp.NamedTuple):
    """What a checkpoint's name says."""

    arch: str | None
    """Architecture; None if only a URL is given."""
    tag: str | None = None
    """Which pretrained weights of the architecture."""
    url: str | None = None
    """Where the weights are, if they are in a file."""
    random: bool = False
    """Untrained weights."""


def parse(ckpt: str) -> CkptName:
    """Take a checkpoint's name apart.

    ``ARCH``, ``ARCH/TAG``, ``ARCH/random``, ``ARCH@URL``, ``ARCH/TAG@URL``, ``ARCH/URL`` (if the
    rest is a URL, an absolute path, or ends like a weights file) and ``URL`` alone (with a scheme,
    or starting with ``/``, ``./``, ``../`` or ``~``).

    Raises:
        ModelError: a part is empty.
    """
    name = ckpt.strip()
    url = None
    if re.match(r"[A-Za-z][\w+.-]*://|/|\./|\.\./|~", name):
        return CkptName(None, url=name)
    if "@" in name:
        name, url = name.split("@", 1)
    arch, slash, rest = name.partition("/")
    if not arch or (slash and not rest) or url == "":
        raise ModelError(
            f"Checkpoint '{ckpt}' is incomplete; expected ARCH, ARCH/TAG, ARCH/random or ARCH@URL."
        )
    if url is None and ("://" in rest or rest.startswith("/") or rest.endswith(_WEIGHTS_SUFFIX)):
        return CkptName(arch, url=rest)
    if rest == RANDOM:
        if url is not None:
            raise ModelError(
                f"Checkpoint '{ckpt}' asks for random weights and for a file; drop one."
            )
        return CkptName(arch, random=True)
    return CkptName(arch, rest or None, url)


def without_place(ckpt: str, ckpt_checksum: str | None) -> str:
    """A checkpoint's name, without the URL of its weights file if they were read from one.

    Args:
        ckpt: as the user wrote it.
        ckpt_checksum: of the weights file; None if there is none, and the name stays as it is.
    """
    if ckpt_checksum is None:
        return ckpt
    if ckpt.startswith(LOCAL_DIR):
        return LOCAL_DIR
    name = parse(ckpt)
    if name.url is None:
        return ckpt
    return "/".join(part for part in (name.arch, name.tag) if part) + "@"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and little-endian values, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{sha.hexdigest()}"


def structure(module: nn.Module) -> str:
    """SHA-256 over what a network is beside its tensors: what a forward pass calls, and with what.

    These are the names and types of all modules (activation functions are modules), and their plain
    attributes, such as the number of heads or the epsilon of a norm. Equal tensors with an equal
    structure are the same function. One function may have two structures, as versions of libraries
    add attributes.
    """
    found = [
        [name, type(part).__qualname__, sorted(_attributes(part))]
        for name, part in module.named_modules()
    ]
    return f"sha256:{storage.content_hash(found, 64)}"


_NO_PART = frozenset({"training", "fused_attn", "image_mean", "image_std"})
"""Attributes that depend on the mode or the machine, or belong to the preprocessing."""


def _attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if name.startswith("_") or name in _NO_PART:
            continue
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
            yield name, value.__qualname__
        elif _is_plain(value):
            yield name, repr(value)


def _is_plain(value: tp.Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


@contextlib.contextmanager
def untrained() -> Iterator[None]:
    """A network built in this block always has the same weights; torch's RNG is put back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        yield


class Weights(tp.NamedTuple):
    """A weights file."""

    url: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """safetensors metadata; empty for torch files."""
    checksum: str
    """Of the whole file."""


def read_weights(url: str) -> Weights:
    """Read safetensors, or a torch state dict that loads with ``weights_only=True``, onto the CPU.

    The format is told by the content, not by the name. Containers that training scripts write
    around the state dict ("state_dict", "model", "teacher", an EMA copy first) are opened.

    Raises:
        StorageError: it cannot be read.
        CorruptDataError: its bytes are neither format.
        ModelError: it holds other things than tensors, which would have to be unpickled.
    """
    url = storage.normalize(url)
    data = storage.read_bytes(url)
    checksum = storage.format_checksum(storage.crc32c(data))
    if data[8:9] == b"{":
        try:
            tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        except (safetensors.SafetensorError, ValueError) as err:
            raise CorruptDataError(
                f"{url} is not readable as safetensors ({err}); it may be truncated. Copy it again."
            ) from err
        return Weights(url, tensors, dict(header.get("__metadata__") or {}), checksum)
    return Weights(url, _read_torch(url, data), {}, checksum)


def _read_torch(url: str, data: bytes) -> dict[str, Tensor]:
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as err:  # whatever damaged bytes make a parser of zip and pickle stumble over
        refused = re.search(r"GLOBAL ([\w.]+)", str(err))
        if refused is not None:
            raise ModelError(
                f"{url} holds Python objects beside tensors ({refused[1]}), which are never "
                "unpickled here (it could run code). Convert it to safetensors where you trust it."
            ) from err
        if "TorchScript" in str(err):
            raise ModelError(
                f"{url} is a TorchScript archive, expected a state dict. Load it with "
                "torch.jit.load where you trust it and save its state_dict() as safetensors."
            ) from err
        raise CorruptDataError(
            f"{url} is neither safetensors nor a torch state dict; it may be truncated."
        ) from err
    while isinstance(found, Mapping):
        inner = next((found[k] for k in _CONTAINERS if isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        found = inner
    tensors = (
        {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if isinstance(found, Mapping)
        else {}
    )
    if not tensors:
        raise ModelError(f"{url} holds no named tensors; expected a state dict.")
    return tensors


def strip_prefix(
    tensors: Mapping[str, Tensor], expected: Collection[str], url: str
) -> dict[str, Tensor]:
    """Take the network out of a larger one: its tensors without ``visual.``, ``backbone.`` …

    The prefix under which most of the expected names stand is the one; what stands elsewhere (a
    text tower, a student beside its teacher) is left out. If no prefix brings half of the expected
    names, the tensors are returned as they are: they may have to be renamed first.

    Raises:
        ModelError: two prefixes bring equally many, so the file holds two such networks.
    """
    hits: Counter[str] = Counter()
    for key in tensors:
        starts = [0, *(m.end() for m in re.finditer(r"\.", key))]
        hits.update(key[:i] for i in starts if key[i:] in expected)
    ranked = hits.most_common(2)
    if not ranked or 2 * ranked[0][1] < len(expected):
        return dict(tensors)
    best = ranked[0][0]
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        if hits[""] != ranked[0][1]:
            raise ModelError(
                f"{url} holds two networks that fit, '{ranked[0][0]}*' and '{ranked[1][0]}*'; "
                "save the one that you mean to a file of its own."
            )
        best = ""
    if not best:
        return dict(tensors)
    return {key[len(best) :]: t for key, t in tensors.items() if key.startswith(best)}


def say_resized(arch: str, url: str, found: Tensor, needed: Tensor, *, is_asked: bool) -> None:
    """Say once that position embeddings are interpolated, if they are.

    Args:
        arch: the architecture.
        url: the weights file.
        found: its position embeddings, [..., tokens, d_model].
        needed: those of the network.
        is_asked: whether the user asked for an image size.
    """
    before, after = found.shape[-2], needed.shape[-2]
    if before != after:
        remedy = "" if is_asked else " Say --image-size if another size is meant."
        say_once(
            logger,
            f"{url} was trained on images of another size than {arch} takes here: its position "
            f"embeddings for {before} tokens are interpolated to {after}.{remedy}",
            level=logging.INFO if is_asked else logging.WARNING,
        )


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, arch: str, url: str) -> None:
    """Fill every parameter and buffer of the module; tensors that it does not have are left out.

    Raises:
        ModelError: one is missing or has another shape. The module is then unchanged.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in tensors]
    wrong = [n for n in expected if n in tensors and tensors[n].shape != expected[n].shape]
    if missing or wrong:
        parts = []
        if missing:
            parts.append(f"{len(missing)} missing (first: {', '.join(missing[:3])})")
        if wrong:
            shapes = (
                f"{n} {list(tensors[n].shape)}, expected {list(expected[n].shape)}"
                for n in wrong[:2]
            )
            parts.append(f"{len(wrong)} of another shape (first: {'; '.join(shapes)})")
        raise ModelError(
            f"{url} does not fit {arch}: of its {len(expected)} tensors {' and '.join(parts)}. "
            f"The file holds {len(tensors)} (first: {', '.join(sorted(tensors)[:3])}). "
            "Check the architecture before '@'."
        )
    module.load_state_dict({name: tensors[name] for name in expected})
