"""Computes the rows of the output."""

import collections
import math

import numpy as np

from saev.config.size import SizeConfig
from saev.config.train import TrainConfig, default_batch_size, default_n_train
from saev.grouping import measured_together, measuring_bytes
from saev.limits import (
    EMBEDDED_IMAGES,
    GPU_CHUNK_BYTES,
    GROUP_BYTES,
    INDEX_BYTES_PER_TOKEN,
    ITEM_TOKENS,
    N_RESUME_POINTS,
    SPREAD_EXAMPLES,
    VAL_FRACTION,
)
from saev.shards.protocol import Layout, in_validation
from saev.size import formats
from saev.size.inputs import Inputs
from saev.size.rows import Row, Section, Sure

_EXAMPLE_BYTES = 100
"""Bytes of a row of examples.parquet, mostly for the image's name."""
_EXACT_EXAMPLES = 20_000_000
"""Up to this number of images, the split is counted exactly."""


def estimate(inputs: Inputs, cfg: SizeConfig) -> list[Section]:
    """All sections of the output.

    Args:
        inputs: the work.
        cfg: measured speeds, if any.
    """
    sizes = Estimate(inputs, cfg)
    return [
        Section("Recording", sizes.recording()),
        Section("Training", sizes.training()),
        Section("Measuring", sizes.measuring()),
        Section("Altogether", sizes.altogether()),
    ]


class Estimate:
    """Intermediate results that several rows need."""

    def __init__(self, inputs: Inputs, cfg: SizeConfig):
        self.inputs, self.cfg, self.meta = inputs, cfg, inputs.recording
        self.layout = Layout.of(self.meta, min(self.meta.examples_per_shard, self.meta.n_examples))
        self.row_bytes = self.layout.row_bytes
        self.groups = inputs.groups()
        self.widths = [self._d_sae(sae) for sae in inputs.saes]

    def _d_sae(self, sae: TrainConfig) -> int:
        return sae.sae.d_sae or sae.sae.exp_factor * self.meta.d_model

    def _tokens(self, tokens: str) -> int:
        """Selected tokens of an example."""
        meta = self.meta
        return {
            "content": meta.content_tokens_per_example,
            "special": int(meta.cls_token),
            "all": meta.tokens_per_example,
        }[tokens]

    # --- Recording -------------------------------------------------------------------------

    @property
    def activations(self) -> int:
        """Bytes of all shards."""
        return self.meta.n_examples * len(self.meta.layers) * self.row_bytes

    @property
    def beside(self) -> int:
        """Bytes of all files beside the shards, without names of images."""
        meta, n_layers = self.meta, len(self.meta.layers)
        labels = meta.n_examples * meta.content_tokens_per_example if self.inputs.labels else 0
        stats = formats.safetensors(formats.stats(n_layers, meta.d_model))
        return 4 * n_layers * meta.n_examples + labels + stats

    def recording(self) -> list[Row]:
        """Rows about `saev shards`."""
        meta = self.meta
        n_layers, tokens = len(meta.layers), meta.tokens_per_example
        special = " + 1 class token" if meta.cls_token else ""
        parts = max(1, min(meta.n_shards, self.cfg.max_parts))
        rows = [
            Row("n_images", "images", meta.n_examples, "", "exact", ""),
            Row(
                "activations_bytes", "activations", self.activations, "bytes", "exact",
                f"images × {tokens} tokens ({meta.content_tokens_per_example} patches{special}) × "
                f"{n_layers} layers × {meta.d_model} wide × "
                f"{self.layout.itemsize} bytes ({meta.dtype})",
            ),
            Row(
                "examples_per_shard", "examples per shard", meta.examples_per_shard, "", "exact",
                f"⌊{meta.max_tokens_per_shard:,} vectors ÷ ({tokens} tokens × {n_layers} layers)⌋",
            ),
            Row("n_shards", "shards", meta.n_shards, "", "exact", "⌈images ÷ examples per shard⌉"),
            Row(
                "shard_bytes", "a shard", self.layout.n_bytes, "bytes", "exact",
                "examples × layers × tokens × width × bytes; the last one may be smaller",
            ),
            Row(
                "beside_bytes", "checksums, labels, statistics", self.beside, "bytes", "exact",
                "4 bytes per image and layer; with masks, 1 per patch",
            ),
            Row(
                "examples_bytes", "table of images", _EXAMPLE_BYTES * meta.n_examples, "bytes",
                "at most", f"{_EXAMPLE_BYTES} bytes per image: its name, compressed",
            ),
            Row(
                "scratch_bytes", "scratch of a recording pod", self.layout.n_bytes, "bytes",
                "exact", "one shard in TMPDIR, if the root is object storage; else nothing",
            ),
            Row(
                "parts", "suggested parts", parts, "", "exact",
                f"the smaller of shards and --max-parts ({self.cfg.max_parts}): a shard is the "
                "smallest piece of work; an evicted pod repeats at most one",
            ),
        ]  # fmt: skip
        if self.cfg.images_per_second:
            hours = meta.n_examples / self.cfg.images_per_second / 3600
            rows += [
                Row("recording_hours", "hours of a GPU", hours, "hours", "about",
                    "images ÷ --images-per-second"),
                Row(
                    "recording_wall_hours", "hours with that many parts",
                    hours / meta.n_shards * math.ceil(meta.n_shards / parts), "hours", "about",
                    "of the part with the most shards",
                ),
            ]  # fmt: skip
        return rows

    # --- Training --------------------------------------------------------------------------

    def n_train_examples(self, sae: TrainConfig) -> int:
        """Examples on the training side of the split."""
        n, data = self.meta.n_examples, sae.train_data
        fraction = data.val_fraction or sae.val_data.val_fraction
        if data.split == "all" and not fraction and sae.n_val and not sae.val_data.shards:
            fraction = VAL_FRACTION
        if sae.val_data.shards or not fraction:
            return n
        if n > _EXACT_EXAMPLES:
            return round(n * (1 - fraction))
        return n - int(in_validation(np.arange(n), fraction).sum())

    def window_bytes(self, sae: TrainConfig) -> int:
        """Memory of the loader's windows."""
        return min(self._whole(sae), int(sae.train_data.buffer_mb * 2**20))

    def _whole(self, sae: TrainConfig) -> int:
        """Memory of a window with all data."""
        special = sae.train_data.tokens == "special"
        kept = 1 if special else self.meta.tokens_per_example
        vector = self.meta.d_model * self.layout.itemsize
        return self.n_train_examples(sae) * kept * (vector + INDEX_BYTES_PER_TOKEN)

    def batch_size(self, sae: TrainConfig) -> int:
        """Tokens per step."""
        wanted = sae.batch_size or default_batch_size(self.n_train(sae))
        tokens = self.n_train_examples(sae) * self._tokens(sae.train_data.tokens)
        return max(1, min(wanted, tokens))

    def epochs(self, sae: TrainConfig) -> float:
        """Passes over the training side."""
        tokens = self.n_train_examples(sae) * self._tokens(sae.train_data.tokens)
        return self.n_train(sae) / max(1, tokens)

    def n_train(self, sae: TrainConfig) -> int:
        """Tokens to train on."""
        tokens = self.n_train_examples(sae) * self._tokens(sae.train_data.tokens)
        return sae.n_train or default_n_train(tokens)

    def read_bytes(self, sae: TrainConfig) -> float:
        """Bytes read by one group."""
        epoch = self.n_train_examples(sae) * self.row_bytes
        in_memory = self._whole(sae) <= sae.train_data.buffer_mb * 2**20
        return epoch if in_memory else epoch * self.epochs(sae)

    def resume_bytes(self, members: list[int]) -> int:
        """Bytes of one resume point of a group."""
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for i, (shape, n) in enumerate(self.banks(members).items()):
            state = formats.bank_state(n, self.meta.d_model, *shape)
            tensors |= {f"bank{i}.{name}": tensor for name, tensor in state.items()}
        return formats.safetensors(tensors, ordered=True)

    def banks(self, members: list[int]) -> dict[tuple[int, str, str], int]:
        """Number of SAEs of each shape (d_sae, activation, optimiser) in a group."""
        saes = self.inputs.saes
        return collections.Counter(
            (self.widths[i], saes[i].sae.activation.kind, saes[i].optim) for i in members
        )

    def state_bytes(self, members: list[int]) -> int:
        """Memory of a group's SAEs between steps, including gradients."""
        total = 0
        for (d_sae, activation, optim), n in self.banks(members).items():
            shape = (n, self.meta.d_model, d_sae, activation)
            total += formats.tensor_bytes(formats.bank_state(*shape, optim))
            total += formats.tensor_bytes(formats.bank_parameters(*shape))  # gradients
            total -= n * formats.RNG_BYTES + 16  # these are on the CPU
        return total

    def chunk_bytes(self, members: list[int]) -> int:
        """Bytes of the pre-activations in a GPU's memory at one time."""
        most = 0
        for (d_sae, _, _), n in self.banks(members).items():
            rows = 4 * d_sae * self.batch_size(self.inputs.saes[members[0]])
            most = max(most, min(n * rows, GPU_CHUNK_BYTES))
        return most

    def training(self) -> list[Row]:
        """Rows about `saev train`."""
        saes, meta = self.inputs.saes, self.meta
        first = saes[0]
        n_examples = self.n_train_examples(first)
        largest = max(self.groups, key=self.state_bytes)
        window = max(self.window_bytes(saes[members[0]]) for members in self.groups)
        reads = [self.read_bytes(saes[members[0]]) for members in self.groups]
        in_memory = self._whole(first) <= first.train_data.buffer_mb * 2**20
        passes = "read once, stays in memory" if in_memory else f"{self.epochs(first):.2f} epochs"
        checkpoints = [self.checkpoint_bytes(i) for i in range(len(saes))]
        batch = self.batch_size(first)
        chunk = self.chunk_bytes(largest)
        rows = [
            Row("n_saes", "SAEs", len(saes), "", "exact", ""),
            Row(
                "n_groups", "groups, that is GPUs", len(self.groups), "", "exact",
                "SAEs that read the same batches are trained together",
            ),
            Row(
                "n_train_examples", "images to train on", n_examples, "", "exact",
                "the rest is for validation",
            ),
            Row("n_steps", "steps", math.ceil(self.n_train(first) / batch), "", "exact",
                f"⌈{self.n_train(first):,} tokens ÷ batches of {batch:,}⌉"),
            Row(
                "epoch_bytes", "read per epoch", n_examples * self.row_bytes, "bytes", "exact",
                "images to train on × all tokens × width × bytes: one layer, once for the group",
            ),
            Row(
                "training_read_bytes", "read in all", sum(reads), "bytes", "about",
                f"groups × ({passes})",
            ),
            Row(
                "checkpoint_bytes", "weights of an SAE", max(checkpoints), "bytes", "exact",
                f"2 × {max(self.widths):,} latents × {meta.d_model} × 4 bytes, and biases",
            ),
            Row(
                "checkpoints_bytes", "weights of all SAEs", sum(checkpoints), "bytes", "exact", "",
            ),
            Row(
                "resume_bytes", "resume points of a group",
                N_RESUME_POINTS * self.resume_bytes(largest), "bytes", "exact",
                f"{N_RESUME_POINTS} × (weights, both moments of Adam, counters of its SAEs), "
                "while it trains; without its curves",
            ),
            Row(
                "window_bytes", "memory for shuffling", window, "bytes", "at most",
                "buffer_mb, or all of the training side if that is less; on the GPU",
            ),
            Row(
                "state_bytes", "memory of a group's SAEs", self.state_bytes(largest), "bytes",
                "exact", "weights, gradients, moments, counters; on the GPU",
            ),
            Row(
                "batch_bytes", "memory of a batch",
                3 * batch * meta.d_model * 4 + chunk, "bytes", "at least",
                "three copies of the batch in float32, and pre-activations (tokens × latents × 4 "
                "bytes, in pieces of at most 2 GiB)",
            ),
            Row(
                "gpu_bytes", "memory of the GPU",
                window + self.state_bytes(largest) + 3 * batch * meta.d_model * 4 + 2 * chunk,
                "bytes", "at least",
                "the sum, with the pre-activations twice; CUDA itself takes about 0.5 GB more",
            ),
        ]  # fmt: skip
        if self.cfg.tokens_per_second:
            n_tokens = sum(self.n_train(saes[members[0]]) for members in self.groups)
            hours = n_tokens / self.cfg.tokens_per_second / 3600
            rows.append(
                Row("training_hours", "hours of a GPU", hours, "hours", "about",
                    "groups × tokens ÷ --tokens-per-second")
            )  # fmt: skip
        return rows

    def checkpoint_bytes(self, i: int) -> int:
        """Bytes of sae.safetensors of one SAE."""
        kind = self.inputs.saes[i].sae.activation.kind
        return formats.safetensors(formats.checkpoint(self.meta.d_model, self.widths[i], kind))

    # --- Measuring -------------------------------------------------------------------------

    def l0(self, sae: TrainConfig) -> int:
        """Active latents per token; 32 if it is not known."""
        return getattr(sae.sae.activation, "top_k", 0) or self.cfg.top_k or 32

    def n_tokens(self, sae: TrainConfig) -> int:
        """Tokens on which an SAE is measured."""
        return self.meta.n_examples * self._tokens(sae.train_data.tokens)

    def codes_bytes(self, sae: TrainConfig) -> int:
        """Bytes of token_acts.npz."""
        n_tokens = self.n_tokens(sae)
        return formats.npz(formats.token_acts(n_tokens, n_tokens * self.l0(sae)))

    def statistics_bytes(self, i: int) -> int:
        """Most bytes of the small files of an inference folder: all patches of the top examples
        fire."""
        d_sae, cfg = self.widths[i], self.inputs.inference
        sae = self.inputs.saes[i]
        n_entries = d_sae * min(cfg.n_top, self.meta.n_examples)
        firing = min(
            n_entries * self._tokens(sae.train_data.tokens), self.n_tokens(sae) * self.l0(sae)
        )
        files = (
            formats.sparsity(d_sae),
            formats.mean_values(d_sae),
            formats.top_examples(d_sae, n_entries, firing),
        )
        return sum(formats.safetensors(tensors) for tensors in files)

    def tables_bytes(self, i: int) -> int:
        """About the bytes of the tables. Those of classes, which are not known, are left out."""
        sae, d_sae, n_images = self.inputs.saes[i], self.widths[i], self.meta.n_examples
        cfg = self.inputs.inference
        active = self._tokens(sae.train_data.tokens) * self.l0(sae)
        n_entries = d_sae * min(cfg.n_top + SPREAD_EXAMPLES, n_images)
        firing = min(n_entries * self._tokens(sae.train_data.tokens), n_images * active)
        return (
            n_images * min(d_sae, active // formats.PATCHES_OF_LATENT) * formats.PAIR_BYTES
            + d_sae * formats.LATENT_BYTES
            + n_entries * formats.EXAMPLE_BYTES
            + firing * formats.PATCH_BYTES
            + n_images * formats.IMAGE_BYTES
            + min(n_images, EMBEDDED_IMAGES) * self.meta.d_model * formats.EMBEDDING_BYTES
            + (self.n_tokens(sae) * self.l0(sae) * formats.CODE_BYTES if cfg.save else 0)
            + formats.FOOTER_BYTES
        )

    def passes(self) -> list[list[int]]:
        """SAEs that are measured together, by their numbers."""
        saes = self.inputs.saes
        return measured_together(
            range(len(saes)),
            lambda i: f"{saes[i].train_data.layer} {saes[i].train_data.tokens}",
            self.measuring_bytes,
        )

    def measuring_bytes(self, i: int) -> int:
        """Memory that an SAE takes while it is measured, alone or with others."""
        meta = self.meta
        n_top = self.inputs.inference.n_top
        return measuring_bytes(meta.d_model, self.widths[i], meta.tokens_per_example, n_top)

    def n_items(self, n_saes: int) -> int:
        """Work items of a group of SAEs."""
        tokens = self.layout.n_examples * self.meta.tokens_per_example
        return math.ceil(self.meta.n_shards / max(1, ITEM_TOKENS // max(1, tokens * n_saes)))

    def measuring(self) -> list[Row]:
        """Rows about `saev inference`."""
        saes, meta = self.inputs.saes, self.meta
        n = len(saes)
        codes = max(self.codes_bytes(sae) for sae in saes) if self.inputs.inference.save else 0
        sure: Sure = "about" if self.inputs.inference.save else "exact"
        l0 = max(self.l0(sae) for sae in saes)
        passes = self.passes()
        return [
            Row(
                "codes_bytes", "sparse codes of an SAE", codes if self.inputs.inference.npz else 0,
                "bytes", sure,
                f"tokens × ({l0} active latents × 8 bytes + 16); --no-npz leaves them out",
            ),
            Row(
                "statistics_bytes", "statistics and top examples",
                max(map(self.statistics_bytes, range(n))), "bytes", "at most",
                f"latents × ({self.inputs.inference.n_top} images × their firing patches × 8 "
                "bytes + 52), of one SAE",
            ),
            Row(
                "tables_bytes", "tables", max(map(self.tables_bytes, range(n))), "bytes", "about",
                f"tokens × {l0} active latents × {formats.CODE_BYTES} bytes; images × latents × "
                f"{formats.PAIR_BYTES} bytes, if each is active on "
                f"{formats.PATCHES_OF_LATENT} patches of an image; of one SAE",
            ),
            Row(
                "inference_scratch_bytes", "on storage while it runs", 2 * codes, "bytes", "about",
                "the codes once more, by shard, until they are merged",
            ),
            Row(
                "inference_groups", "groups", len(passes), "", "exact",
                f"SAEs of one layer that have room in {GROUP_BYTES >> 30} GiB are measured "
                "together",
            ),
            Row(
                "inference_read_bytes", "read in all",
                len(passes) * meta.n_examples * self.row_bytes, "bytes", "about",
                "groups × images × all tokens × width × bytes; more in a pipeline with fewer work "
                "items than slots, where groups are divided, too",
            ),
            Row(
                "inference_sae_bytes", "memory of each SAE that is measured",
                max(map(self.measuring_bytes, range(n))), "bytes", "at most",
                "its weights, its statistics and top examples, and two pieces of 2 million codes",
            ),
            Row(
                "inference_group_bytes", "memory of a group",
                max(sum(map(self.measuring_bytes, members)) for members in passes), "bytes",
                "at most", "the sum of the SAEs that are measured together",
            ),
            Row(
                "inference_items", "work items", sum(self.n_items(len(m)) for m in passes), "",
                "exact", "groups × ranges of shards: each of at least 4 million tokens × SAEs",
            ),
        ]  # fmt: skip

    # --- Altogether ------------------------------------------------------------------------

    def altogether(self) -> list[Row]:
        """Rows about all stages together."""
        saes = self.inputs.saes
        keeps = self.inputs.inference.save and self.inputs.inference.npz
        results = sum(
            self.checkpoint_bytes(i)
            + self.statistics_bytes(i)
            + self.tables_bytes(i)
            + (self.codes_bytes(sae) if keeps else 0)
            for i, sae in enumerate(saes)
        )
        activations = self.activations + self.beside + _EXAMPLE_BYTES * self.meta.n_examples
        reads = sum(self.read_bytes(saes[m[0]]) for m in self.groups)
        reads += len(self.passes()) * self.meta.n_examples * self.row_bytes
        rows = [
            Row("storage_shards_bytes", "shards on storage", activations, "bytes", "about",
                "may be deleted once all SAEs are measured; see docs/cleanup.md"),
            Row("storage_runs_bytes", "runs on storage", results, "bytes", "about",
                "weights, codes, statistics of all SAEs; without pictures"),
            Row("storage_bytes", "on storage", activations + results, "bytes", "about", "the sum"),
            Row("read_bytes", "read in all", reads, "bytes", "about", "training and measuring"),
        ]  # fmt: skip
        if self.cfg.gb_per_second:
            hours = reads / 1e9 / self.cfg.gb_per_second / 3600
            rows.append(
                Row("reading_hours", "hours of reading", hours, "hours", "about",
                    "read in all ÷ --gb-per-second; part of the hours of training and measuring")
            )  # fmt: skip
        return rows
