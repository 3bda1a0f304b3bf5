"""Several adapters on one base: each answer has its own, whatever else is in the batch."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from bessemer.model.adapters import Adapter
from bessemer.model.adapters.folder import write_adapter
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.model.quantisation.quantised_layers import QuantisedLinear
from tests.cases import slow_but
from tests.inference.models import ARCHITECTURES, BASE, small_decoder, small_tokenizer
from tests.model.random_adapters import merge, random_adapter
from tests.model.randomised import random_decoder

BLOCK = 8
PARAMS = SamplingParams(temperature=0, max_tokens=9, logprobs=1, ignore_eos=True)
PROMPTS = [[7], list(range(40, 73)), [9] * 20]
#: What each of them is asked with, all beside each other.
ADAPTERS = ["one", None, "two"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module", params=slow_but(["experts", "linear"], ARCHITECTURES))
def served(request, tokenizer, tmp_path_factory):
    """A model, and two adapters of it with their folders."""
    return with_adapters(small_decoder(request.param), tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def dense(tokenizer, tmp_path_factory):
    return with_adapters(small_decoder("dense"), tmp_path_factory.mktemp("dense"))


def with_adapters(model, place):
    adapters = {
        "one": random_adapter(model, 1),
        "two": random_adapter(model, 2, rank=5, endings=("q_proj", "o_proj", "up_proj")),
    }
    for name, adapter in adapters.items():
        write_adapter(adapter, model, place / name)
    return model, adapters, place


def engine_of(served, tokenizer, **settings):
    model, adapters, place = served
    engine = Engine(model, tokenizer, config=EngineConfig(**{"block_size": BLOCK, **settings}))
    for name in adapters:
        engine.load_adapter(name, place / name)
    return engine


def log_probs_of(completion):
    return torch.tensor([one.log_probs.token for one in completion.log_probs])


def merged_engine(served, name, tokenizer):
    model, adapters, _ = served
    model = merge(copy.deepcopy(model), adapters[name]) if name else model
    return Engine(model, tokenizer, config=EngineConfig(block_size=BLOCK))


def test_answers_side_by_side_are_those_of_merged_weights(served, tokenizer):
    completions = engine_of(served, tokenizer).generate(PROMPTS, PARAMS, adapter=ADAPTERS)
    for prompt, name, completion in zip(PROMPTS, ADAPTERS, completions, strict=True):
        (expected,) = merged_engine(served, name, tokenizer).generate([prompt], PARAMS)
        assert completion.token_ids == expected.token_ids
        assert (log_probs_of(completion) - log_probs_of(expected)).abs().max() < 1e-4


def test_magnitudes_are_those_of_merged_weights(served, tokenizer, tmp_path):
    model, adapters, _ = served
    with_norms = {"one": adapters["one"], "norms": random_adapter(model, 3, magnitudes=True)}
    engine = Engine(model, tokenizer, config=EngineConfig(block_size=BLOCK))
    for name, adapter in with_norms.items():
        write_adapter(adapter, model, tmp_path / name)
        engine.load_adapter(name, tmp_path / name)
    for prompts, names in ((PROMPTS, ["norms", "one", None]), (PROMPTS[1:], ["norms", "norms"])):
        for prompt, name, completion in zip(prompts, names, engine.generate(prompts, PARAMS, adapter=names), strict=True):
            (expected,) = merged_engine((model, with_norms, None), name, tokenizer).generate([prompt], PARAMS)
            assert completion.token_ids == expected.token_ids
            assert (log_probs_of(completion) - log_probs_of(expected)).abs().max() < 1e-4


@pytest.mark.parametrize("magnitudes", [False, True])
@pytest.mark.parametrize("served", ["dense", "latent"], indirect=True)
def test_adapters_are_computed_under_autocast_too(served, tokenizer, magnitudes):
    model, _, _ = served
    engine = Engine(model, tokenizer, config=EngineConfig(block_size=BLOCK, prefix_cache=False))
    engine.load_adapter("one", random_adapter(model, 1, magnitudes=magnitudes))
    items = [(prompt, [[5, 6, 7]]) for prompt in PROMPTS]
    # alone, and beside rows without an adapter
    for names in ("one", ["one", None, "one"]):
        expected = engine.score_items(items, adapter=names)
        with torch.autocast("cpu", torch.bfloat16):
            found = engine.score_items(items, adapter=names)
        for (one,), (other,) in zip(found, expected, strict=True):
            assert (torch.tensor(one.log_probs) - torch.tensor(other.log_probs)).abs().max() < 0.2


@pytest.mark.parametrize("served", slow_but(["experts", "linear"], ARCHITECTURES), indirect=True)
def test_an_invariant_engine_gives_the_same_bits_alone_and_in_company(served, tokenizer):
    together = engine_of(served, tokenizer, batch_invariant=True).generate(
        PROMPTS + PROMPTS, PARAMS, adapter=[*ADAPTERS, "two", "one", None]
    )
    for prompt, name, completion in zip(PROMPTS, ADAPTERS, together, strict=False):
        alone = engine_of(served, tokenizer, batch_invariant=True).generate([prompt], PARAMS, adapter=name)
        assert alone == [completion]
    assert len({tuple(log_probs_of(completion).tolist()) for completion in together}) == 6


def test_adapters_change_what_is_said(dense, tokenizer):
    engine = engine_of(dense, tokenizer)
    texts = [tuple(engine.generate([PROMPTS[1]], PARAMS, adapter=name)[0].token_ids) for name in ("one", "two", None)]
    assert len(set(texts)) == 3


EXACT_KERNELS = {"cpu_kernels": "on", "activation_bits": 16}


@pytest.mark.parametrize(("scheme", "settings"), [("int8", {}), ("int4", {}), ("int4", EXACT_KERNELS)])
def test_a_quantised_base_takes_adapters_of_the_base_that_it_was(scheme, settings, tokenizer, tmp_path):
    if settings and library() is None:
        pytest.skip(unavailable())
    # widths that groups of 32 divide
    model, adapters, place = with_adapters(random_decoder(BASE.with_changes(hidden_size=64, head_dim=16)), tmp_path)
    quantised = copy.deepcopy(model)
    quantise(quantised, QuantizeConfig(scheme=scheme, group_size=32))
    engine = engine_of((quantised, adapters, place), tokenizer, kv_cache_dtype="float32", **settings)
    completions = engine.generate(PROMPTS, PARAMS, adapter=ADAPTERS)
    plain = copy.deepcopy(model)  # with the numbers that the codes stand for
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data = quantised.get_submodule(name).weight
    for prompt, name, completion in zip(PROMPTS, ADAPTERS, completions, strict=True):
        (expected,) = merged_engine((plain, adapters, place), name, tokenizer).generate([prompt], PARAMS)
        assert completion.token_ids == expected.token_ids
        assert (log_probs_of(completion) - log_probs_of(expected)).abs().max() < 1e-3


def test_pages_are_not_shared_between_adapters(dense, tokenizer):
    engine = engine_of(dense, tokenizer)
    prompt = PROMPTS[1]
    for name in ("one", "two", None):
        assert [engine.generate([prompt], PARAMS, adapter=name)[0].cached_tokens for _ in range(2)] == [0, 32]


def test_a_reloaded_name_finds_no_pages_of_the_adapter_before(dense, tokenizer):
    engine, (_, _, place) = engine_of(dense, tokenizer), dense
    expected = engine.generate([PROMPTS[1]], PARAMS, adapter="two")
    engine.generate([PROMPTS[1]], PARAMS, adapter="one")
    engine.load_adapter("one", place / "two")
    (completion,) = engine.generate([PROMPTS[1]], PARAMS, adapter="one")
    assert (completion.cached_tokens, completion.token_ids) == (0, expected[0].token_ids)


def test_a_stream_goes_on_with_the_adapter_that_it_began_with(dense, tokenizer):
    engine, (_, _, place) = engine_of(dense, tokenizer), dense
    whole = engine.generate([PROMPTS[1]], PARAMS, adapter="one")[0]
    replaced, unloaded = (engine.stream(PROMPTS[1], PARAMS, adapter="one") for _ in range(2))
    begun = [next(replaced), next(unloaded)]
    engine.load_adapter("one", place / "two")
    engine.unload_adapter("one")
    for first, stream in zip(begun, (replaced, unloaded), strict=True):
        assert [id for chunk in (first, *stream) for id in chunk.token_ids] == whole.token_ids


def test_an_unloaded_adapter_is_free_when_its_last_answer_has_ended(dense, tokenizer):
    engine = engine_of(dense, tokenizer)
    kept = weakref.ref(engine._adapters.find("one").adapter)
    stream = engine.stream(PROMPTS[1], PARAMS, adapter="one")
    next(stream)
    engine.unload_adapter("one")
    gc.collect()
    assert kept() is not None
    list(stream)
    del stream
    gc.collect()
    assert kept() is None


def test_adapters_come_and_go_while_others_are_answered(dense, tokenizer):
    engine, (_, _, place) = engine_of(dense, tokenizer, max_num_seqs=4), dense
    expected = {name: engine.generate([PROMPTS[2]], PARAMS, adapter=name)[0] for name in ("one", None)}

    def come_and_go(number):
        for _ in range(5):
            engine.load_adapter(f"guest {number}", place / "two")
            engine.generate([PROMPTS[0]], PARAMS, adapter=f"guest {number}")
            engine.unload_adapter(f"guest {number}")

    def ask(name):
        return [engine.generate([PROMPTS[2]], PARAMS, adapter=name)[0].token_ids for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        guests = [pool.submit(come_and_go, number) for number in range(2)]
        answers = {name: pool.submit(ask, name) for name in expected}
        for guest in guests:
            guest.result()
        for name, answer in answers.items():
            assert answer.result() == [expected[name].token_ids] * 5
    assert engine.adapters == ("one", "two")


def test_answers_to_one_prompt_share_its_adapter(dense, tokenizer):
    engine = engine_of(dense, tokenizer)
    several = SamplingParams(temperature=0, max_tokens=6, n=2, ignore_eos=True)
    (completion,) = engine.generate([PROMPTS[1]], several, adapter="one")
    assert completion.others[0].token_ids == completion.token_ids
    assert completion.token_ids == engine.generate([PROMPTS[1]], PARAMS, adapter="one")[0].token_ids[:6]


def test_a_conversation_may_name_an_adapter(dense, tokenizer):
    engine = engine_of(dense, tokenizer)
    messages = [{"role": "user", "content": "the thing"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    expected = engine.generate([prompt], PARAMS, adapter="one")[0]
    assert engine.chat(messages, PARAMS, adapter="one").token_ids == expected.token_ids
    assert "".join(chunk.text for chunk in engine.stream_chat(messages, PARAMS, adapter="one")) == expected.text


def test_an_unknown_adapter_is_refused_and_the_known_are_named(dense, tokenizer):
    engine = engine_of(dense, tokenizer)
    for ask in (
        lambda: engine.generate(PROMPTS, PARAMS, adapter=["one", "three", None]),
        lambda: engine.stream(PROMPTS[0], PARAMS, adapter="three"),
        lambda: engine.unload_adapter("three"),
    ):
        with pytest.raises(RequestError, match=r"unknown adapter 'three'; loaded: one, two"):
            ask()
    with pytest.raises(RequestError, match="unknown adapter 'three'; none is loaded"):
        Engine(dense[0], tokenizer).generate(PROMPTS, PARAMS, adapter="three")


def test_as_many_adapters_as_prompts_are_asked(dense, tokenizer):
    with pytest.raises(RequestError, match="3 prompts and 2 adapters; give one for all, or one for each"):
        engine_of(dense, tokenizer).generate(PROMPTS, PARAMS, adapter=["one", "two"])


def test_a_folder_that_is_refused_changes_nothing(dense, tokenizer, tmp_path):
    engine = engine_of(dense, tokenizer)
    (before,) = engine.generate([PROMPTS[1]], PARAMS, adapter="one")
    with pytest.raises(ArtefactError, match="no such adapter folder"):
        engine.load_adapter("one", tmp_path / "nowhere")
    (after,) = engine.generate([PROMPTS[1]], PARAMS, adapter="one")
    assert (after.token_ids, after.cached_tokens) == (before.token_ids, 32)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A base in codes of 4 bits; of its adapters one changes nothing."""
    if library() is None:
        pytest.skip(unavailable())
    model = random_decoder(BASE.with_changes(hidden_size=64, head_dim=16, attention_bias=True))
    model, adapters, place = with_adapters(model, tmp_path_factory.mktemp("quantised"))
    adapters["nothing"] = Adapter({name: update._replace(scale=1e-20) for name, update in adapters["one"].updates.items()})
    write_adapter(adapters["nothing"], model, place / "nothing")
    quantise(model, QuantizeConfig(scheme="int4", group_size=32))
    return model, adapters, place


def test_adapters_meet_the_codes_that_the_kernels_packed(quantised, tokenizer):
    engine = engine_of(quantised, tokenizer, cpu_kernels="on")
    (base,) = engine.generate([PROMPTS[1]], PARAMS)
    (beside,) = engine.generate([PROMPTS[1]], PARAMS, adapter="nothing")
    assert beside.token_ids == base.token_ids
    # both with activations of 8 bits, without which they differ in the second digit
    assert (log_probs_of(beside) - log_probs_of(base)).abs().max() < 2e-3
    assert engine.generate([PROMPTS[1]], PARAMS, adapter="one")[0].token_ids != base.token_ids
    assert not any(module.packed_matmul for module in engine.model.modules() if isinstance(module, QuantisedLinear))


def test_adapters_on_packed_codes_give_the_same_bits_in_any_company(quantised, tokenizer):
    settings = {"cpu_kernels": "on", "batch_invariant": True}
    together = engine_of(quantised, tokenizer, **settings).generate(PROMPTS, PARAMS, adapter=ADAPTERS)
    for prompt, name, completion in zip(PROMPTS, ADAPTERS, together, strict=True):
        assert completion == engine_of(quantised, tokenizer, **settings).generate([prompt], PARAMS, adapter=name)[0]


def test_kernels_serve_the_base_beside_answers_with_adapters(dense, tokenizer):
    if library() is None:
        pytest.skip(unavailable())
    together = engine_of(dense, tokenizer, cpu_kernels="on").generate(PROMPTS, PARAMS, adapter=ADAPTERS)
    assert together[1] == engine_of(dense, tokenizer, cpu_kernels="on").generate([PROMPTS[1]], PARAMS)[0]
    for place in (0, 2):
        (expected,) = engine_of(dense, tokenizer).generate([PROMPTS[place]], PARAMS, adapter=ADAPTERS[place])
        assert together[place].token_ids == expected.token_ids
        assert (log_probs_of(together[place]) - log_probs_of(expected)).abs().max() < 1e-4


def test_kernels_and_adapters_give_the_same_bits_in_any_company(dense, tokenizer):
    if library() is None:
        pytest.skip(unavailable())
    settings = {"cpu_kernels": "on", "batch_invariant": True}
    together = engine_of(dense, tokenizer, **settings).generate(PROMPTS, PARAMS, adapter=ADAPTERS)
    for prompt, name, completion in zip(PROMPTS, ADAPTERS, together, strict=True):
        assert completion == engine_of(dense, tokenizer, **settings).generate([prompt], PARAMS, adapter=name)[0]


def test_guesses_change_nothing_of_what_adapters_say(dense, tokenizer):
    prompts = [[7, 8, 9] * 12, [3, 4] * 15, [11] * 30]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    guessing = engine_of(dense, tokenizer, speculation={"method": "ngram", "adapt": False})
    found = guessing.generate(prompts, params, adapter=ADAPTERS)
    assert guessing.statistics.draft_tokens_proposed > 0
    expected = engine_of(dense, tokenizer).generate(prompts, params, adapter=ADAPTERS)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_beams_are_of_the_adapter(dense, tokenizer):
    beams = SamplingParams(beam_width=2, n=2, max_tokens=5, ignore_eos=True)
    (found,) = engine_of(dense, tokenizer).generate([PROMPTS[1]], beams, adapter="one")
    (expected,) = merged_engine(dense, "one", tokenizer).generate([PROMPTS[1]], beams)
    assert [one.token_ids for one in (found, *found.others)] == [one.token_ids for one in (expected, *expected.others)]
