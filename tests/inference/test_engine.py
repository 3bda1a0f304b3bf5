from __future__ import annotations

import asyncio
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bessemer.core.errors import ConfigError, RequestError
from bessemer.core.store import write_json
from bessemer.inference import build
from bessemer.inference.engine import Engine, EngineConfig
from bessemer.inference.execution.steps import plain
from bessemer.inference.sampling.sampler import Sampled, SamplingParams
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.formats.gguf_export import export_gguf
from bessemer.model.storage.folder import save_model
from tests.cases import slow, slow_but
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=30)
PROMPTS = ["the", "in the end a thin thing", "", "Größe 日本語", "a" * 40]


@pytest.fixture(scope="module", params=slow_but(["grouped"], SHAPES))
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
        monkeypatch.setattr(plain, "sample_rows", lambda logits_RV, states: [Sampled(next(ids))])
        monkeypatch.setattr(plain, "_reserve_tokens", lambda scheduler, requests: False)

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


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=4, top_k=20, top_p=0.9, max_tokens=30)])
@pytest.mark.parametrize("max_num_seqs", [2, slow(32)])
def test_a_batch_gives_each_prompt_what_it_gets_alone(engine, params, max_num_seqs):
    together = Engine(engine.model, engine.tokenizer, config=EngineConfig(max_num_seqs=max_num_seqs)).generate(PROMPTS, params)
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


def test_a_text_alone_and_token_ids_alone_are_one_prompt(engine):
    expected = engine.generate(["the"], GREEDY)
    assert engine.generate("the", GREEDY) == expected
    assert engine.generate(engine.tokenizer.encode("the"), GREEDY) == expected
    assert asyncio.run(engine.agenerate("the", GREEDY)) == expected
    assert engine.rollouts("the", 1, GREEDY).texts == (expected[0].text,)
    assert torch.equal(engine.embed("the"), engine.embed(["the"]))


@pytest.mark.parametrize("prompt", [b"the", {"role": "user", "content": "the"}, [{"role": "user", "content": "the"}]])
def test_what_is_neither_text_nor_token_ids_is_refused(engine, prompt):
    for prompts in (prompt, [prompt]):
        with pytest.raises(RequestError, match="a text or token ids, got"):
            engine.generate(prompts, GREEDY)
    with pytest.raises(RequestError, match=r'a list of messages, as \[{"role": "user", "content": "Hello"}\], got str'):
        engine.chat("the", GREEDY)


def test_without_parameters_the_model_is_sampled_as_its_folder_says(engine, tmp_path):
    assert engine.default_params == SamplingParams()
    folder = write_model(tmp_path, "grouped")
    own = {"temperature": 0.6, "top_p": 0.9, "top_k": None, "repetition_penalty": 1.1, "max_length": 20, "bos_token_id": 1}
    write_json(folder / "generation_config.json", own)
    assert Engine(folder).default_params == SamplingParams(temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    write_json(folder / "generation_config.json", own | {"do_sample": False})
    greedy = Engine(folder)
    assert greedy.generate("the") == greedy.generate("the", SamplingParams(temperature=0, repetition_penalty=1.1))


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


def test_a_stop_string_may_be_kept(engine, scripted):
    scripted("one\n\nUser: two")
    (completion,) = engine.generate(["x"], SamplingParams(stop=["\n\nUser:", "###"], include_stop=True))
    assert (completion.text, completion.finish_reason) == ("one\n\nUser:", "stop")


@pytest.mark.parametrize(
    ("min_tokens", "stop", "shown"),
    [
        (0, "a", ""),
        # as many tokens are made, whatever they say, and the next one may end the text
        (10, "a", "abcabcabcabc"),
        (9, "a", "abcabcabc"),
        # begun among them, complete behind them
        (4, "abc", "abc"),
        (10, "cab", "abcabcab"),
    ],
)
def test_a_stop_string_ends_no_answer_in_its_first_min_tokens(engine, scripted, min_tokens, stop, shown):
    scripted("abcabcabcabcabc")
    params = SamplingParams(stop=[stop], min_tokens=min_tokens)
    (completion,) = engine.generate(["x"], params)
    assert (completion.text, completion.finish_reason) == (shown, "stop")
    scripted("abcabcabcabcabc")
    assert "".join(chunk.text for chunk in engine.stream("x", params)) == shown


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


def test_a_stream_that_waits_for_its_first_token_leaves_others_their_turns(engine):
    model = random_decoder(engine.model.config.with_changes(max_position_embeddings=400))
    shared = Engine(model, engine.tokenizer, config=EngineConfig(max_num_seqs=2, max_num_batched_tokens=2))
    patient = shared.stream("the", GREEDY.with_changes(ignore_eos=True))
    next(patient)
    reading, step = threading.Event(), shared.core.step

    def announced() -> None:
        reading.set()
        step()

    shared.core.step = announced
    reader = threading.Thread(target=lambda: next(shared.stream([1] * 300, GREEDY)))
    reader.start()
    assert reading.wait(timeout=20)
    for _ in range(5):
        next(patient)
    steps = shared.statistics.steps
    reader.join()
    # two tokens a step, so that the other prompt takes nearly 300
    assert steps < 150 < shared.statistics.steps


def test_a_closed_stream_frees_its_pages(engine):
    (pool, _) = engine.core.scheduler.groups[0]
    free = pool.free
    stream = engine.stream("the", GREEDY)
    next(stream)
    assert pool.free < free
    stream.close()
    assert pool.free == free and not engine.core.busy


def test_a_stream_that_nobody_reads_takes_no_pages(engine):
    stream = engine.stream("the", GREEDY)
    assert not engine.core.busy
    stream.close()


def test_an_answer_that_fails_leaves_the_others_alone(engine):
    def fails(prompt, answer, logits):
        raise ValueError("no such word")

    params = [GREEDY, GREEDY.with_changes(logits_processor=fails)]
    with pytest.raises(RequestError, match="no such word"):
        engine.generate(["the", "in"], params)
    assert not engine.core.busy
    stream = engine.stream("the", GREEDY)
    first = next(stream)
    with pytest.raises(RequestError, match="no such word"):
        engine.generate(["in"], params[1])
    expected = engine.generate(["the"], GREEDY)[0].text
    assert first.text + "".join(chunk.text for chunk in stream) == expected


def test_each_prompt_may_have_params_of_its_own(engine):
    params = [GREEDY, SamplingParams(seed=3, max_tokens=5), GREEDY.with_changes(max_tokens=2)]
    together = engine.generate(["the", "in", "a"], params)
    assert together == [engine.generate([prompt], one)[0] for prompt, one in zip(["the", "in", "a"], params, strict=True)]
    with pytest.raises(RequestError, match="3 prompts and 2 params"):
        engine.generate(["the", "in", "a"], params[:2])


def test_several_answers_to_a_prompt_are_those_of_their_own_seeds(engine):
    params = SamplingParams(seed=5, n=4, max_tokens=12)
    (completion,) = engine.generate(["in the end"], params)
    texts = [completion.text, *(other.text for other in completion.others)]
    assert len(set(texts)) == 4
    again = engine.generate(["in the end"], params.with_changes(n=2))[0]
    assert [again.text, again.others[0].text] == texts[:2]


def test_several_answers_read_their_prompt_once(engine):
    fresh = Engine(engine.model, engine.tokenizer, config=EngineConfig(prefix_cache=False))
    prompt = list(range(60))
    fresh.generate([prompt], SamplingParams(seed=5, n=4, max_tokens=1))
    assert fresh.statistics.computed_tokens == 60 + 3  # the others compute its last token again, for their own logits


def test_the_best_of_several_answers_is_the_likeliest(engine):
    params = SamplingParams(seed=5, n=6, max_tokens=12, logprobs=0, ignore_eos=True)
    first, *others = [(one := engine.generate(["in"], params)[0]), *one.others]
    means = {
        each.text: sum(sampled.log_probs.token for sampled in each.log_probs) / len(each.log_probs) for each in (first, *others)
    }
    best = engine.generate(["in"], params.with_changes(n=2, best_of=6, logprobs=None))[0]
    assert [best.text, best.others[0].text] == sorted(means, key=means.get, reverse=True)[:2]
    assert best.log_probs is None


def test_log_probabilities_are_the_models(engine):
    prompt = list(range(50))
    for config in (EngineConfig(), EngineConfig(max_num_batched_tokens=7, max_num_seqs=2)):
        fresh = Engine(engine.model, engine.tokenizer, config=config)
        fresh.generate([prompt], GREEDY)  # now its pages are cached, and have no logits
        (found,) = fresh.generate(
            [prompt], SamplingParams(seed=2, max_tokens=9, logprobs=3, prompt_logprobs=1, ignore_eos=True)
        )
        tokens = torch.tensor([prompt + found.token_ids])
        with torch.no_grad():
            expected = engine.model(tokens)[0].log_softmax(-1)
        own = expected[:-1].gather(-1, tokens[0, 1:, None])[:, 0]
        given = torch.tensor([one.log_probs.token for one in (*found.prompt_log_probs, *found.log_probs)])
        assert (given - own).abs().max() < 1e-5
        assert [one.token for one in found.prompt_log_probs] == prompt[1:]
        assert all(len(one.log_probs.top) == 3 for one in found.log_probs)
        assert all(
            one.log_probs.top[0][0] == best
            for one, best in zip(found.prompt_log_probs, expected[:49].argmax(-1).tolist(), strict=True)
        )


def test_several_answers_may_tell_the_log_probabilities_of_their_prompt(engine):
    prompt = list(range(20))
    params = SamplingParams(seed=2, n=3, max_tokens=4, prompt_logprobs=0)
    (several,) = engine.generate([prompt], params)
    (one,) = engine.generate([prompt], params.with_changes(n=1))
    assert several.prompt_log_probs == one.prompt_log_probs
    assert len(several.others) == 2


def test_answers_can_be_stepped_from_outside(engine):
    expected = engine.generate(["the", "in"], GREEDY)
    answers = [engine.prepare(prompt, GREEDY) for prompt in ("the", "in")]
    for answer in answers:
        engine.begin(answer)
    while not all(answer.done for answer in answers):
        engine.step()
    assert [engine.completion(answer, GREEDY) for answer in answers] == expected


def test_an_answer_that_is_stopped_frees_its_pages_and_those_of_its_siblings(engine):
    (pool, _) = engine.core.scheduler.groups[0]
    answer = engine.prepare("the", SamplingParams(n=3, seed=1, ignore_eos=True))
    engine.begin(answer)
    for _ in range(3):
        engine.step()
    assert pool.free < pool.total
    engine.stop(answer)
    assert pool.free == pool.total and not engine.core.busy


def test_a_token_that_the_tokenizer_does_not_have_fails_its_answer_alone(engine):
    model = random_decoder(engine.model.config.with_changes(vocab_size=VOCAB_SIZE + 8))
    wide = Engine(model, engine.tokenizer)
    fine, beyond = (
        wide.prepare([1], GREEDY.with_changes(allowed_tokens=[5])),
        wide.prepare([1], GREEDY.with_changes(allowed_tokens=[VOCAB_SIZE + 1])),
    )
    for answer in (fine, beyond):
        wide.begin(answer)
    while wide.core.busy:
        wide.step()
    assert fine.error is None and fine.finish_reason is not None
    assert "outside the vocabulary" in str(beyond.error)


def test_the_second_request_with_the_same_long_prefix_reads_a_block_at_most(engine):
    model = random_decoder(engine.model.config.with_changes(max_position_embeddings=1200))
    fresh = Engine(model, engine.tokenizer)
    prefix = [place * 7 % 250 for place in range(1000)]
    fresh.generate([[*prefix, 1, 2]], SamplingParams(max_tokens=1))
    before = fresh.statistics.computed_tokens
    (second,) = fresh.generate([[*prefix, 3, 4]], SamplingParams(max_tokens=1))
    assert fresh.statistics.computed_tokens - before <= fresh.config.block_size
    assert second.cached_tokens == 992


def test_weights_changed_in_place_are_seen(engine):
    model = random_decoder(engine.model.config)
    fresh, prompt = Engine(model, engine.tokenizer), list(range(60))
    before = fresh.generate([prompt], GREEDY)[0]
    with torch.no_grad():
        model.embed_tokens.weight.add_(torch.randn_like(model.embed_tokens.weight) * 0.1)
    after = fresh.generate([prompt], GREEDY)[0]
    assert after == Engine(model, engine.tokenizer).generate([prompt], GREEDY)[0]
    assert after.cached_tokens == 0 and after.token_ids != before.token_ids


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_weights_replaced_by_other_tensors_are_seen(engine, kernels):
    if kernels == "on" and library() is None:
        pytest.skip(unavailable())
    first, second = random_decoder(engine.model.config), random_decoder(engine.model.config, seed=1)
    fresh, prompt = Engine(first, engine.tokenizer, config=EngineConfig(cpu_kernels=kernels)), list(range(60))
    fresh.generate([prompt], GREEDY)
    first.load_state_dict(second.state_dict(), assign=True)
    after = fresh.generate([prompt], GREEDY)[0]
    assert after == Engine(second, engine.tokenizer, config=fresh.config).generate([prompt], GREEDY)[0]
    assert after.cached_tokens == 0


def test_requests_of_different_salts_share_no_pages(engine):
    fresh, prompt = Engine(engine.model, engine.tokenizer), list(range(60))
    salts = ("mine", "yours", None, "None", "mine")
    found = [fresh.generate([prompt], GREEDY, cache_salt=salt)[0] for salt in salts]
    assert [one.cached_tokens for one in found] == [0, 0, 0, 0, 48]
    assert all(one == found[0] for one in found)


def test_update_weights_reaches_answers_under_way(engine):
    first, second = random_decoder(engine.model.config), random_decoder(engine.model.config, seed=1)
    fresh = Engine(first, engine.tokenizer)
    params = GREEDY.with_changes(ignore_eos=True)
    stream = fresh.stream([5, 6, 7], params)
    begun = [token for _ in range(4) for token in next(stream).token_ids]
    fresh.update_weights(second.state_dict())
    rest = [token for chunk in stream for token in chunk.token_ids]
    expected = Engine(second, engine.tokenizer).generate([[5, 6, 7, *begun]], params.with_changes(max_tokens=26))[0]
    assert rest == expected.token_ids


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"no.such": torch.zeros(1)}, "no weight"), ({"norm.weight": torch.zeros(1)}, r"shape \(128,\), not")],
)
def test_weights_that_do_not_fit_are_refused_whole(engine, weights, message):
    before = engine.model.embed_tokens.weight.clone()
    with pytest.raises(RequestError, match=message):
        engine.update_weights({"embed_tokens.weight": torch.zeros_like(before), **weights})
    assert torch.equal(engine.model.embed_tokens.weight, before)


def test_more_than_may_wait_is_refused_and_nothing_is_lost(engine):
    fresh = Engine(engine.model, engine.tokenizer, config=EngineConfig(max_num_seqs=1, max_waiting=1))
    with pytest.raises(RequestError, match="requests wait already and max_waiting is 1; try again later"):
        fresh.generate(["the", "in", "a"], GREEDY)
    assert not fresh.core.busy
    assert len(fresh.generate(["the", "in"], GREEDY)) == 2


def test_no_text_is_longer_than_max_model_len(engine):
    short = Engine(engine.model, engine.tokenizer, config=EngineConfig(max_model_len=40))
    assert (short.context_length, short.longest) == (40, 40)
    params = GREEDY.with_changes(ignore_eos=True)
    (cut,), (whole,) = (each.generate([[1] * 30], params) for each in (short, engine))
    assert cut.token_ids == whole.token_ids[:10] and cut.finish_reason == "length"
    with pytest.raises(RequestError, match="the prompt has 40 tokens and max_model_len is 40"):
        short.generate([[1] * 40], GREEDY)
    with pytest.raises(ConfigError, match=r"max_model_len: 97 tokens are more than the model's context of 96"):
        Engine(engine.model, engine.tokenizer, config=EngineConfig(max_model_len=97))


def test_weights_larger_than_the_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", "grouped")
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(build, "load_model", None)
    monkeypatch.setattr(build, "most_memory_bytes", lambda: size - 1)
    with pytest.raises(ConfigError, match=r"model: the weights take .* MB, and this process can have .* MB of memory; "):
        Engine(folder, device="cpu")
    (tmp_path / "model.gguf").write_bytes(bytes(size))
    with pytest.raises(ConfigError, match=r"model\.gguf: the weights take"):
        Engine(tmp_path / "model.gguf", device="cpu")


@pytest.mark.parametrize(("scaling", "kernels"), [("yarn", "on"), slow("llama3", "off"), slow("dynamic", "off")])
def test_tables_of_positions_reach_as_far_as_texts_and_have_the_same_numbers(engine, scaling, kernels):
    if kernels == "on" and library() is None:
        pytest.skip(unavailable())
    scaled = {"rope_type": scaling, "factor": 4.0, "original_max_position_embeddings": 1024}
    config = engine.model.config.with_changes(max_position_embeddings=1_000_000, rope_scaling=scaled)
    prompt = [place * 7 % 250 for place in range(2060)]
    texts = []
    for max_model_len in (2100, None):
        model = random_decoder(config)
        chosen = EngineConfig(max_model_len=max_model_len, cpu_kernels=kernels, kv_memory=0.02, max_num_seqs=2)
        texts.append(Engine(model, engine.tokenizer, config=chosen).generate([prompt], GREEDY.with_changes(max_tokens=4))[0])
        # with no limit, as far as the pages reach or as texts were read
        assert len(model.rotary.cosines) < (20_000 if max_model_len is None else 5000)
    assert texts[0] == texts[1]


def test_an_answer_longer_than_all_pages_is_refused(engine):
    fresh = Engine(engine.model, engine.tokenizer, config=EngineConfig(kv_memory=1e-4))
    with pytest.raises(RequestError, match="the memory for keys and values holds"):
        fresh.generate([[1] * 60], GREEDY)


def test_memory_that_holds_no_pages_is_refused(engine):
    with pytest.raises(ConfigError, match=r"kv_memory: .* GiB hold fewer than two KV blocks of this model"):
        Engine(engine.model, engine.tokenizer, config=EngineConfig(kv_memory=1e-6))


def test_the_engine_says_how_many_pages_it_has(engine):
    pool, _ = engine.core.scheduler.groups[0]
    assert engine.describe().startswith(f"{pool.total:,} KV blocks of 16 tokens, ")


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


@pytest.mark.parametrize(
    ("is_fast", "free", "dtype"),
    [
        (True, 1 << 30, torch.bfloat16),
        (False, 1 << 30, torch.float32),
        (False, 1 << 10, torch.bfloat16),  # no memory for it
    ],
)
def test_a_stored_type_that_is_slow_here_is_widened_where_the_modules_compute(
    engine, tmp_path, monkeypatch, capsys, is_fast, free, dtype
):
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    save_model(random_decoder(engine.model.config).to(torch.bfloat16), tmp_path / "model", tokenizer=tokenizer)
    monkeypatch.setattr("bessemer.inference.build.is_fast", lambda dtype, device: is_fast)
    monkeypatch.setattr("bessemer.inference.build.free_memory_bytes", lambda: free)
    with Engine(tmp_path / "model", config=EngineConfig(cpu_kernels="off")) as opened:
        assert opened.model.dtype == dtype
        assert opened.generate(["the"], SamplingParams(seed=1, max_tokens=3, ignore_eos=True))[0].completion_tokens == 3
    assert ("no fast products in bfloat16" in capsys.readouterr().err) == (dtype == torch.float32)


def test_an_answer_fits_the_grammar_that_is_asked(engine):
    params = SamplingParams(seed=3, max_tokens=60, regex="(yes|no), because [a-z]{3,9}")
    (completion,) = engine.generate(["the"], params)
    assert re.fullmatch(params.regex, completion.text)
    assert completion.finish_reason == "stop"
    assert "".join(chunk.text for chunk in engine.stream("the", params)) == completion.text


def test_a_grammar_that_does_not_compile_is_refused_at_once(engine):
    with pytest.raises(RequestError, match="regex"):
        engine.generate(["fine"], SamplingParams(regex="(unclosed"))


@pytest.mark.parametrize("prompt", ["in the end", "a"])
def test_beams_are_those_of_transformers(folder, prompt):
    engine = Engine(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    expected = model.generate(
        **inputs,
        max_new_tokens=12,
        num_beams=4,
        num_return_sequences=2,
        do_sample=False,
        eos_token_id=list(engine.tokenizer.eos_ids),
        pad_token_id=0,
    )[:, inputs.input_ids.shape[1] :]
    (found,) = engine.generate([prompt], SamplingParams(beam_width=4, n=2, max_tokens=12, temperature=0))
    for completion, ids in zip((found, *found.others), expected.tolist(), strict=True):
        assert completion.token_ids == ids[: len(completion.token_ids)]
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_beams_do_not_stream(engine):
    with pytest.raises(RequestError, match="a stream is one answer as it is made: leave out n, best_of and beam_width"):
        engine.stream("the", SamplingParams(beam_width=2))


def test_a_gguf_file_opens_as_it_is(engine, tmp_path):
    folder = write_model(tmp_path, "grouped")
    export_gguf(folder, tmp_path / "model.gguf")
    assert Engine(tmp_path / "model.gguf").generate(PROMPTS, GREEDY) == Engine(folder).generate(PROMPTS, GREEDY)


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_tokens_are_drawn_on_one_thread_where_the_kernels_have_their_own(engine, monkeypatch, kernels):
    if kernels == "on" and library() is None:
        pytest.skip(unavailable())
    seen, choose = [], plain.sample_rows

    def watched(logits_RV, states):
        seen.append(torch.get_num_threads())
        return choose(logits_RV, states)

    monkeypatch.setattr(plain, "sample_rows", watched)
    fresh = Engine(engine.model, engine.tokenizer, config=EngineConfig(cpu_kernels=kernels))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fresh.generate(["the"], SamplingParams(seed=1, max_tokens=4))
        assert set(seen) == {1 if kernels == "on" else 2} and torch.get_num_threads() == 2
        seen.clear()
        # a greedy step has no PyTorch operation: setting threads would cost more than it saves
        fresh.generate(["the"], GREEDY)
        assert set(seen) == {2}
    finally:
        torch.set_num_threads(before)


def test_a_step_that_fails_leaves_nothing_behind(engine, monkeypatch):
    fresh = Engine(engine.model, engine.tokenizer)
    stream = fresh.stream("in the end", GREEDY)
    next(stream)
    with monkeypatch.context() as broken:
        broken.setattr(fresh.core.runner, "forward", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fresh.generate(["the"], GREEDY)
    with pytest.raises(RequestError, match="the step failed"):
        list(stream)
    ((pool, _),) = fresh.core.scheduler.groups
    assert not fresh.core.busy and pool.free == pool.total
    assert fresh.generate(["the"], GREEDY) == engine.generate(["the"], GREEDY)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_running", "max_num_seqs"),
        ("max_step_tokens", "max_num_batched_tokens"),
        ("kv_type", "kv_cache_dtype"),
        ("kernels", "cpu_kernels"),
        ("attention", "paged_attention"),
    ],
)
def test_a_retired_setting_is_refused_with_its_new_name(old, new):
    with pytest.raises(ConfigError, match=f"the setting '{old}' is now '{new}'"):
        EngineConfig.parse({old: 1}, "engine")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"activation_bits": 12}, "activation_bits: "),
        ({"activation_bits": 16, "cpu_kernels": "off"}, "not with cpu_kernels: off; leave it out"),
        ({"activation_bits": 16, "parallel": {"tensor": 2}}, "not with parallel; leave it out"),
    ],
)
def test_bits_of_activations_are_refused_where_nothing_rounds_them_so(settings, line):
    with pytest.raises(ConfigError, match=line):
        EngineConfig.parse(settings, "engine")


def test_answers_to_one_prompt_share_the_arrays_of_their_tokens(engine):
    params = SamplingParams(n=64, allowed_tokens=[9, 10, 9], logit_bias={9: 1.0}, max_tokens=2)
    request = engine.prepare([9, 10], params)
    rules = {id(each.sampling.rules) for each in (request, *request.siblings)}
    assert len(request.siblings) == 63 and len(rules) == 1
    assert request.sampling.rules.allowed.tolist() == [9, 10]
