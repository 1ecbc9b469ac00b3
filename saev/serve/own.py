"""Images of one's own: the latents that fire on them, and the images that are nearest to them.

An answer comes in lines of JSON, because the first image waits for the model: lines
``{"doing": …}`` while something takes time, and at last ``{"image": …}``, ``{"ready": true}`` or
``{"problem": …}``.
What is sent is decoded in memory, and never stored.
"""

import asyncio
import base64
import functools
import io
import json
import sys
import threading
import typing as tp
from collections.abc import AsyncIterator

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from saev import storage
from saev.errors import SaevError
from saev.serve import problems
from saev.serve.access import body_of
from saev.serve.encoding import plain
from saev.serve.explorer import Explorer
from saev.serve.latents import float_values
from saev.serve.measured import NONE, Measured
from saev.serve.problems import Problem
from saev.shards.protocol import METADATA

if tp.TYPE_CHECKING:  # these need torch, and so are imported when they are needed
    from saev.inference.image import ImageCodes, ImageReader

MAX_BYTES = 32 << 20
"""Most bytes of an image that is sent."""
MAX_PIXELS = 50_000_000
"""Most pixels of it."""
MAX_LATENTS = 64
"""Most latents by which images are compared."""
MAX_IMAGES = 100
"""Most images in one answer."""
N_READERS = 8
"""SAEs that are kept. They are of one model; an SAE of another one replaces them all."""
MEDIA_TYPE = "application/x-ndjson"
_QUALITY = 85
_MAX_NAME = 200

Tell = tp.Callable[[str], None]


class Readers:
    """What encodes images: the model that was used last, and SAEs of it.

    Args:
        ckpt: where the weights of the model are now, if they have moved.
    """

    def __init__(self, ckpt: str = ""):
        self._ckpt = ckpt
        self._lock = threading.Lock()
        self._open: dict[str, ImageReader] = {}

    def read(self, measured: Measured, image: Image.Image, name: str, tell: Tell) -> "ImageCodes":
        """Encode an image as the measured ones were.

        Raises:
            ModelError: the model's weights are missing or are others.
            ConfigError, CheckpointError, StorageError: the SAE or its model are not known.
        """
        reader = self._reader(measured, tell)
        tell("run the model")
        return reader.read(image, name)

    def prepare(self, measured: Measured, tell: Tell) -> None:
        """Load what an SAE's images need.

        Raises:
            SaevError: as :meth:`read`.
        """
        self._reader(measured, tell)

    def _reader(self, measured: Measured, tell: Tell) -> "ImageReader":
        from saev.inference.image import ImageReader

        with self._lock:
            found = self._open.pop(measured.key, None)
            if found is None:
                tell("load the SAE")
                like = next(iter(self._open.values()), None)
                found = ImageReader.open(
                    measured.entry.figures["run"],
                    shards=_shards(measured),
                    results=measured.results,
                    ckpt=self._ckpt,
                    allow_other_model=bool(measured.results.other_model),
                    like=like,
                )
                if like is not None and not found.shares_model(like):
                    del like
                    self._open.clear()  # there may be no memory for two models
                tell("load the model")
                found.load()
            self._open[measured.key] = found
            while len(self._open) > N_READERS:
                del self._open[next(iter(self._open))]
            return found


def _shards(measured: Measured) -> str:
    """The shards folder that was measured, if it is still there."""
    url = measured.entry.figures["shards"] or ""
    return url if url and storage.exists(storage.join(url, METADATA)) else ""


def routes(explorer: Explorer, run: str) -> list[Route]:
    """Addresses below that of an SAE."""
    readers = Readers(explorer.ckpt)
    return [
        Route(f"{run}/own", functools.partial(_own, explorer, readers), methods=["POST"]),
        Route(f"{run}/own", functools.partial(_ready, explorer, readers)),
        Route(f"{run}/images/{{example}}/encoded", functools.partial(_encoded, explorer, readers)),
    ]


async def _own(explorer: Explorer, readers: Readers, request: Request) -> Response:
    """Encode the image that is the body of a request."""
    measured = await explorer.measured(request.path_params["key"])
    name = request.query_params.get("name", "")[:_MAX_NAME] or "the image"
    data = await body_of(request, MAX_BYTES)

    def work(tell: Tell) -> dict[str, tp.Any]:
        _say_first(tell)
        from saev.images.decode import decode_image
        from saev.inference.image import REMEDY, own_limits

        image = decode_image(data, name, own_limits(MAX_PIXELS), REMEDY)
        return {"image": to_dict(measured, readers.read(measured, image, name, tell))}

    return await _in_lines(explorer, request, work)


async def _ready(explorer: Explorer, readers: Readers, request: Request) -> Response:
    """Load the model, so that the first image need not wait for it."""
    measured = await explorer.measured(request.path_params["key"])

    def work(tell: Tell) -> dict[str, tp.Any]:
        _say_first(tell)
        readers.prepare(measured, tell)
        return {"ready": True}

    return await _in_lines(explorer, request, work)


def _say_first(tell: Tell) -> None:
    if "torch" not in sys.modules:
        tell("load PyTorch")


async def _encoded(explorer: Explorer, readers: Readers, request: Request) -> Response:
    """Encode an image of the dataset, whose codes need not have been saved."""
    measured = await explorer.with_names(request.path_params["key"])
    text = request.path_params["example"]
    example = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else NONE
    if measured.names().row(example) == NONE:
        raise Problem(
            404, f"There is no image {text[:40]!r}, or it was not measured.",
            f"Take a number of api/runs/{measured.key}/images.",
        )  # fmt: skip

    def work(tell: Tell) -> dict[str, tp.Any]:
        image = explorer.originals.whole(measured, example)
        name = measured.names().of(example)["path"]
        return {"image": to_dict(measured, readers.read(measured, image, name, tell))}

    return await _in_lines(explorer, request, work)


async def _in_lines(
    explorer: Explorer, request: Request, work: tp.Callable[[Tell], dict[str, tp.Any]]
) -> Response:
    """What takes long, in lines. What fails before it says that it does something is an answer with
    its own status."""
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[str | None] = asyncio.Queue()

    def tell(text: str) -> None:
        loop.call_soon_threadsafe(told.put_nowait, text)

    task = asyncio.create_task(explorer.pool.compute(lambda: work(tell)))
    task.add_done_callback(lambda _: told.put_nowait(None))
    first = await told.get()
    if first is None:
        return Response(_line(await task), media_type=MEDIA_TYPE)

    async def lines() -> AsyncIterator[bytes]:
        text: str | None = first
        while text is not None:
            yield _line({"doing": text})
            text = await told.get()
        error = task.exception()
        yield _line(task.result() if error is None else _problem(request, error))

    return StreamingResponse(lines(), media_type=MEDIA_TYPE)


def _problem(request: Request, error: BaseException) -> dict[str, tp.Any]:
    if isinstance(error, SaevError):
        answer = problems.of_error(request, error)
    else:
        answer = problems.of_bug(request, tp.cast(Exception, error))
    return {"problem": json.loads(bytes(answer.body))}


def _line(value: dict[str, tp.Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


def to_dict(measured: Measured, codes: "ImageCodes") -> dict[str, tp.Any]:
    """The latents of an image as JSON; ``crop`` is the picture that the model sees, WebP in
    base64."""
    peaks = codes.peaks()
    buffer = io.BytesIO()
    codes.crop.save(buffer, "WEBP", quality=_QUALITY)
    return {
        "run": measured.key,
        "name": codes.name,
        "width": codes.size[0],
        "height": codes.size[1],
        "grid": list(codes.shape),
        "model": codes.source.model,
        "layer": codes.source.layer,
        "crop": base64.b64encode(buffer.getvalue()).decode(),
        "latents": {
            "latent": peaks.latents.tolist(),
            "max": _rounded(peaks.values),
            "mean": _rounded(peaks.means),
            "patches": peaks.n_patches.tolist(),
        },
        "tokens": {
            "patch": codes.patches.tolist(),
            "latent": codes.latents.tolist(),
            "value": _rounded(codes.values),
        },
    }


def _rounded(values: np.ndarray) -> list[float]:
    """With six digits, which is what float32 has."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def nearest(measured: Measured, latents: tp.Sequence[int], n: int = 24) -> dict[str, tp.Any]:
    """The images on which some latents are strongest together.

    Args:
        measured: the SAE.
        latents: numbers. Each counts by its value on the image as a share of its largest value.
        n: how many images.

    Raises:
        Problem: there is no such latent, or none or too many are given.
    """
    chosen = [measured.check_latent(latent) for latent in dict.fromkeys(latents)]
    if not 0 < len(chosen) <= MAX_LATENTS:
        raise Problem(
            400, f"{len(chosen)} latents are given.", f"Give 1 to {MAX_LATENTS}: latents=17,42."
        )
    names = measured.names()
    score = np.zeros(len(names.example))
    for latent in chosen:
        table = measured.rows("image_acts_by_latent", latent)
        values = float_values(table["max"])
        if not len(values):
            continue
        rows = np.searchsorted(names.example, table["example"].to_numpy())
        score[rows] += values / values.max()
    best = np.lexsort((names.example, -score))[: min(max(0, n), MAX_IMAGES)]
    best = best[score[best] > 0]
    return plain({
        "run": measured.key,
        "latents": chosen,
        "images": [
            {**names.of(int(names.example[row])), "score": score[row] / len(chosen)}
            for row in best
        ],
    })  # fmt: skip
