"""The other projects' side of tests/interop. It runs in their environment (`make interop`).

    peers.py --versions    import all of them and print what they are
    peers.py WORK          write SAEs into WORK/saes, and what the packages make of WORK/x.npy into
                           WORK/results; print "made"; once a line comes, do the latter for the
                           SAELens folders in WORK/exports as well

A case is a folder or file WORK/saes/PROJECT/CASE, and WORK/results/PROJECT/CASE.npz has its latents
`acts` and reconstruction `x_hat`. WORK/report.json says what is registered and what raised.
"""

import dataclasses
import importlib.metadata
import inspect
import json
import os
import pathlib
import shutil
import sys
import warnings

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", SPARSIFY_DISABLE_TRITON="1")
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402

D, S = 16, 48
PROJECTS = ("sae-lens", "eai-sparsify", "dictionary-learning", "overcomplete")


class Work:
    """The folder that both sides share."""

    def __init__(self, root: str):
        self.root = pathlib.Path(root)
        self.x = torch.from_numpy(np.load(self.root / "x.npy"))
        self.report: dict = {"registered": {}, "refused": {}}

    def case(self, project: str, name: str) -> pathlib.Path:
        path = self.root / "saes" / project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def result(self, project: str, name: str, acts: torch.Tensor, x_hat: torch.Tensor) -> None:
        path = self.root / "results" / project / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, acts=acts.detach().float(), x_hat=x_hat.detach().float())


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Other values in every float tensor: initial values are often zero, and hide differences."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for _, tensor in sorted(tensors, key=lambda item: item[0]):
        if not tensor.is_floating_point():
            continue
        size = 0.5 if tensor.ndim < 2 else 1.0
        values = torch.randn(tensor.shape, generator=generator) * size
        tensor.data.copy_(values.to(tensor.dtype))


# --- SAELens -----------------------------------------------------------------------------------

NO_B_DEC = {"apply_b_dec_to_input": False}
VARIANTS = {
    "standard": [{}, NO_B_DEC],
    "topk": [
        {"k": 5},
        {"k": 5, "rescale_acts_by_decoder_norm": True},
        {"k": S, **NO_B_DEC},
    ],
    "abstopk": [{"k": 5}],
    "jumprelu": [{}, NO_B_DEC],
    "gated": [{}, NO_B_DEC],
    "transcoder": [{"d_out": D, **NO_B_DEC}],
    "skip_transcoder": [{"d_out": D, **NO_B_DEC}],
    "jumprelu_transcoder": [{"d_out": D, **NO_B_DEC}],
    "jumprelu_skip_transcoder": [{"d_out": D, **NO_B_DEC}],
    "temporal": [{"n_heads": 1, "bottleneck_factor": 4}],
    "batchtopk": [
        {"k": 5, "rescale_acts_by_decoder_norm": False},
        {"k": 5.5, "rescale_acts_by_decoder_norm": True},
        {"k": 5, **NO_B_DEC},
    ],
    "matryoshka_batchtopk": [{"k": 5, "matryoshka_widths": [12, S]}],
}
NORMALIZATIONS = ("layer_norm", "constant_norm_rescale", "covariance_whitening")
NAMES = {"model_name": "vit", "hook_name": "blocks.11.hook_resid_post"}


def saelens_make(work: Work) -> None:
    from sae_lens import SAE, TrainingSAE
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
    from sae_lens.saes.sae import SAEMetadata

    registries = {"use": SAE_CLASS_REGISTRY, "training": SAE_TRAINING_CLASS_REGISTRY}
    work.report["registered"] = {kind: sorted(found) for kind, found in registries.items()}
    for kind, registry in registries.items():
        base = SAE if kind == "use" else TrainingSAE
        for architecture, (cls, config) in registry.items():
            for number, variant in enumerate(VARIANTS.get(architecture, [{}])):
                for dtype in ("float32", "bfloat16"):
                    name = f"{kind}-{architecture}-{number}-{dtype}"
                    cfg = config(
                        d_in=D, d_sae=S, dtype=dtype, metadata=SAEMetadata(**NAMES),
                        **{k: v for k, v in variant.items() if k in fields(config)},
                    )  # fmt: skip
                    sae = cls(cfg)
                    randomize(sae)
                    if hasattr(sae, "topk_threshold"):
                        sae.topk_threshold.fill_(1.25)
                    if kind == "training" and hasattr(sae, "threshold"):
                        sae.threshold.abs_()  # as every step of training makes it
                    folder = work.case("saelens", name)
                    sae.save_model(folder)
                    if "batchtopk" in architecture:  # evaluated as the JumpReLU it is saved as
                        folder = work.case("saelens", f"{name}-inference")
                        sae.save_inference_model(folder)
                        saelens_encode(work, SAE, folder, (name, f"{name}-inference"), dtype)
                    else:
                        saelens_encode(work, base, folder, (name,), dtype)
    for normalization in NORMALIZATIONS:
        cls, config = SAE_CLASS_REGISTRY["standard"]
        cfg = config(d_in=D, d_sae=S, normalize_activations=normalization)
        cls(cfg).save_model(work.case("saelens-refused", normalization))
    saelens_scaled(work, *SAE_CLASS_REGISTRY["jumprelu"])
    saelens_old(work, SAE)


def fields(config: type) -> set:
    return {field.name for field in dataclasses.fields(config)}


def saelens_encode(work: Work, base: type, folder: pathlib.Path, names: tuple, dtype: str) -> None:
    """Latents and reconstruction by the package, in the type of the weights and in float32."""
    for compute in {dtype, "float32"}:
        sae = base.load_from_disk(folder, dtype=compute).eval()
        # The temporal SAE wants a sequence, others take it as well.
        x = work.x[None].to(getattr(torch, compute))
        acts = sae.encode(x)
        x_hat = sae.decode(acts)
        for name in names:
            suffix = "" if compute == dtype else f"-in-{compute}"
            work.result("saelens", f"{name}{suffix}", acts[0], x_hat[0])


def saelens_scaled(work: Work, cls: type, config: type) -> None:
    """normalize_activations with a factor that the folder does not record."""
    sae = cls(config(d_in=D, d_sae=S, normalize_activations="expected_average_only_in"))
    randomize(sae)
    sae.save_model(work.case("saelens-scaled", "jumprelu"))
    sae.fold_activation_norm_scaling_factor(0.75)
    acts = sae.encode(work.x)
    work.result("saelens-scaled", "jumprelu", acts, sae.decode(acts))


OLD = {
    "d_in": D, "d_sae": S, "dtype": "torch.float32", "device": "cpu", "hook_layer": 11,
    "hook_head_index": None, "prepend_bos": True, "context_size": 128, "dataset_path": "d",
    "dataset_trust_remote_code": True, "finetuning_scaling_factor": False,
    "sae_lens_training_version": "3.0.0", **NAMES,
}  # fmt: skip
OLD_CONFIGS = {
    "relu": ("standard", {"activation_fn_str": "relu", "apply_b_dec_to_input": True}),
    "no-apply-b-dec": ("standard", {}),
    "normalize-false": ("standard", {"normalize_activations": False}),
    "normalize-null": ("standard", {"normalize_activations": None}),
    "topk": ("standard", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}),
    "topk-5": ("topk", {"activation_fn": "topk", "activation_fn_kwargs": {"k": 5}}),
    "gated": ("gated", {"apply_b_dec_to_input": False}),
    "jumprelu": ("jumprelu", {"activation_fn_kwargs": {}}),
    "no-architecture": ("", {"hook_point": "blocks.11"}),
    "scaling-factor-of-ones": ("standard", {}),
}


def saelens_old(work: Work, base: type) -> None:
    """Configs of versions 1 to 5, which the installed version still reads."""
    from safetensors.torch import save_file

    for name, (architecture, extra) in OLD_CONFIGS.items():
        folder = work.case("saelens", f"old-{name}")
        cases = work.root / "saes" / "saelens"
        like = {"gated": "gated", "jumprelu": "jumprelu"}.get(architecture, "standard")
        shutil.copytree(cases / f"use-{like}-0-float32", folder)
        cfg = OLD | extra | ({"architecture": architecture} if architecture else {})
        (folder / "cfg.json").write_text(json.dumps(cfg))
        if name == "scaling-factor-of-ones":
            from safetensors.torch import load_file

            weights = load_file(folder / "sae_weights.safetensors")
            save_file(
                weights | {"scaling_factor": torch.ones(S)}, folder / "sae_weights.safetensors"
            )
        saelens_encode(work, base, folder, (f"old-{name}",), "float32")


def saelens_exports(work: Work) -> None:
    from sae_lens import SAE

    for folder in sorted((work.root / "exports").iterdir()):
        sae = SAE.load_from_disk(folder)
        acts = sae.encode(work.x)
        work.result("exports", folder.name, acts, sae.decode(acts))


def gemma_scope_make(work: Work) -> None:
    """SAELens' own reader of Gemma Scope's files, from a hub cache with one repository in it."""
    from huggingface_hub import constants
    from sae_lens.loading.pretrained_sae_loaders import gemma_2_sae_huggingface_loader
    from sae_lens.registry import SAE_CLASS_REGISTRY

    generator = torch.Generator().manual_seed(7)
    arrays = {
        "W_enc": torch.randn(D, S, generator=generator).numpy(),
        "W_dec": torch.randn(S, D, generator=generator).numpy(),
        "b_enc": torch.randn(S, generator=generator).numpy(),
        "b_dec": torch.randn(D, generator=generator).numpy(),
        "threshold": torch.randn(S, generator=generator).numpy(),
    }
    place = "layer_1/width_16k/average_l0_5"
    commit = "0" * 40
    for name, save in (("plain", np.savez), ("compressed", np.savez_compressed)):
        repo = f"someone/gemma-scope-2b-pt-res-{name}"
        cache = work.root / "hub" / f"models--{repo.replace('/', '--')}"
        folder = cache / "snapshots" / commit / place
        folder.mkdir(parents=True)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(commit)
        save(folder / "params.npz", **arrays)
        constants.HF_HUB_CACHE = str(work.root / "hub")
        cfg, state, _ = gemma_2_sae_huggingface_loader(
            repo, place, cfg_overrides={"d_in": D, "d_sae": S}
        )
        cls, config = SAE_CLASS_REGISTRY[cfg["architecture"]]
        known = {k: v for k, v in cfg.items() if k in fields(config)}
        sae = cls(config(**known | {"normalize_activations": "none"}))
        sae.load_state_dict(state)
        acts = sae.encode(work.x)
        target = work.case("gemma-scope", name)
        target.mkdir()
        shutil.copy(folder / "params.npz", target)
        work.result("gemma-scope", name, acts, sae.decode(acts))


# --- sparsify ----------------------------------------------------------------------------------

SPARSIFY = {
    "topk": {"k": 5, "expansion_factor": 3},
    "num-latents": {"k": 5, "num_latents": S, "multi_topk": True},
    "bfloat16": {"k": 5, "expansion_factor": 3},
    "all": {"k": S, "num_latents": S},
}
SPARSIFY_REFUSED = {
    "transcode": {"k": 5, "num_latents": S, "transcode": True},
    "skip": {"k": 5, "num_latents": S, "skip_connection": True},
    "groupmax": {"k": 6, "num_latents": S, "activation": "groupmax"},
}


def sparsify_make(work: Work) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    for name, config in (SPARSIFY | SPARSIFY_REFUSED).items():
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        coder = SparseCoder(D, SparseCoderConfig(**config), dtype=dtype)
        randomize(coder)
        project = "sparsify-refused" if name in SPARSIFY_REFUSED else "sparsify"
        folder = work.case(project, name)
        coder.save_to_disk(folder)
        coder = SparseCoder.load_from_disk(folder)
        if name == "bfloat16":
            coder = coder.float()
        values, indices, _ = coder.encode(work.x)
        acts = torch.zeros(len(work.x), S).scatter(-1, indices, values)
        work.result(project, name, acts, coder.decode(values, indices))


# --- dictionary_learning -----------------------------------------------------------------------


def dictionary_learning_make(work: Work) -> None:
    from dictionary_learning import dictionary, utils
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    classes = {
        dictionary.AutoEncoder: {},
        dictionary.AutoEncoderNew: {},
        dictionary.GatedAutoEncoder: {},
        dictionary.JumpReluAutoEncoder: {},
        AutoEncoderTopK: {"k": 5},
        BatchTopKSAE: {"k": 5},
        MatryoshkaBatchTopKSAE: {"k": 5, "group_sizes": [12, 36]},
    }
    work.report["registered"]["dictionary_learning"] = sorted(
        name
        for name, cls in inspect.getmembers(dictionary, inspect.isclass)
        if issubclass(cls, dictionary.Dictionary)
    )
    for cls, arguments in classes.items():
        for untrained in (False, True):
            autoencoder = cls(D, S, **arguments)
            randomize(autoencoder)
            if "threshold" in dict(autoencoder.named_buffers()):  # -1 until it is learned
                autoencoder.threshold.fill_(-1.0 if untrained else 1.25)
            elif untrained:
                continue
            name = cls.__name__ + ("-untrained" if untrained else "")
            folder = work.case("dictionary_learning", name)
            folder.mkdir()
            # As dictionary_learning.training.trainSAE saves them.
            torch.save({k: v.cpu() for k, v in autoencoder.state_dict().items()}, folder / "ae.pt")
            trainer = {"dict_class": cls.__name__, **arguments}
            (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
            if cls is dictionary.AutoEncoder:  # its check of the sum is for larger weights
                loaded = cls.from_pretrained(folder / "ae.pt", normalize_decoder=True)
            else:
                loaded, _ = utils.load_dictionary(str(folder), "cpu")
            acts = loaded.encode(work.x)
            work.result("dictionary_learning", name, acts, loaded.decode(acts))


# --- overcomplete ------------------------------------------------------------------------------


def import_overcomplete() -> None:
    """Its pictures use a function that matplotlib 3.9 removed; they play no part here."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.cm.get_cmap = plt.get_cmap
    import overcomplete.sae  # noqa: F401


def overcomplete_make(work: Work) -> None:
    from overcomplete.sae import SAE, JumpSAE, RATopKSAE, TopKSAE

    points = torch.randn(20, D, generator=torch.Generator().manual_seed(3))
    multiplied = {"dictionary_params": {"use_multiplier": True}}
    cases = {
        "topk": TopKSAE(D, S, top_k=5),
        "topk-multiplier": TopKSAE(D, S, top_k=5, **multiplied),
        "topk-tied": TopKSAE(D, S, top_k=5).tied(bias=True),
        "topk-untied": TopKSAE(D, S, top_k=5).untied(),
        "relu": SAE(D, S),
        "jump": JumpSAE(D, S),
        "archetypal": RATopKSAE(D, S, points, top_k=5),
    }
    for name, sae in cases.items():
        saved_in_training = name == "topk-multiplier"
        randomize(sae)
        if name == "archetypal":
            sae.dictionary.C.copy_(points)
        sae.train()
        sae(work.x)  # scales the rows of the dictionary, as every step of training does
        if saved_in_training:
            sae.dictionary._weights.data.mul_(1.01)  # and the optimiser moves them after that
        else:
            sae.eval()
        path = work.case("overcomplete", f"{name}.pt")
        torch.save(sae.state_dict(), path)
        sae.train()
        sae.load_state_dict(torch.load(path))
        sae.eval()
        _, acts = sae.encode(work.x)
        work.result("overcomplete", name, acts, sae.decode(acts))
    torch.save(cases["topk"], work.case("overcomplete-refused", "module.pt"))
    torch.save(
        RATopKSAE(D, S, points, top_k=5).state_dict(),
        work.case("overcomplete-refused", "archetypal-untrained.pt"),
    )
    own = TopKSAE(D, S, top_k=5, encoder_module="mlp_ln_1")
    torch.save(own.state_dict(), work.case("overcomplete-refused", "layer-norm.pt"))


def main() -> None:
    import_overcomplete()
    if sys.argv[1] == "--versions":
        for module in ("dictionary_learning", "sae_lens", "sparsify"):
            importlib.import_module(module)
        print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in PROJECTS))
        return
    torch.set_num_threads(1)
    work = Work(sys.argv[1])
    with torch.no_grad():
        saelens_make(work)
        gemma_scope_make(work)
        sparsify_make(work)
        dictionary_learning_make(work)
        overcomplete_make(work)
        (work.root / "report.json").write_text(json.dumps(work.report))
        print("made", flush=True)
        sys.stdin.readline()
        saelens_exports(work)


if __name__ == "__main__":
    main()
