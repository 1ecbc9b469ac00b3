"""Names of checkpoints, reading of weights files, and loading weights into a network."""

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
"""Prefix of a checkpoint that is a folder with a network's config and weights."""
_SEED = 0
_WEIGHTS_SUFFIX = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_CONTAINERS = (
    *("state_dict_ema", "model_ema", "state_dict", "model"),  # as timm looks for them
    *("teacher", "encoder", "module"),
)
"""Keys under which training scripts store the weights, in order of preference."""


class CkptName(tp.NamedTuple):
    """The parts of a checkpoint's name."""

    arch: str | None
    """Architecture; None if only a URL is given."""
    tag: str | None = None
    """Tag of the pretrained weights."""
    url: str | None = None
    """URL of the weights file, if one is given."""
    random: bool = False
    """Whether the weights are untrained."""


def parse(ckpt: str) -> CkptName:
    """Parse a checkpoint's name.

    It may be ``ARCH``, ``ARCH/TAG``, ``ARCH/random``, ``ARCH@URL``, ``ARCH/TAG@URL``, ``ARCH/URL``
    (if the rest is a URL, an absolute path, or ends like a weights file), or ``URL`` alone (with a
    scheme, or starting with ``/``, ``./``, ``../`` or ``~``).

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


def without_url(ckpt: str, ckpt_checksum: str | None) -> str:
    """A checkpoint's name without the URL of its weights file.

    Args:
        ckpt: the name as the user wrote it.
        ckpt_checksum: checksum of the weights file; None if there is no file. Then the name is
            returned as it is.
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
    """SHA-256 over the structure of a network, without its tensors.

    The structure is the names and types of all modules (activation functions are modules), and
    their plain attributes, such as the number of heads or the epsilon of a norm. Networks with
    equal tensors and equal structure are the same function. The reverse is not true, because new
    versions of libraries add attributes.
    """
    found = [
        [name, type(part).__qualname__, sorted(_attributes(part))]
        for name, part in module.named_modules()
    ]
    return f"sha256:{storage.content_hash(found, 64)}"


_NOT_STRUCTURE = frozenset({"training", "fused_attn", "image_mean", "image_std"})
"""Attributes that depend on the mode or the machine, or belong to the preprocessing."""


def _attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if name.startswith("_") or name in _NOT_STRUCTURE:
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
    """Make the random weights of a network that is built in this block reproducible. torch's random
    state is restored afterwards."""
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
    """Checksum of the whole file."""


def read_weights(url: str) -> Weights:
    """Read safetensors, or a torch state dict that loads with ``weights_only=True``, onto the CPU.

    The format is recognised by the content, not by the name. If a training script stored the state
    dict inside a dict (as "state_dict", "model", "teacher", …), it is taken from there; an EMA copy
    is preferred.

    Raises:
        StorageError: it cannot be read.
        CorruptDataError: it has neither format.
        ModelError: it holds objects that are not tensors and would have to be unpickled.
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
    except Exception as err:  # damaged bytes make the parsers of zip and pickle raise any type
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
    """Take a network out of a larger one: its tensors without ``visual.``, ``backbone.`` …

    The prefix with most of the expected names is used. Tensors without this prefix (a text tower,
    or a student beside its teacher) are left out. If no prefix has half of the expected names, all
    tensors are returned unchanged, because they may have to be renamed first.

    Raises:
        ModelError: two prefixes have equally many names, so the file holds two such networks.
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


def log_resized(arch: str, url: str, found: Tensor, needed: Tensor, *, is_asked: bool) -> None:
    """Log once that position embeddings are interpolated, if they are.

    Args:
        arch: the architecture.
        url: the weights file.
        found: position embeddings of the file, [..., tokens, d_model].
        needed: position embeddings of the network.
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
    """Set every parameter and buffer of a module. Further tensors are ignored.

    Raises:
        ModelError: a tensor is missing or has another shape. The module is then unchanged.
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
