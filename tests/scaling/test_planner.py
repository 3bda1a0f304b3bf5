import pytest

from bessemer.distributed.layout import Layout, balanced_stages
from bessemer.model.config import preset_config
from bessemer.model.presets import PRESET_VOCABULARIES
from bessemer.scaling.hardware import CARDS, find_card
from bessemer.scaling.job import Candidate, PlannedJob
from bessemer.scaling.planner import DoesNotFitError, candidates, evaluate, layouts, plans, suggest_settings
from bessemer.training.pretrain_config import PretrainConfig


def job(preset, card="h100", **settings):
    values = {"steps": 1, "batch_size": 64, "context_length": 2048, "optimizer": "adamw"} | settings
    return PlannedJob(preset_config(preset, PRESET_VOCABULARIES[preset]), PretrainConfig(**values), find_card(card))


def test_every_layout_uses_every_card_and_divides_the_model_and_the_batch():
    asked = job("mixtral-8x7b")
    found = list(layouts(asked, 32))
    assert len(found) == len(set(found)) > 20
    for layout in found:
        assert layout.world_size == 32
        assert layout.tensor <= 8 and asked.settings.batch_size % layout.data_ranks == 0
        layout.check(asked.model, asked.settings.context_length)


def test_micro_batches_divide_the_rows_of_a_rank():
    for candidate in candidates(job("qwen3-0.6b"), 8):
        assert 64 // candidate.layout.data_ranks % candidate.micro_batch_size == 0


def test_plans_share_and_cut_the_growing_batches_too():
    growing = job("qwen3-0.6b", steps=9, batch_size_warmup={"start": 16, "steps": 4})
    found = list(candidates(growing, 8))
    assert found and all(16 % (each.layout.data_ranks * each.micro_batch_size) == 0 for each in found)
    assert all(each.layout.pipeline == 1 for each in found)


def test_a_pipeline_gets_at_least_as_many_micro_batches_as_ranks():
    asked = job("qwen3-0.6b")
    piped = [candidate for candidate in candidates(asked, 8) if candidate.layout.pipeline > 1]
    assert piped and all(asked.micro_batches(candidate) >= candidate.layout.pipeline for candidate in piped)


def test_the_best_plan_is_the_fastest_that_fits():
    asked = job("llama-3.1-8b")
    found = plans(asked, 8, count=3)
    steps = [plan.timing.step for plan in found]
    assert steps == sorted(steps)
    assert all(plan.fits for plan in found)
    fitting = [evaluate(asked, candidate) for candidate in candidates(asked, 8)]
    assert steps[0] == min(plan.timing.step for plan in fitting if plan.fits)


def test_a_model_that_fits_nowhere_says_how_many_cards_hold_it():
    with pytest.raises(DoesNotFitError, match=r"does not fit 1 × h100.* it would fit 4 \("):
        plans(job("llama-3.1-8b", context_length=8192), 1)


def test_a_batch_that_divides_over_no_layout_says_which_number_is_in_the_way():
    with pytest.raises(DoesNotFitError, match="no layout of 29 cards divides batch_size 64"):
        plans(job("qwen3-0.6b"), 29)


def test_out_of_memory_is_answered_with_what_fits():
    asked = job("qwen3-0.6b", batch_size=64)
    text = suggest_settings(asked.model, asked.settings, 24e9, asked.card)
    assert text.startswith("micro_batch_size: ") and "would fit" in text
    micro_batch_size, recompute = int(text.split()[1]), text.split()[4]
    assert evaluate(asked, Candidate(Layout(), micro_batch_size, recompute)).memory.peak <= 24e9
    assert suggest_settings(asked.model, asked.settings, 1e9, asked.card).startswith("nothing fits 1.0 GB")


@pytest.mark.parametrize("stages", [1, 3, 8, 24])
def test_stages_hold_every_layer_once_and_the_dearest_is_no_dearer_than_it_must_be(stages):
    model = preset_config("gpt3-175b", 51_200)
    found = balanced_stages(model, stages)
    assert [layer for stage in found for layer in stage] == list(range(96))
    assert len(found) == stages and all(found)
    head = 51_200 * 12_288 / (12 * 12_288**2)  # in layers
    lengths = [len(stage) for stage in found]
    lengths[-1] += head
    assert max(lengths) <= -(-(96 + head) // stages) + 1e-9


def test_a_faster_card_is_never_slower():
    slow, fast = (evaluate(job("qwen3-0.6b", card), Candidate(Layout(), 8)).timing.step for card in ("a100", "b200"))
    assert fast < slow


def test_interleaving_shortens_the_bubble_by_the_number_of_stages():
    asked = job("llama-3.1-8b")
    plain, interleaved = (
        evaluate(asked, Candidate(Layout(pipeline=4), 1, "none", schedule, stages)).timing
        for schedule, stages in (("1f1b", 1), ("interleaved", 2))
    )
    busy = plain.step - plain.bubble - plain.optimizer
    assert plain.bubble == pytest.approx(busy * 3 / 64)
    assert interleaved.bubble / (interleaved.step - interleaved.bubble - interleaved.optimizer) == pytest.approx(3 / 128)


@pytest.mark.parametrize("name", CARDS)
def test_a_card_s_figures_are_in_the_same_units(name):
    card = CARDS[name]
    assert 1e11 < card.flops < 1e16 and 1e10 < card.memory < 1e12 and 1e10 <= card.bandwidth < 1e13
    assert card.network_link <= card.node_link < card.bandwidth and 0 < card.achievable < 1


def test_an_unknown_card_is_named_with_the_nearest():
    with pytest.raises(Exception, match="did you mean 'h100'"):
        find_card("h1000")
