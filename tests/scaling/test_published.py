"""Predictions beside published runs: within the third that docs/planning.md states."""

import pytest

from bessemer.scaling.published import RUNS, compared


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_published_run_is_predicted_within_a_third(run):
    assert compared(run)["error"] == pytest.approx(0, abs=0.34)


@pytest.mark.parametrize(
    "start, utilisation",
    [
        ("torchtitan 8B, eager", 0.33),
        ("torchtitan 8B, compiled", 0.39),
        ("Megatron 175B, 64", 0.514),
        ("Megatron 530B", 0.560),
        ("Megatron 1T", 0.563),
    ],
)
def test_the_published_utilisation_is_what_our_count_of_flops_gives(start, utilisation):
    run = next(run for run in RUNS if run.name.startswith(start))
    assert compared(run)["utilisation"] == pytest.approx(utilisation, abs=0.008)


def test_nanochat_counts_the_same_flops():
    """Its log gives 4.330784131e19 for 16,704 steps of 524,288 tokens."""
    run = next(run for run in RUNS if run.name.startswith("nanochat"))
    published = 4.330784131228946e19 / (16_704 * 524_288)
    assert run.model.flops_per_token(2048) == pytest.approx(published, rel=1e-4)
