import numpy as np
import pytest

from bessemer.core.errors import ConfigError
from bessemer.core.yaml_file import dump_yaml
from bessemer.pipeline.planning import training_plan
from bessemer.pipeline.recipe import load_recipe
from bessemer.scaling.hardware import find_card
from bessemer.scaling.ladder import counted, ladder_settings, shape_for
from bessemer.scaling.laws.fit import fit_law
from bessemer.scaling.laws.parametric import BESIROGLU
from bessemer.scaling.suggest import fitted_law, published_law, published_resamples, suggest_for_flops, suggest_for_time
from tests.scaling.test_laws import planted

SIZES = {"vocab_size": 32_768, "context_length": 2048}


def test_the_ladder_s_rules_at_the_size_that_they_were_tuned_at_and_at_eight_times_it():
    tuned, larger = ladder_settings(108e6), ladder_settings(8 * 108e6)
    assert (tuned.batch_tokens, tuned.learning_rate, tuned.beta2, tuned.warmup_tokens) == (327_680, 0.00235, 0.99, 108e6)
    assert larger.batch_tokens == pytest.approx(4 * 327_680) and larger.learning_rate == pytest.approx(0.00235 / 2)
    assert larger.beta2 == 0.95


@pytest.mark.parametrize("count", ["all", "non-embedding"])
@pytest.mark.parametrize("parameters", [5e7, 1e9, 7e10])
def test_a_shape_has_about_the_wanted_parameters_and_the_usual_proportions(parameters, count):
    model = shape_for(parameters, count=count, **SIZES)
    assert counted(model, count) == pytest.approx(parameters, rel=0.1)
    assert 45 < model.hidden_size / model.num_hidden_layers < 81


def test_a_vocabulary_larger_than_the_model_is_refused():
    with pytest.raises(ConfigError, match="no shape of a vocabulary of 128,000"):
        shape_for(1e6, vocab_size=128_000, context_length=256)


def test_the_published_law_s_uncertainty_is_the_paper_s():
    numbers = np.array([law.numbers() for law in published_resamples(2000)])
    assert numbers.std(axis=0) == pytest.approx([0.03, 124.58, 1293.23, 0.02, 0.02], rel=0.3)


def test_a_budget_of_flops_is_spent_at_the_law_s_optimum():
    found = suggest_for_flops(published_law(), 1e20, **SIZES)
    assert found.flops == pytest.approx(1e20, rel=0.01)
    assert 6 * found.parameters * found.tokens == pytest.approx(found.flops)
    assert found.parameters == pytest.approx(BESIROGLU.optimal(1e20)[0], rel=0.1)
    assert found.interval.low < found.loss < found.interval.high
    # the optimum is flat: a shape beside it costs next to nothing
    assert found.loss == pytest.approx(float(BESIROGLU.predict(*BESIROGLU.optimal(1e20))), rel=1e-3)


def test_a_budget_of_days_is_what_the_planned_run_takes():
    found = suggest_for_time(published_law(), 2, gpus=8, card=find_card("h100"), **SIZES)
    assert found.plan is not None and found.plan.days(found.tokens) == pytest.approx(2, rel=0.02)
    assert found.plan.fits and found.settings.batch_size % 8 == 0


def test_more_compute_than_the_law_has_seen_is_said():
    law = fitted_law(fit_law(planted(noise=0.01), "grid", resamples=20), "mine")
    largest = law.flops[1]
    assert suggest_for_flops(law, largest / 2, **SIZES).extrapolation is None
    assert "10 times the compute of the largest point" in str(suggest_for_flops(law, 10 * largest, **SIZES).extrapolation)


@pytest.mark.parametrize("base", ["125m", "quickstart"])
def test_the_suggested_recipe_is_one_with_the_suggested_settings(base, tmp_path):
    asked = training_plan(base)
    sizes = {"vocab_size": asked.model.vocab_size, "context_length": asked.settings.context_length}
    found = suggest_for_flops(published_law(), 1e17, **sizes)
    path = tmp_path / "suggested.yaml"
    path.write_text(dump_yaml(found.recipe(base, asked.settings, "suggested")), encoding="utf-8")
    again = training_plan(str(path))
    assert load_recipe(str(path)).name == "suggested"
    assert (again.tokens, again.model.parameters()) == (found.tokens, found.model.parameters())
    assert again.settings.learning_rate == found.settings.learning_rate and again.settings.matrix_learning_rate is None


def test_a_budget_too_small_for_the_rules_is_refused():
    with pytest.raises(ConfigError, match="budget"):
        suggest_for_flops(published_law(), 1e12, vocab_size=256, context_length=256)
