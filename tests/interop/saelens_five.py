"""SAELens 5, whose folders have what version 6 no longer reads: finetuning_scaling_factor.

saelens_five.py WORK    write SAEs and what the package makes of them, as peers.py does
"""

import itertools
import sys

import torch
from peers import NAMES, D, S, Work, randomize

ACTIVATIONS = {
    "standard": ("relu", {}),
    "gated": ("relu", {}),
    "jumprelu": ("relu", {}),
    "topk": ("topk", {"k": 5}),
}


def main() -> None:
    from sae_lens import SAE, SAEConfig

    work = Work(sys.argv[1])
    for (architecture, (activation, kwargs)), finetuned in itertools.product(
        ACTIVATIONS.items(), (False, True)
    ):
        if architecture == "gated" and finetuned:
            continue  # it never made the tensor for these
        cfg = SAEConfig(
            architecture=architecture, d_in=D, d_sae=S, activation_fn_str=activation,
            activation_fn_kwargs=kwargs, apply_b_dec_to_input=architecture != "gated",
            finetuning_scaling_factor=finetuned, context_size=128, hook_layer=11,
            hook_head_index=None, prepend_bos=True, dataset_path="d",
            dataset_trust_remote_code=True, normalize_activations="none", dtype="float32",
            device="cpu", sae_lens_training_version="5.11.0", **NAMES,
        )  # fmt: skip
        sae = SAE(cfg)
        randomize(sae)
        name = f"{architecture}{'-finetuned' if finetuned else ''}"
        sae.save_model(work.case("saelens-five", name))
        acts = sae.encode(work.x)
        work.result("saelens-five", name, acts, sae.decode(acts))


if __name__ == "__main__":
    with torch.no_grad():
        main()
