"""Flip single bits in every kind of stored file; each read is right, or one sentence.

    python tests/torture/bits.py [--n 5000] [--seed 0] [--only shards checkpoint …]

The folders are made once: shards with labels, a trained run with a resume point, inference and
pictures. Of each file, the flips are spread over equal ranges of its bytes. A flip that changes
no value (white space, say) is read right; any other is refused with one line. A traceback, another
value, or an error of several lines is a failure, and is shown.
"""

import argparse
import collections
import contextlib
import hashlib
import logging
import os
import random
import sys
import tempfile
import time
import traceback
import typing as tp
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import s3_proxy  # noqa: E402
import scipy.sparse  # noqa: E402
import torch  # noqa: E402
from visuals import chain  # noqa: E402

import saev  # noqa: E402
from saev import inference, storage, train, visuals  # noqa: E402
from saev.config import DataConfig, InferenceConfig, TrainConfig  # noqa: E402
from saev.errors import SaevError  # noqa: E402
from saev.inference.results import Results  # noqa: E402
from saev.shards import Shards  # noqa: E402
from saev.train import point  # noqa: E402
from saev.train.curves import CurveRows  # noqa: E402


class Kind(tp.NamedTuple):
    """Files that are read together."""

    files: tuple[Path, ...]
    read: Callable[[], object]
    """Everything that they hold, as plain values and arrays."""


def make(root: Path) -> dict[str, Kind]:
    """The folders, with large members: some files have several blocks."""
    made = chain.make_chain(root)
    config = TrainConfig.from_dict(
        {
            "runs_root": str(root / "trained"), "n_train": 2560, "batch_size": 64, "n_val": 0,
            "train_data": {"shards": made.shards}, "sae": {"d_sae": 48}, "device": "cpu",
            "log_every": 1,
        }
    )  # fmt: skip
    (run,) = train.run(config)
    measured = inference.run(
        InferenceConfig(run=run, data=DataConfig(shards=made.shards), n_dists=3, device="cpu")
    )
    book = made.config(run=run, inference=measured, latents=(1, 2), n_latents=0)
    report = Path(visuals.run(book)).parent
    state = root / "resume"
    tensors = {"a": torch.arange(1000.0).reshape(50, 20), "n": torch.tensor([7])}
    rows = CurveRows([{"step": 1, "train/loss": 0.5}], [{"step": 1, "wall_time": 3.0}])
    meta = {"run_ids": ["r"], "rules": 2, "loader": {"epoch": 1}}
    point.write(str(state), point.ResumePoint(8, tensors, meta, {"r": rows}))
    (pointer,) = state.glob("*.json")
    return {
        "shards": shards(made.shards),
        "run": Kind(
            tuple(Path(run, n) for n in ("run.json", "config.json", "metrics.jsonl")),
            lambda: _run(run),
        ),
        "checkpoint": Kind(_files(f"{run}/checkpoint"), lambda: _checkpoint(f"{run}/checkpoint")),
        "resume point": Kind(_files(state), lambda: point.read(str(pointer))._asdict()),
        "inference": Kind(_files(measured), lambda: _inference(measured)),
        "pictures": Kind(
            tuple(f for f in report.iterdir() if f.suffix in (".json", ".parquet")),
            lambda: _book(book),
        ),
    }


def shards(folder: str | Path) -> Kind:
    """A folder of activations."""
    return Kind(_files(folder), lambda: _shards(str(folder)))


def _files(folder: str | Path) -> tuple[Path, ...]:
    return tuple(sorted(f for f in Path(folder).iterdir() if f.is_file()))


def _shards(url: str) -> object:
    with Shards.open(url) as shards:
        acts = [
            shards.read(i, layer, 0, info.n_examples)
            for i, info in enumerate(shards.infos)
            for layer in shards.layers
        ]
        stats = [shards.stats(layer, "all") for layer in shards.layers]
        shards.verify()
        return [
            shards.metadata.to_dict(), acts, shards.labels(),
            shards.examples(), [(s.mean, s.mean_sq_norm, s.count) for s in stats if s],
            [info.to_dict() for info in shards.infos],
        ]  # fmt: skip


def _run(url: str) -> object:
    folder = storage.Folder.open(url, "run.json")
    return [folder.record, TrainConfig.of_run(url).to_dict(), folder.read_bytes("metrics.jsonl")]


def _checkpoint(url: str) -> object:
    sae = saev.load_sae(url)
    return [sae.cfg.to_dict(), sae.metadata, dict(sae.state_dict())]


def _inference(url: str) -> object:
    results = Results.open(url)
    config = results.folder.read_json("config.json")
    top = [results.top(latent) for latent in range(results.d_sae)]
    arrays = [
        results.frequency, results.counts, results.mean_values, results.max_values,
        results.folder.read_bytes("sparsity.safetensors"),
    ]  # fmt: skip
    kept = results.distributions()
    return [
        config, results.metrics, arrays, top, results.concepts, results.codes(),
        results.code_tokens(), kept.latents, kept.values,
    ]  # fmt: skip


def _book(cfg: tp.Any) -> object:
    """Its page alone; whether visuals.json is sound decides only whether it is written again."""
    storage.read_sealed(storage.join(cfg.inference, "report", "visuals.json"))
    return visuals.book(cfg)


# --- Flips ---------------------------------------------------------------------------------


def digest(value: object) -> str:
    """A hash of values, of their types, and of every bit of arrays."""
    state = hashlib.sha256()
    for piece in _pieces(value):
        state.update(piece)
    return state.hexdigest()


def _pieces(value: object) -> Iterable[bytes]:
    if isinstance(value, torch.Tensor):
        is_bfloat16 = value.dtype == torch.bfloat16  # which NumPy does not know
        value = (value.view(torch.int16) if is_bfloat16 else value).numpy()
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, scipy.sparse.csr_matrix):
        yield from _pieces([value.data, value.indices, value.indptr, list(value.shape)])
    elif isinstance(value, pa.Table):
        yield from _pieces(value.to_pylist())
    elif isinstance(value, dict):
        yield from _pieces(sorted(value.items(), key=lambda item: str(item[0])))
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}".encode()
        for one in value:
            yield from _pieces(one)
    else:
        yield repr(value).encode() + b";"


class Count(collections.Counter):
    """What became of the flips of one file."""


def flip_all(
    kinds: tp.Mapping[str, Kind], n: int, rng: random.Random, only: tp.Collection[str] = ()
) -> tuple[dict[str, Count], list[str]]:
    """About ``n`` flips in all, as many in each file.

    Returns:
        Counts of `right` and `refused` (and of failures) by file, and the failures in words.
    """
    counts: dict[str, Count] = {}
    failures: list[str] = []
    chosen = {name: kind for name, kind in kinds.items() if not only or name in only}
    files = [(name, file) for name, kind in chosen.items() for file in kind.files]
    expected = {name: digest(kind.read()) for name, kind in chosen.items()}
    each = max(1, n // len(files))
    for name, file in files:
        count = counts.setdefault(f"{name}: {_shown(file.name)}", Count())
        data = file.read_bytes()
        for i in range(each):
            bits = 8 * len(data)
            low, high = bits * i // each, max(bits * i // each + 1, bits * (i + 1) // each)
            bit = min(rng.randrange(low, high), bits - 1)
            file.write_bytes(s3_proxy.flip(data, bit))
            outcome = _outcome(kinds[name].read, expected[name])
            file.write_bytes(data)
            kind = outcome.partition(":")[0]
            count[kind] += 1
            if kind not in ("right", "refused"):
                failures.append(f"{file}, bit {bit}: {outcome}")
    return counts, failures


def _shown(name: str) -> str:
    return "pictures" if name.endswith(".webp") else name


def _outcome(read: Callable[[], object], expected: str) -> str:
    try:
        found = digest(read())
    except SaevError as err:
        return "refused" if "\n" not in str(err) else f"many lines: {err}"
    except Exception:
        return f"traceback: {traceback.format_exc()[-1500:]}"
    return "right" if found == expected else "another value"


def main() -> int:
    """Print a table; the status says whether there was no failure."""
    parser = argparse.ArgumentParser(prog="bits", description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=5000, help="flips in all, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="kinds of folders")
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        kinds = make(Path(folder))
        counts, failures = flip_all(kinds, args.n, random.Random(args.seed), args.only)
    total: Count = Count()
    print(
        "| file | flips | refused | right all the same | wrong |\n| --- | --- | --- | --- | --- |"
    )
    for name, count in counts.items():
        wrong = count.total() - count["refused"] - count["right"]
        print(f"| {name} | {count.total()} | {count['refused']} | {count['right']} | {wrong} |")
        total.update(count)
    print(
        f"\n{total.total()} flipped bits: {total['refused']} refused in one sentence, "
        f"{total['right']} read right, {len(failures)} failures, "
        f"{time.monotonic() - start:.0f} s."
    )
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
