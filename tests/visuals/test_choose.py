"""Which latents are shown."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from saev.config import VisualsConfig
from saev.errors import ConfigError
from saev.visuals.choose import choose

RNG = np.random.default_rng(0)
FREQUENCY = 10 ** RNG.uniform(-5, -0.5, 400)
VALUES = 10 ** RNG.uniform(-1, 1, 400)
FREQUENCY[:10] = 0
VALUES[:10] = 0


def config(**keys: object) -> VisualsConfig:
    return VisualsConfig.from_dict({"run": "r", "shards": "s", **keys})


def test_explicit_come_first_in_the_order_given_and_once() -> None:
    found = choose(config(latents=(7, 390, 7, 0), n_latents=0), FREQUENCY, VALUES)
    assert found.latents == (7, 390, 0)
    assert found.explicit == {7, 390, 0}


@hypothesis.given(
    n=st.integers(0, 60),
    seed=st.integers(0, 5),
    low=st.floats(-5, -2),
    width=st.floats(0, 3),
    value=st.floats(-1, 1),
)
def test_drawn_latents_are_inside_the_ranges_distinct_and_as_many_as_there_are(
    n: int, seed: int, low: float, width: float, value: float
) -> None:
    cfg = config(
        n_latents=n, seed=seed, latents=(11,), log_freq_range=(low, low + width),
        log_value_range=(value, 1.0),
    )  # fmt: skip
    found = choose(cfg, FREQUENCY, VALUES)
    drawn = found.latents[1:]
    inside = [
        i
        for i in range(10, 400)
        if low <= np.log10(FREQUENCY[i]) <= low + width and np.log10(VALUES[i]) >= value
    ]
    assert len(set(found.latents)) == len(found.latents)
    assert set(drawn) <= set(inside) - {11}
    assert len(drawn) == min(n, len(set(inside) - {11}))
    assert choose(cfg, FREQUENCY, VALUES) == found


def test_seed_changes_the_draw() -> None:
    draws = {choose(config(n_latents=10, seed=s), FREQUENCY, VALUES).latents for s in range(5)}
    assert len(draws) > 1


def test_draw_covers_the_range_of_frequencies() -> None:
    # Nearly all latents are frequent; a plain draw of ten would almost surely show only those.
    frequency = np.concatenate([10 ** np.linspace(-5, -2.1, 30), np.full(5000, 0.01)])
    found = choose(config(n_latents=10), frequency, np.ones(len(frequency)))
    bins = np.histogram(np.log10(frequency[list(found.latents)]), bins=10, range=(-5, -2))[0]
    assert (bins == 1).all()


def test_dead_latents_are_drawn_only_when_asked_for() -> None:
    found = choose(config(n_latents=400, log_freq_range=(-300, 0)), FREQUENCY, VALUES)
    assert min(found.latents) >= 10
    assert choose(config(latents=(3,), n_latents=0), FREQUENCY, VALUES).latents == (3,)


@pytest.mark.parametrize("latent", [400, -1, 10**12])
def test_latent_out_of_range_names_d_sae(latent: int) -> None:
    with pytest.raises(ConfigError, match=rf"Latent {latent} .*d_sae = 400"):
        choose(config(latents=(latent,)), FREQUENCY, VALUES)


def test_reversed_range_is_an_error() -> None:
    with pytest.raises(ConfigError, match="log_freq_range"):
        choose(config(log_freq_range=(-1, -6)), FREQUENCY, VALUES)


def test_too_few_candidates_say_where_the_others_are(caplog: pytest.LogCaptureFixture) -> None:
    found = choose(config(log_freq_range=(-9, -8)), FREQUENCY, VALUES)
    assert found.latents == ()
    assert "--log-freq-range" in caplog.text
