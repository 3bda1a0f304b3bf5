from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bessemer.core.errors import RequestError
from bessemer.core.store import write_json
from bessemer.inference import engine as engine_module
from bessemer.inference.engine import Engine
from bessemer.inference.sampling import SamplingParams
from bessemer.model.folder import save_model
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=30)
PROMPTS = ["the", "in the end a thin thing", "", "Größe 日本語", "a" * 40]


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine on one shape, for what does not depend on the shape."""
    return Engine(write_model(tmp_path_factory.mktemp("model"), "grouped"))


def write_model(path, shape):
    """A random model's folder; its answers end at the end tokens only by chance."""
    tokenizer = write_small_tokenizer(path / "tokenizer")
    save_model(random_decoder(SHAPES[shape].with_changes(vocab_size=VOCAB_SIZE)), path / "model", tokenizer=tokenizer)
    return path / "model"


@pytest.fixture
def scripted(engine, monkeypatch):
    """Makes the engine say a given text, byte by byte or in given tokens, and then the end token."""

    def say(script):
        tokens = list(script.encode()) if isinstance(script, str) else script
        ids = iter([*tokens, engine.tokenizer.eos_ids[0]])
        monkeypatch.setattr(engine_module, "sample", lambda logits_BV, params, generators: [next(ids)])

    return say


def uncached_greedy(engine, prompt, count):
    """Tokens of greedy decoding that computes everything anew for each."""
    tokens = engine.tokenizer.encode(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(engine.model(torch.tensor([tokens]))[0, -1].argmax().item())
        if tokens[-1] in engine.tokenizer.eos_ids:
            break
    return tokens[len(engine.tokenizer.encode(prompt)) :]


def test_cached_greedy_equals_uncached_in_a_batch(folder):
    engine = Engine(folder)
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
        assert completion.token_ids == uncached_greedy(engine, prompt, 30)


def test_greedy_text_is_that_of_transformers(folder):
    engine = Engine(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(
            **inputs, max_new_tokens=30, do_sample=False, eos_token_id=list(engine.tokenizer.eos_ids), pad_token_id=0
        )[0, inputs.input_ids.shape[1] :]
        (completion,) = engine.generate([prompt], GREEDY)
        assert completion.token_ids == ids.tolist()
        assert completion.text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=4, max_tokens=30), SamplingParams(seed=4, top_k=20, top_p=0.9)])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_batch_gives_each_prompt_what_it_gets_alone(engine, params, batch_size):
    together = Engine(engine.model, engine.tokenizer, batch_size=batch_size).generate(PROMPTS, params)
    assert together == [engine.generate([prompt], params)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=1, max_tokens=40), SamplingParams(seed=2, stop=["a", "\n"])])
def test_a_stream_joined_is_the_completion(engine, params):
    for prompt in PROMPTS:
        (completion,) = engine.generate([prompt], params)
        chunks = list(engine.stream(prompt, params))
        assert "".join(chunk.text for chunk in chunks) == completion.text
        assert [id for chunk in chunks for id in chunk.token_ids] == completion.token_ids
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [completion.finish_reason]


def test_a_seed_repeats_and_another_does_not(engine):
    first, again, other = (engine.generate(["the"], SamplingParams(seed=seed, max_tokens=20))[0].text for seed in (1, 1, 2))
    assert first == again != other


def test_the_context_cuts_max_tokens(engine):
    prompt = [1] * 90
    (completion,) = engine.generate([prompt], SamplingParams(max_tokens=500, temperature=0, ignore_eos=True))
    assert (completion.completion_tokens, completion.finish_reason, completion.prompt_tokens) == (6, "length", 90)


def test_the_last_place_of_the_context_is_used(engine):
    (completion,) = engine.generate([[1] * 95], SamplingParams(max_tokens=5, ignore_eos=True))
    assert completion.completion_tokens == 1


@pytest.mark.parametrize("length", [96, 200])
def test_a_prompt_longer_than_the_context_is_refused(engine, length):
    message = f"the prompt has {length} tokens and the model's context is 96, answer included; shorten the prompt"
    with pytest.raises(RequestError, match=message):
        engine.generate(["fine", [1] * length], GREEDY)
    with pytest.raises(RequestError, match=message):
        engine.stream([1] * length, GREEDY)  # at once, before the first chunk is asked for


@pytest.mark.parametrize("prompt", [[], [VOCAB_SIZE], [-1]])
def test_a_prompt_that_is_no_prompt_is_refused(engine, prompt):
    with pytest.raises(RequestError, match=r"no tokens|outside the vocabulary of 263"):
        engine.generate([prompt], GREEDY)


def test_no_prompts_give_no_completions(engine):
    assert engine.generate([], GREEDY) == []


def test_an_end_token_ends_the_answer_and_is_not_shown(engine, scripted):
    scripted("done")
    chunks = list(engine.stream("x", SamplingParams()))
    assert "".join(chunk.text for chunk in chunks) == "done"
    assert (chunks[-1].token_ids, chunks[-1].finish_reason) == ([engine.tokenizer.eos_ids[0]], "stop")


def test_end_tokens_come_from_the_generation_settings(engine, tmp_path):
    folder = write_model(tmp_path, "grouped")
    free = engine.generate(["the"], GREEDY)[0].token_ids
    write_json(folder / "generation_config.json", {"eos_token_id": [free[4]]})
    (completion,) = Engine(folder).generate(["the"], GREEDY)
    assert completion.token_ids == free[: free.index(free[4]) + 1]
    assert completion.text == engine.tokenizer.decode(completion.token_ids[:-1])  # not shown, control token or not
    assert completion.finish_reason == "stop"


def test_ignore_eos_goes_on(engine, scripted):
    end = engine.tokenizer.eos_ids[0]
    scripted([end, 65, end, 66])
    (completion,) = engine.generate(["x"], SamplingParams(ignore_eos=True, max_tokens=4))
    assert (completion.text, completion.finish_reason) == ("AB", "length")


@pytest.mark.parametrize("text", ["naïve 日本語 👩‍👩‍👧 ok", "\N{GRINNING FACE}"])
def test_a_character_is_never_split(engine, scripted, text):
    scripted(text)
    chunks = [chunk.text for chunk in engine.stream("x", SamplingParams())]
    assert "".join(chunks) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in chunk for chunk in chunks)


def test_half_a_character_at_the_end_is_shown_as_such(engine, scripted):
    scripted([65, *"日".encode()[:2]])
    assert "".join(chunk.text for chunk in engine.stream("x", SamplingParams())) == "A\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_over_several_tokens_ends_the_answer_before_it(engine, scripted):
    scripted("one\n\nUser: two")
    chunks = list(engine.stream("x", SamplingParams(stop=["\n\nUser:", "###"])))
    assert "".join(chunk.text for chunk in chunks) == "one"
    assert chunks[-1].finish_reason == "stop"
    assert bytes(id for chunk in chunks for id in chunk.token_ids) == b"one\n\nUser:"


def test_what_only_began_like_a_stop_string_is_shown_at_the_end(engine, scripted):
    scripted("one\n\nUs")
    assert "".join(chunk.text for chunk in engine.stream("x", SamplingParams(stop=["\n\nUser:"]))) == "one\n\nUs"


def test_a_chat_is_the_completion_of_its_template(engine):
    messages = [{"role": "user", "content": "the"}]
    prompt = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    completion = engine.chat(messages, GREEDY)
    assert completion == engine.generate([prompt], GREEDY)[0]
    assert "".join(chunk.text for chunk in engine.stream_chat(messages, GREEDY)) == completion.text


def test_streams_that_take_turns_do_not_disturb_each_other(engine):
    expected = [engine.generate([prompt], GREEDY)[0].text for prompt in PROMPTS[:3]]
    streams = [engine.stream(prompt, GREEDY) for prompt in PROMPTS[:3]]
    texts = [""] * 3
    while any(chunks := [next(stream, None) for stream in streams]):
        texts = [text + (chunk.text if chunk else "") for text, chunk in zip(texts, chunks, strict=True)]
    assert texts == expected


def test_threads_do_not_disturb_each_other(engine):
    expected = engine.generate(PROMPTS, GREEDY)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: engine.generate([prompt], GREEDY)[0], PROMPTS)) == expected


def test_a_closed_stream_frees_its_cache(engine, monkeypatch):
    caches = []
    new_cache = engine._new_cache

    def remembered(requests):
        cache = new_cache(requests)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(engine, "_new_cache", remembered)
    stream = engine.stream("the", GREEDY)
    next(stream)
    assert caches[0]() is not None
    stream.close()
    assert caches[0]() is None


def test_a_stream_leaves_gradients_on_for_its_reader(engine):
    stream = engine.stream("the", GREEDY)
    next(stream)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_model_in_training_can_be_sampled_and_go_on(engine):
    decoder = random_decoder(engine.model.config).train()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        completions = Engine(decoder, engine.tokenizer).generate(
            ["the", "a much longer prompt"], SamplingParams(max_tokens=9, ignore_eos=True)
        )
    assert [completion.completion_tokens for completion in completions] == [9, 9]
    decoder(torch.tensor([[1, 2, 3]])).sum().backward()
    assert decoder.training and all(parameter.grad is not None for parameter in decoder.parameters())


def test_bfloat16_models_generate(engine):
    decoder = random_decoder(engine.model.config).to(torch.bfloat16)
    (completion,) = Engine(decoder, engine.tokenizer).generate(["the"], SamplingParams(seed=1, max_tokens=9, ignore_eos=True))
    assert completion.completion_tokens == 9
