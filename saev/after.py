"""What a person is told after a stage: its figures, and the command that goes on from there.

Both are read from what the stage has published, so a stage that was done before says the same.
"""

import contextlib
import json
import logging
import math
import shlex
import typing as tp
from collections.abc import Sequence

from saev import eta, names, storage
from saev.config import InferenceCommand, InferenceConfig, ShardsConfig, TrainConfig, VisualsConfig
from saev.config.base import Config
from saev.errors import SaevError
from saev.inference import files
from saev.inference.results import Results
from saev.nn.io.load import HUB_PREFIX
from saev.shards import Shards
from saev.visuals import overview
from saev.visuals.records import DONE

logger = logging.getLogger(__name__)

_MOST_ROWS = 20
"""SAEs in the table; a page has all of them."""
_NO_NUMBER = "–"
_RUN = "run.json"

Figures = tp.Mapping[str, tp.Any]


class Sae(tp.NamedTuple):
    """An SAE that was trained."""

    url: str
    """Of its run folder."""
    name: str
    config: TrainConfig
    held_out: Figures
    """What training measured on images that it has not seen; empty if there were none."""
    trained_on: Figures
    """The same on images of training, or of the last batch where nothing was measured."""

    @property
    def order(self) -> tuple[float, float, str]:
        """Best first: by the held-out error, or that of training."""
        found = [_value(side, "normalized_mse") for side in (self.held_out, self.trained_on)]
        return (*found, self.url)  # type: ignore[return-value]


def figures(cfg: Config, urls: Sequence[str], seconds: float) -> str:
    """What a stage made, in lines for people; empty for other commands.

    Args:
        cfg: the config of the stage.
        urls: its results.
        seconds: how long it took now.
    """
    if isinstance(cfg, ShardsConfig):
        text = _shards(urls[0])
    elif isinstance(cfg, TrainConfig):
        text = _train(urls)
    elif isinstance(cfg, InferenceConfig | InferenceCommand):
        text = _inference(urls[0]) if len(urls) == 1 else _inferences(urls)
    elif isinstance(cfg, VisualsConfig):
        text = _visuals(urls[0])
    else:
        return ""
    head, *rest = text.splitlines()
    return "\n".join([f"{head} ({eta.span(seconds)})", *rest])


def go_on(cfg: Config, urls: Sequence[str]) -> str:
    """The command that goes on from a stage's result, ready to be pasted; empty if there is none.

    Args:
        cfg: the config of the stage.
        urls: its results.
    """
    if isinstance(cfg, ShardsConfig):
        return _command("train", *_train_flags(cfg, urls[0]))
    if isinstance(cfg, TrainConfig):
        best, *others = sorted(_saes(urls), key=lambda sae: sae.order)
        data = best.config.train_data

        def reads_the_same(sae: Sae) -> bool:
            other = sae.config.train_data
            return (other.shards, other.layer) == (data.shards, data.layer)

        runs = [best.url, *(sae.url for sae in others if reads_the_same(sae))]
        return _command("inference", "--run", *runs, "--shards", data.shards)
    if isinstance(cfg, InferenceCommand):
        first = min(range(len(urls)), key=lambda n: _order(urls[n]))
        return go_on(cfg.configs()[first], [urls[first]])
    if isinstance(cfg, InferenceConfig):
        return _command("visuals", *_visuals_flags(cfg, urls[0]))
    return _command("open", urls[0])


def update_page(cfg: Config, urls: Sequence[str]) -> None:
    """Write the page of the root that a stage has added an SAE, results or a report to."""
    if isinstance(cfg, InferenceCommand):
        for one in {storage.parent(one.run): one for one in cfg.configs()}.values():
            update_page(one, urls)
        return
    if isinstance(cfg, TrainConfig):
        run = urls[0]
    elif isinstance(cfg, InferenceConfig | VisualsConfig) and not cfg.run.startswith(HUB_PREFIX):
        run = cfg.run
    else:
        return
    try:
        overview.update(run)
    except SaevError as err:  # what the command was asked for is done
        logger.warning("The page of the root is not up to date: %s", err)


# --- Each stage ----------------------------------------------------------------------------------


def _shards(url: str) -> str:
    with Shards.open(url) as shards:
        meta = shards.metadata
        megabytes = sum(info.n_bytes or 0 for info in shards.infos) / 1e6
        n_tokens = shards.n_examples * meta.content_tokens_per_example
    layers = ", ".join(map(str, meta.layers))
    return (
        f"Recorded {shards.n_examples:,} images: {n_tokens:,} patches of {meta.d_model} numbers, "
        f"layer{'s' * (len(meta.layers) > 1)} {layers}, {megabytes:,.1f} MB"
    )


def _train(urls: Sequence[str]) -> str:
    saes = sorted(_saes(urls), key=lambda sae: sae.order)
    n = len(saes)
    shown = saes[:_MOST_ROWS]
    width = max(len(sae.name) for sae in shown)
    lines = [
        f"Trained {n} SAE{'s' * (n != 1)}",
        "NMSE: squared error over variance, 0 is perfect. L0: latents firing per token.",
        "Held out: images that training has not seen.",
        f"{'':{width}}      held out        training side",
        f"{'SAE':{width}}    NMSE     L0     NMSE     L0   dead, held out",
        *(_row(sae, width) for sae in shown),
    ]
    if n > len(shown):
        lines.append(f"… and {n - len(shown)} more")
    if not all(sae.held_out for sae in saes):
        lines.append(
            f"{_NO_NUMBER} Nothing is held out: too few images, or --n-val 0. The training side is "
            "that of the last batch."
        )
    return "\n".join(lines)


def _row(sae: Sae, width: int) -> str:
    dead = sae.held_out.get("n_dead", sae.trained_on.get("n_dead"))
    words = [f"{sae.name:{width}}", *_columns(sae.held_out, sae.trained_on)]
    words.append(f"  {_number(dead, ',')} of {sae.config.sae.d_sae:,}")
    return " ".join(words)


def _columns(*sides: Figures) -> tp.Iterator[str]:
    """NMSE and L0 of each side, as wide as their columns."""
    for side in sides:
        yield f"{_number(side.get('normalized_mse'), '.4f'):>8}"
        yield f"{_number(side.get('l0'), '.1f'):>6}"


def _saes(urls: Sequence[str]) -> list[Sae]:
    configs = [TrainConfig.of_run(url) for url in urls]
    saes = []
    for url, name, config in zip(urls, names.of(configs), configs, strict=True):
        record = storage.read_sealed(storage.join(url, _RUN)).record
        trained_on = record.get("train_metrics") or _last_batch(url)
        saes.append(Sae(url, name, config, record.get("metrics") or {}, trained_on))
    return saes


def _last_batch(url: str) -> dict[str, tp.Any]:
    """Figures of the last row of a run's curve."""
    with contextlib.suppress(SaevError, ValueError, IndexError):
        row = json.loads(storage.read_text(storage.join(url, "metrics.jsonl")).splitlines()[-1])
        return {key.removeprefix("train/"): value for key, value in row.items()}
    return {}


def _inference(url: str) -> str:
    metrics = Results.open(url).metrics
    words = [
        f"NMSE {_number(metrics['normalized_mse'], '.4f')} at L0 {metrics['l0']:.1f}",
        f"dead {metrics['n_dead']:,} of {metrics['d_sae']:,}",
    ]
    if "dense_share" in metrics:
        above = f"latents that fire on over {metrics['dense_above']:.2g} of the tokens"
        words.append(f"dense {metrics['dense_share']:.1%} ({above})")
    lines = [
        f"Measured on {metrics['n_tokens']:,} tokens of {metrics['n_examples']:,} images",
        *_held_out(storage.parent(storage.parent(url)), metrics),
        f"all images: {', '.join(words)}",
    ]
    return "\n".join(lines)


def _visuals(url: str) -> str:
    done = storage.read_sealed(storage.join(storage.parent(url), DONE)).record
    return f"Drew {len(done['latents'])} latents"


def _inferences(urls: Sequence[str]) -> str:
    runs = [storage.parent(storage.parent(url)) for url in urls]
    said = names.of([TrainConfig.of_run(run) for run in runs])
    width = max(map(len, said))
    lines = [
        f"Measured {len(urls)} SAEs; what is held out, training measured",
        f"{'':{width}}      held out          all images",
        f"{'SAE':{width}}    NMSE     L0     NMSE     L0   dead, all images",
    ]
    for name, run, url in zip(said, runs, urls, strict=True):
        metrics = Results.open(url).metrics
        words = [f"{name:{width}}", *_columns(_measured_in_training(run, metrics), metrics)]
        lines.append(" ".join([*words, f"  {metrics['n_dead']:,} of {metrics['d_sae']:,}"]))
    return "\n".join(lines)


def _order(url: str) -> float:
    """What results are compared by: the held-out error, or that of all images."""
    metrics = Results.open(url).metrics
    found = _measured_in_training(storage.parent(storage.parent(url)), metrics)
    return _value(found or metrics, "normalized_mse")


def _held_out(run: str, metrics: Figures) -> list[str]:
    """The headline of a run, in a line."""
    found = _measured_in_training(run, metrics)
    if not found:
        return []
    nmse = _number(found.get("normalized_mse"), ".4f")
    return [f"held out:   NMSE {nmse} at L0 {found['l0']:.1f} (as training measured it)"]


def _measured_in_training(run: str, metrics: Figures) -> Figures:
    """Held-out figures of a run, if the results are in its folder and on its own images."""
    if not storage.exists(storage.join(run, _RUN)):
        return {}
    trained_on = storage.name(TrainConfig.of_run(run).train_data.shards)
    if trained_on != metrics["shards_hash"]:
        return {}
    return storage.read_sealed(storage.join(run, _RUN)).record.get("metrics") or {}


# --- Flags of the next command -------------------------------------------------------------------


def _train_flags(cfg: ShardsConfig, url: str) -> list[str]:
    with Shards.open(url) as shards:
        layers = shards.metadata.layers
    flags = ["--shards", url]
    if len(layers) > 1:
        flags += ["--layer", str(layers[-1])]
    root = storage.normalize(cfg.shards_root)
    if storage.name(root) == "shards":  # its usual place beside the runs
        flags += ["--runs-root", storage.join(storage.parent(root), "runs")]
    return flags


def _visuals_flags(cfg: InferenceConfig, url: str) -> list[str]:
    recorded = storage.read_sealed(storage.join(url, files.CONFIG), remedy=files.REMEDY).record
    shards = cfg.data.shards or recorded["config"]["data"]["shards"]
    flags = ["--run", cfg.run, "--shards", shards]
    if cfg.out:
        flags += ["--inference", url]
    if cfg.allow_other_model:
        flags += ["--allow-other-model"]
    return flags


def _command(name: str, *words: str) -> str:
    return shlex.join(["saev", name, *words])


# --- Numbers -------------------------------------------------------------------------------------


def _number(value: tp.Any, form: str) -> str:
    return _NO_NUMBER if value is None else format(value, form)


def _value(side: Figures, key: str) -> float:
    found = side.get(key)
    return math.inf if found is None else float(found)
