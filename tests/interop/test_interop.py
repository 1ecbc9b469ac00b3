"""Imports and exports against the packages whose formats they are: those decide, not our reading.

`make interop` builds an environment with the packages. peers.py runs there: it writes SAEs with
random weights and what the packages make of them. Here they are read and compared.
"""

import dataclasses
import fcntl
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from saev import load_sae
from saev.config import BatchTopK, JumpRelu, Relu, SaeConfig, TopK
from saev.errors import CheckpointError
from saev.nn import SparseAutoencoder, to_saelens

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PYTHON = ROOT / ".venv-interop" / "bin" / "python"
FIVE = ROOT / ".venv-interop" / "sae-lens-5"
D, S = 16, 48

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / ".venv-interop" / ".installed").exists(),
        reason="the other projects' packages are not installed: run `make interop`",
    ),
]


@dataclasses.dataclass(frozen=True)
class Peers:
    """What the packages wrote."""

    root: Path

    @property
    def x(self) -> torch.Tensor:
        return torch.from_numpy(np.load(self.root / "x.npy"))

    @property
    def report(self) -> dict:
        return json.loads((self.root / "report.json").read_text())

    def cases(self, project: str) -> list[Path]:
        return sorted((self.root / "saes" / project).iterdir())

    def result(self, project: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        with np.load(self.root / "results" / project / f"{name}.npz") as found:
            return torch.from_numpy(found["acts"]), torch.from_numpy(found["x_hat"])


@pytest.fixture(scope="session")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    """Importing the packages takes most of the time, so all workers of pytest share one run."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "peers"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            run_peers(root)
            (root / "done").touch()
    return Peers(root)


def run_peers(root: Path) -> None:
    x = np.random.default_rng(0).standard_normal((64, D)) * 1.5
    np.save(root / "x.npy", x.astype(np.float32))
    errors = root / "errors.txt"
    with errors.open("w") as stderr:
        old = subprocess.Popen(
            [PYTHON, HERE / "saelens_five.py", root],
            env={**os.environ, "PYTHONPATH": str(FIVE)},
            stderr=stderr,
        )
        peers = subprocess.Popen(
            [PYTHON, HERE / "peers.py", root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        with old, peers:
            assert peers.stdout is not None
            if any(line == "made\n" for line in iter(peers.stdout.readline, "")):
                write_exports(Peers(root))
            peers.communicate("go\n")
    assert (old.returncode, peers.returncode) == (0, 0), errors.read_text()[-3000:]


def native(activation) -> SparseAutoencoder:
    g = torch.Generator().manual_seed(1)
    tensors = {
        "W_enc": torch.randn(D, S, generator=g),
        "b_enc": torch.randn(S, generator=g),
        "W_dec": torch.randn(S, D, generator=g),
        "b_dec": torch.randn(D, generator=g),
    }
    if activation.kind == "batch-top-k":
        tensors["threshold"] = torch.tensor(0.8)
    if activation.kind == "jump-relu":
        tensors["threshold"] = torch.rand(S, generator=g)
    cfg = SaeConfig(d_model=D, d_sae=S, activation=activation)
    return SparseAutoencoder.from_tensors(cfg, tensors)


NATIVE = {
    "relu": native(Relu()),
    "top-k": native(TopK(top_k=5)),
    "batch-top-k": native(BatchTopK(top_k=5)),
    "jump-relu": native(JumpRelu()),
}


def write_exports(peers: Peers) -> None:
    """SAELens folders by us: of our own SAEs, and of all that are imported."""
    for name, sae in NATIVE.items():
        to_saelens(sae, str(peers.root / "exports" / f"native--{name}"))
    for project in ("saelens", "sparsify", "dictionary_learning", "gemma-scope", "overcomplete"):
        for place in peers.cases(project):
            try:
                sae = load(place)
            except CheckpointError:
                continue  # the tests below say which may be refused
            to_saelens(sae, str(peers.root / "exports" / f"{project}--{place.stem}"))


def load(place: Path) -> SparseAutoencoder:
    if place.suffix != ".pt" or place.stem == "jump":
        return load_sae(str(place))
    return load_sae(str(place), top_k=S if place.stem == "relu" else 5)


def assert_equal(sae: SparseAutoencoder, peers: Peers, project: str, name: str) -> None:
    acts, x_hat = peers.result(project, name)
    out = sae(peers.x)
    assert 0 < (acts != 0).double().mean() < 1
    for ours, theirs in ((out.acts, acts), (out.x_hat, x_hat)):
        atol = 1e-5 * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)


# --- SAELens -----------------------------------------------------------------------------------

LOADED = ["batchtopk", "gated", "jumprelu", "matryoshka_batchtopk", "standard", "topk"]
TRANSCODER = (
    "it reconstructs the activations of another place than it reads, so it is not an autoencoder."
)
REFUSED = {
    "abstopk": "it keeps the values of largest magnitude, negative ones too, as no activation of "
    "saev does.",
    "jumprelu_skip_transcoder": TRANSCODER,
    "jumprelu_transcoder": TRANSCODER,
    "matching_pursuit": "it chooses latents one after the other, each by what the ones before it "
    "left over, instead of by an encoder.",
    "skip_transcoder": TRANSCODER,
    "temporal": "its latents depend on other tokens, through attention.",
    "transcoder": TRANSCODER,
}


def test_every_architecture_that_saelens_registers_is_read_or_refused(peers: Peers) -> None:
    registered = {name for kind in ("use", "training") for name in peers.report["registered"][kind]}
    assert registered == {*LOADED, *REFUSED}


@pytest.mark.parametrize("architecture", LOADED)
def test_an_imported_saelens_folder_is_what_saelens_makes_of_it(
    architecture: str, peers: Peers
) -> None:
    names = [p.name for p in peers.cases("saelens") if p.name.split("-")[1] == architecture]
    assert any(name.endswith("float32") for name in names)
    assert any(name.endswith("bfloat16") for name in names)
    for name in names:
        sae = load_sae(str(peers.root / "saes" / "saelens" / name))
        if "bfloat16" in name:
            assert_close_in_bfloat16(sae, peers, name)
            # What is saved after training as another architecture is rounded once more.
            if "batchtopk" not in name or name.endswith("-inference"):
                assert_equal(sae, peers, "saelens", f"{name}-in-float32")
        else:
            assert_equal(sae, peers, "saelens", name)


def assert_close_in_bfloat16(sae: SparseAutoencoder, peers: Peers, name: str) -> None:
    """SAELens computes in the type of the weights, and rounds the input to it.

    So latents near a threshold, or near the k-th, can be others; tokens where none is are compared.
    """
    acts, x_hat = peers.result("saelens", name)
    out = sae(peers.x.bfloat16())
    alike = ((out.acts != 0) == (acts != 0)).all(dim=1)
    assert alike.double().mean() > 0.5
    for ours, theirs in ((out.acts, acts), (out.x_hat, x_hat)):
        error = (ours - theirs)[alike].norm() / theirs[alike].norm()
        assert error < 1e-2


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_stands_in_the_way_is_said(architecture: str, peers: Peers) -> None:
    names = [p.name for p in peers.cases("saelens") if p.name.split("-")[1] == architecture]
    assert names
    for name in names:
        folder = peers.root / "saes" / "saelens" / name
        with pytest.raises(CheckpointError) as caught:
            load_sae(str(folder))
        assert str(caught.value) == (
            f"{folder}/cfg.json has architecture {architecture!r}, which cannot be imported: "
            f"{REFUSED[architecture]}"
        )


def test_configs_of_earlier_versions_are_read_as_saelens_reads_them(peers: Peers) -> None:
    names = [p.name for p in peers.cases("saelens") if p.name.startswith("old-")]
    assert len(names) == 10
    for name in names:
        sae = load_sae(str(peers.root / "saes" / "saelens" / name))
        assert_equal(sae, peers, "saelens", name)


FIVE_CASES = ["gated", "jumprelu", "jumprelu-finetuned", "standard", "standard-finetuned"]
FIVE_CASES += ["topk", "topk-finetuned"]


@pytest.mark.parametrize("name", FIVE_CASES)
def test_folders_of_version_five_are_what_that_made_of_them(name: str, peers: Peers) -> None:
    sae = load_sae(str(peers.root / "saes" / "saelens-five" / name))
    assert_equal(sae, peers, "saelens-five", name)


@pytest.mark.parametrize("name", ["layer_norm", "constant_norm_rescale", "covariance_whitening"])
def test_normalizations_of_each_input_are_refused_by_name(name: str, peers: Peers) -> None:
    with pytest.raises(CheckpointError, match=f"normalize_activations = '{name}'"):
        load_sae(str(peers.root / "saes" / "saelens-refused" / name))


def test_a_factor_that_saelens_folds_is_given_by_the_user(peers: Peers) -> None:
    folder = str(peers.root / "saes" / "saelens-scaled" / "jumprelu")
    assert_equal(load_sae(folder, scale=0.75), peers, "saelens-scaled", "jumprelu")
    with pytest.raises(CheckpointError, match=r"expected_average_only_in.*Give it as `scale`"):
        load_sae(folder)


@pytest.mark.parametrize("name", NATIVE)
def test_saelens_reads_our_exports(name: str, peers: Peers) -> None:
    assert_equal(NATIVE[name], peers, "exports", f"native--{name}")


@pytest.mark.parametrize(
    "project", ["saelens", "sparsify", "dictionary_learning", "gemma-scope", "overcomplete"]
)
def test_saelens_reads_what_was_imported_and_exported_again(project: str, peers: Peers) -> None:
    places = [p for p in (peers.root / "exports").iterdir() if p.name.startswith(f"{project}--")]
    assert places
    for place in places:
        sae = load_sae(str(place))
        assert_equal(sae, peers, "exports", place.name)
        if "bfloat16" not in place.name:
            assert_equal(sae, peers, project, place.name.removeprefix(f"{project}--"))


# --- The others --------------------------------------------------------------------------------


def test_gemma_scope_files_are_what_saelens_makes_of_them(peers: Peers) -> None:
    for place in peers.cases("gemma-scope"):
        assert_equal(load_sae(str(place)), peers, "gemma-scope", place.name)
        assert_equal(load_sae(str(place / "params.npz")), peers, "gemma-scope", place.name)


def test_sparsify_folders_are_what_sparsify_makes_of_them(peers: Peers) -> None:
    places = peers.cases("sparsify")
    assert len(places) == 4
    for place in places:
        assert_equal(load_sae(str(place)), peers, "sparsify", place.name)
        assert_equal(load_sae(str(place / "sae.safetensors")), peers, "sparsify", place.name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transcode", "transcode = true, which cannot be imported: it reconstructs what a module"),
        ("skip", "skip_connection = true, which cannot be imported: it adds a linear map"),
        ("groupmax", "activation = 'groupmax', expected 'topk'"),
    ],
)
def test_features_of_sparsify_that_stand_in_the_way(name, message, peers: Peers) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(peers.root / "saes" / "sparsify-refused" / name))


def test_dictionaries_are_what_dictionary_learning_makes_of_them(peers: Peers) -> None:
    places = peers.cases("dictionary_learning")
    classes = {place.name.split("-")[0] for place in places}
    # Dictionary is abstract, and IdentityDict has no weights.
    registered = set(peers.report["registered"]["dictionary_learning"])
    assert registered - {"Dictionary", "IdentityDict"} <= classes
    assert len(classes) == 7
    for place in places:
        assert_equal(load_sae(str(place)), peers, "dictionary_learning", place.name)
        assert_equal(load_sae(str(place / "ae.pt")), peers, "dictionary_learning", place.name)


@pytest.mark.parametrize(
    "name", ["topk", "topk-multiplier", "topk-tied", "topk-untied", "relu", "jump", "archetypal"]
)
def test_state_dicts_are_what_overcomplete_makes_of_them(name: str, peers: Peers) -> None:
    place = peers.root / "saes" / "overcomplete" / f"{name}.pt"
    assert_equal(load(place), peers, "overcomplete", name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("module", r"refers to overcomplete\.sae\.topk_sae\.TopKSAE.*Save its state_dict\(\)"),
        ("archetypal-untrained", r"no convex combinations\. Call eval\(\)"),
        ("layer-norm", r"has encoder\.final_block\.1\.bias, .* not known"),
    ],
)
def test_state_dicts_of_overcomplete_that_cannot_be_read(name, message, peers: Peers) -> None:
    place = peers.root / "saes" / "overcomplete-refused" / f"{name}.pt"
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(place), top_k=5)
