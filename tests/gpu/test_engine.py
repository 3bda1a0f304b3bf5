"""The engine on a card: the answers of the engine on the processor, in whatever company and however they are computed."""

from __future__ import annotations

import copy

import pytest
import torch

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.inference.execution.linear import free_bytes
from bessemer.model.adapters.folder import write_adapter
from bessemer.model.storage.folder import save_model
from tests.gpu.comparison import KINDS, assert_same_but_for_ties
from tests.inference.models import ARCHITECTURES, BASE, small_decoder
from tests.inference.test_identity import PARAMS, PROMPTS, WAYS, alone
from tests.model.random_adapters import merge, random_adapter
from tests.model.randomised import random_decoder

pytestmark = pytest.mark.gpu

#: A text that repeats itself, so that n-grams have something to guess, and others.
REPEATING = [[*range(40, 60)] * 2, [5, 6, 5, 7] * 8, [9] * 20]


@pytest.fixture(scope="module")
def decoder_on(device):
    """A small decoder on the card, each made once."""
    made = {}
    return lambda name: made.setdefault(name, small_decoder(name).to(device))


@pytest.fixture(scope="module")
def answers_on_the_processor(tokenizer):
    made = {}

    def answers(name):
        if name not in made:
            made[name] = alone(small_decoder(name), tokenizer)
        return made[name]

    return answers


def generated(model, tokenizer, prompts, params=PARAMS, adapter=None, **settings):
    return Engine(model, tokenizer, config=EngineConfig(**settings)).generate(prompts, params, adapter=adapter)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_the_processor(name, tokenizer, decoder_on, answers_on_the_processor):
    assert_same_but_for_ties(alone(decoder_on(name), tokenizer), answers_on_the_processor(name))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KINDS)
def test_tokens_are_the_same_every_way(name, way, tokenizer, decoder_on, answers_on_the_processor):
    assert_same_but_for_ties(WAYS[way](decoder_on(name), tokenizer), answers_on_the_processor(name))


@pytest.mark.parametrize("way", ["in company", "from cached pages"])
@pytest.mark.parametrize("name", KINDS)
def test_an_invariant_engine_gives_the_same_bits_every_way(name, way, tokenizer, decoder_on):
    model = decoder_on(name)
    assert WAYS[way](model, tokenizer, batch_invariant=True) == alone(model, tokenizer, batch_invariant=True)


def test_a_folder_is_served_from_the_card(tokenizer, device, tmp_path, answers_on_the_processor):
    save_model(small_decoder("dense"), tmp_path, tokenizer=tokenizer.folder)
    engine = Engine(tmp_path, device=device.type, config=EngineConfig(dtype="float32"))
    assert engine.model.device.type == device.type
    assert {pages.keys.device.type for pages in engine.core.runner.memory.layers.values()} == {device.type}
    assert_same_but_for_ties(engine.generate(PROMPTS, PARAMS), answers_on_the_processor("dense"))


def test_what_is_free_is_the_cards_memory(device):
    assert 0 < free_bytes(device) <= torch.cuda.get_device_properties(device).total_memory


def test_pages_of_integers_give_nearly_the_same(tokenizer, decoder_on):
    model = decoder_on("dense")
    narrow = generated(model, tokenizer, PROMPTS, kv_cache_dtype="int8")
    expected = generated(small_decoder("dense"), tokenizer, PROMPTS, kv_cache_dtype="int8")
    assert_same_but_for_ties(narrow, expected, error=0.05, tie=0.05)


@pytest.mark.parametrize("name", ["dense", "linear"])
def test_guesses_by_ngrams_change_no_token(name, tokenizer, decoder_on):
    speculation = {"method": "ngram", "tokens": 5, "adapt": False}
    model = decoder_on(name)
    engine = Engine(model, tokenizer, config=EngineConfig(speculation=speculation))
    assert_same_but_for_ties(engine.generate(REPEATING, PARAMS), generated(model, tokenizer, REPEATING))
    assert engine.core.strategy.counts.proposed > 0


def test_drafts_of_mtp_modules_change_no_token(tokenizer, device):
    model = random_decoder(BASE.with_changes(num_nextn_predict_layers=2)).to(device)
    speculation = {"method": "mtp", "tokens": 3, "adapt": False}
    engine = Engine(model, tokenizer, config=EngineConfig(speculation=speculation))
    assert_same_but_for_ties(engine.generate(REPEATING, PARAMS), generated(model, tokenizer, REPEATING))
    assert engine.core.strategy.counts.proposed > 0


def test_guesses_by_a_smaller_model_change_no_token(tokenizer, decoder_on, tmp_path):
    save_model(small_decoder("dense"), tmp_path, tokenizer=tokenizer.folder)
    model = decoder_on("windows")
    speculation = {"method": "draft", "model": str(tmp_path), "tokens": 3, "adapt": False}
    engine = Engine(model, tokenizer, config=EngineConfig(speculation=speculation))
    assert engine.core.strategy.proposer.model.device == model.device
    assert_same_but_for_ties(engine.generate(REPEATING, PARAMS), generated(model, tokenizer, REPEATING))
    assert engine.core.strategy.counts.proposed > 0


def test_beams_are_those_of_the_processor(tokenizer, decoder_on):
    params = SamplingParams(beam_width=4, n=2, max_tokens=12, temperature=0)
    (found,), (expected,) = (
        generated(model, tokenizer, [[7, 8, 9]], params) for model in (decoder_on("dense"), small_decoder("dense"))
    )
    assert [one.token_ids for one in (found, *found.others)] == [one.token_ids for one in (expected, *expected.others)]


@pytest.mark.parametrize("name", ["dense", "latent"])
def test_answers_with_adapters_are_those_of_merged_weights(name, tokenizer, decoder_on, tmp_path):
    model = decoder_on(name)
    adapter = random_adapter(model)
    write_adapter(adapter, model, tmp_path)
    engine = Engine(model, tokenizer)
    engine.load_adapter("one", tmp_path)
    found = engine.generate(PROMPTS[:3], PARAMS, adapter=["one", None, "one"])
    plain = generated(model, tokenizer, PROMPTS[:3])
    merged = generated(merge(copy.deepcopy(model), adapter), tokenizer, PROMPTS[:3])
    assert_same_but_for_ties(found, [merged[0], plain[1], merged[2]])


def test_weights_that_are_replaced_are_computed_with(tokenizer, device):
    engine = Engine(small_decoder("dense").to(device), tokenizer)
    engine.generate(PROMPTS, PARAMS)
    other = small_decoder("dense", seed=5)
    engine.update_weights(other.state_dict())  # from the processor, as a trainer may send them
    assert_same_but_for_ties(engine.generate(PROMPTS, PARAMS), alone(other, tokenizer))


def test_a_model_in_training_can_be_sampled_and_go_on(tokenizer, device):
    model = small_decoder("dense").to(device).train()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        completions = generated(model, tokenizer, PROMPTS)
    assert all(completion.completion_tokens == PARAMS.max_tokens for completion in completions)
    model(torch.tensor([[1, 2, 3]], device=device)).sum().backward()
    assert model.training and all(parameter.grad is not None for parameter in model.parameters())
