"""The server on the real engine, with a model that has learned nothing."""

from __future__ import annotations

import itertools
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from bessemer.inference.engine import Engine, EngineConfig
from bessemer.inference.sampling.sampler import SamplingParams
from bessemer.model.adapters.folder import write_adapter
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.storage.folder import save_model
from bessemer.tokenization.control_tokens import FILL_IN_THE_MIDDLE_SPELLINGS
from bessemer.tokenization.existing import add_tokens
from bessemer.tokenization.prompts import infill_prompt
from tests.model.random_adapters import random_adapter
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer
from tests.serving.running import babbling_engine

#: PyTorch's products round a row otherwise beside other rows; the kernels do not.
BY_KERNELS = pytest.mark.skipif(library() is None, reason=unavailable() or "")

MODEL = {"model": "tiny"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    path = tmp_path_factory.mktemp("model")
    tokenizer = write_small_tokenizer(path / "tokenizer")
    save_model(random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE)), path / "model", tokenizer=tokenizer)
    return Engine(path / "model", device="cpu")


@pytest.fixture
def client(engine, start):
    with openai.OpenAI(base_url=start(engine) + "/v1", api_key="any", max_retries=0) as client:
        yield client


def reference(engine, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities after each token, computed in one pass without pages."""
    with torch.no_grad():
        return engine.model(torch.tensor([tokens]))[0].log_softmax(-1)


def test_32_streams_at_once_give_what_the_engine_gives_alone(engine, start):
    conversations = [[{"role": "user", "content": f"{'the end ' * (number % 7)}{number}"}] for number in range(32)]
    url = start(engine) + "/v1"

    def stream(number: int) -> tuple[str, int, str]:
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            chunks = list(
                client.chat.completions.create(
                    **MODEL,
                    messages=conversations[number],
                    max_tokens=20,
                    temperature=0,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
            return text, chunks[-1].usage.completion_tokens, chunks[-2].choices[0].finish_reason

    with ThreadPoolExecutor(32) as clients:
        streamed = list(clients.map(stream, range(32)))
    for conversation, found in zip(conversations, streamed, strict=True):
        alone = engine.chat(conversation, SamplingParams(max_tokens=20, temperature=0))
        assert found == (alone.text, alone.completion_tokens, alone.finish_reason)


def test_a_conversation_that_outgrows_the_context_loses_its_middle_and_a_header_says_how_much(start, tmp_path):
    shifting = babbling_engine(tmp_path, context=64, context_overflow="shift", context_keep=8)
    asked = {**MODEL, "messages": [{"role": "user", "content": "the end " * 40}], "max_tokens": 90, "ignore_eos": True}
    url = start(shifting)
    answer = httpx.post(url + "/v1/chat/completions", json=asked, timeout=60)
    usage = answer.json()["usage"]
    # whole halves of the places behind the first eight
    dropped = int(answer.headers["x-dropped-tokens"])
    assert dropped % 28 == 0 and 8 + 28 <= usage["prompt_tokens"] - dropped < 64
    assert usage["completion_tokens"] == 90 and answer.json()["choices"][0]["finish_reason"] == "length"
    asked["messages"] = [{"role": "user", "content": "the"}]
    short = httpx.post(url + "/v1/chat/completions", json=asked, timeout=60)
    assert "x-dropped-tokens" not in short.headers and short.json()["usage"]["completion_tokens"] == 90


def test_a_suffix_asks_for_what_stands_before_it(start, tmp_path):
    write_small_tokenizer(tmp_path / "plain")
    added = add_tokens(tmp_path / "plain", tmp_path / "fim", special_tokens=list(FILL_IN_THE_MIDDLE_SPELLINGS[0])).added
    shape = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE + len(added))
    save_model(random_decoder(shape), tmp_path / "model", tokenizer=tmp_path / "fim")
    engine = Engine(tmp_path / "model", device="cpu")
    prompt = infill_prompt(engine.tokenizer, "the ", " thin")
    expected = engine.generate([prompt], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))[0].text
    with openai.OpenAI(base_url=start(engine) + "/v1", api_key="any", max_retries=0) as client:
        asked = {**MODEL, "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
        filled = client.completions.create(**asked, prompt=["the ", "in"], suffix=" thin")
        assert filled.choices[0].text == expected
        assert filled.usage.prompt_tokens == sum(len(infill_prompt(engine.tokenizer, one, " thin")) for one in ("the ", "in"))
        continued = client.completions.create(**asked, prompt="the ", suffix="")
        assert continued.usage.prompt_tokens == len(engine.tokenizer.encode("the "))


def test_a_suffix_is_refused_where_the_tokenizer_has_no_control_tokens_for_it(client):
    with pytest.raises(openai.BadRequestError, match="needs the control tokens") as caught:
        client.completions.create(**MODEL, prompt="the ", suffix=" thin")
    assert caught.value.param == "suffix"


def test_a_request_may_ask_for_an_adapter_by_its_name(engine, client, tmp_path):
    write_adapter(random_adapter(engine.model), engine.model, tmp_path)
    engine.load_adapter("bent", tmp_path)
    asked = {"prompt": "the thin", "max_tokens": 12, "temperature": 0}
    try:
        bent, plain = (client.completions.create(model=name, **asked) for name in ("bent", "tiny"))
        assert {model.id: model.parent for model in client.models.list().data} == {"tiny": None, "bent": "tiny"}
        streamed = list(client.completions.create(model="bent", stream=True, **asked))
    finally:
        engine.unload_adapter("bent")
    params = SamplingParams(max_tokens=12, temperature=0)
    assert (bent.model, plain.model) == ("bent", "tiny")
    assert plain.choices[0].text == engine.generate(["the thin"], params)[0].text != bent.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in streamed) == bent.choices[0].text
    assert {chunk.model for chunk in streamed} == {"bent"}
    with pytest.raises(openai.NotFoundError, match="the model 'bent' does not exist; this server has 'tiny'"):
        client.completions.create(model="bent", **asked)


def test_client_that_leaves_frees_its_pages(engine, start):
    model = random_decoder(engine.model.config.with_changes(max_position_embeddings=100_000))
    endless = Engine(model, engine.tokenizer, config=EngineConfig(kv_memory=0.1))
    (pool, _) = endless.core.scheduler.groups[0]
    address = httpx.URL(start(endless))
    content = json.dumps({**MODEL, "prompt": [1, 2, 3], "max_tokens": 50_000, "ignore_eos": True, "n": 2, "stream": True})
    with socket.create_connection((address.host, address.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall((head + content).encode())
        answer = b""
        while b'"index": 1' not in answer:
            answer += connection.recv(4096)
        assert pool.free < pool.total
    # a request that comes later ends later than what it waits for
    assert any(
        httpx.post(f"{address}/v1/completions", json={**MODEL, "prompt": [1], "max_tokens": 1}).is_success
        and not endless.core.busy
        for _ in range(1000)
    )
    assert pool.free == pool.total


def test_prompt_over_the_context_is_refused_before_the_stream_begins(engine, client):
    with pytest.raises(openai.BadRequestError, match=str(engine.context_length)):
        client.completions.create(**MODEL, prompt="x" * 4 * engine.context_length, stream=True)


def test_a_prompt_that_the_memory_does_not_hold_is_refused_and_an_answer_takes_what_there_is(engine, start):
    few = Engine(engine.model, engine.tokenizer, config=EngineConfig(block_size=8, kv_memory=8e-5))
    assert few.longest < few.context_length
    with openai.OpenAI(base_url=start(few) + "/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="memory for keys and values"):
            client.completions.create(**MODEL, prompt=[1] * few.longest, max_tokens=1)
        for limit in (None, few.longest):
            whole = client.chat.completions.create(
                **MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=limit, extra_body={"ignore_eos": True}
            )
            assert whole.usage.total_tokens == few.longest


def test_token_outside_the_vocabulary_is_refused_by_the_parameters_name(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**MODEL, prompt="a", logit_bias={"100000": 1})
    assert caught.value.param == "logit_bias"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**MODEL, prompt="a", extra_body={"allowed_token_ids": [100000]})
    assert caught.value.param == "allowed_token_ids"


def test_several_choices_are_the_engines_whole_and_streamed(engine, client):
    settings = {"max_tokens": 12, "seed": 5, "n": 3}
    alone = engine.generate(["in the end"], SamplingParams(**settings))[0]
    texts = [one.text for one in (alone, *alone.others)]
    whole = client.completions.create(**MODEL, prompt="in the end", **settings)
    assert [(choice.index, choice.text) for choice in whole.choices] == list(enumerate(texts))
    assert whole.usage.completion_tokens == sum(one.completion_tokens for one in (alone, *alone.others))
    streamed, reasons = ["", "", ""], [None] * 3
    for chunk in client.completions.create(**MODEL, prompt="in the end", stream=True, **settings):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert streamed == texts
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_the_best_of_several_is_the_likeliest(engine, client):
    params = SamplingParams(max_tokens=6, seed=5, best_of=5)
    best = client.completions.create(**MODEL, prompt="in", max_tokens=6, seed=5, best_of=5)
    assert [choice.text for choice in best.choices] == [engine.generate(["in"], params)[0].text]
    assert best.choices[0].logprobs is None


def test_chat_log_probabilities_are_the_models_whole_and_streamed(engine, client):
    asked = {**MODEL, "messages": [{"role": "user", "content": "the"}], "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    tokens = engine.tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens
    for one in content:
        expected = reference(engine, tokens)[-1].topk(2)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(expected.values.tolist(), abs=1e-4)
        assert one.logprob == one.top_logprobs[0].logprob
        tokens.append(expected.indices[0].item())
        assert bytes(one.bytes) == engine.tokenizer.token_bytes(tokens[-1])
    streamed = [
        one
        for chunk in client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert [one.token for one in streamed] == [one.token for one in content]


def test_lm_evals_request_finds_every_token_of_the_prompt_and_one_more(engine, client):
    """lm-eval's local-completions: greedy means that a token's log-probability equals the largest of its row, exactly."""
    prompt = engine.tokenizer.encode("the thin thing is 日本")
    answer = client.completions.create(**MODEL, prompt=[prompt], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1)
    found = answer.choices[0].logprobs
    assert (
        len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == len(prompt) + 1
    )
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    expected = reference(engine, prompt)
    own = expected[:-1].gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    assert found.token_logprobs[1:-1] == pytest.approx(own, abs=1e-4)
    largest = [max(top.values()) for top in found.top_logprobs[1:]]
    assert largest == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)
    assert found.token_logprobs[-1] == largest[-1]  # the one that was made is the likeliest
    assert answer.usage.completion_tokens == 1


@BY_KERNELS
@pytest.mark.parametrize("as_ids", [True, False])
def test_several_prompts_get_what_each_gets_alone_whole_and_streamed(engine, client, as_ids):
    texts = ["the thin", "in the end the thing", "in the end"]
    prompts = [engine.tokenizer.encode(text) for text in texts] if as_ids else texts
    asked = {**MODEL, "max_tokens": 6, "seed": 3, "n": 2, "echo": True, "logprobs": 2}
    alone = [client.completions.create(**asked, prompt=prompt) for prompt in prompts]
    whole = client.completions.create(**asked, prompt=prompts)
    expected = [
        choice.model_copy(update={"index": 2 * place + choice.index})
        for place, one in enumerate(alone)
        for choice in one.choices
    ]
    assert whole.choices == expected
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(whole.usage, count) == sum(getattr(one.usage, count) for one in alone)
    streamed, tokens = [""] * 6, [[] for _ in range(6)]
    chunks = list(client.completions.create(**asked, prompt=prompts, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        streamed[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert streamed == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.token_logprobs for choice in whole.choices]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@BY_KERNELS
def test_log_probabilities_of_an_echo_are_the_scores_of_the_same_tokens(engine, client):
    prompts = [engine.tokenizer.encode(text) for text in ("the thin thing", "in the end")]
    made = client.completions.create(**MODEL, prompt=prompts, echo=True, logprobs=1, max_tokens=0, n=2)
    for choice, prompt in zip(made.choices, [each for each in prompts for _ in range(2)], strict=True):
        (score,) = engine.score(prompt[:1], [prompt[1:]])
        assert choice.logprobs.token_logprobs == [None, *score.log_probs]
        likeliest = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
        assert [own == top for own, top in zip(score.log_probs, likeliest, strict=True)] == score.greedy
        # nothing is made behind the prompt
        assert (choice.text, choice.finish_reason) == (engine.tokenizer.decode(prompt), "length")
    assert (made.usage.completion_tokens, made.usage.prompt_tokens) == (0, sum(map(len, prompts)))
    streamed = list(client.completions.create(**MODEL, prompt=prompts[0], echo=True, logprobs=1, max_tokens=0, stream=True))
    assert [choice.logprobs for chunk in streamed for choice in chunk.choices if choice.logprobs] == [made.choices[0].logprobs]


def test_a_prompt_that_fills_the_context_can_be_read_and_not_gone_on_with(engine, client):
    prompt = [5] * engine.context_length
    read = client.completions.create(**MODEL, prompt=prompt, echo=True, logprobs=0, max_tokens=0)
    assert len(read.choices[0].logprobs.tokens) == engine.context_length
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(**MODEL, prompt=prompt, max_tokens=1)


def test_the_prompt_that_is_wrong_among_several_is_named(engine, client):
    for wrong in ([engine.tokenizer.vocab_size], [5] * engine.context_length):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**MODEL, prompt=[[5], wrong], max_tokens=1)
        assert caught.value.param == "prompt[1]"


def test_echo_shows_the_prompt_and_offsets_point_into_the_text(client):
    asked = {**MODEL, "prompt": "the thin", "echo": True, "max_tokens": 5, "seed": 3, "n": 2}
    whole = client.completions.create(**asked, logprobs=0)
    for choice in whole.choices:
        assert choice.text.startswith("the thin")
        found = choice.logprobs
        # of none of the likeliest, the token itself is told
        assert (
            found.top_logprobs[1:]
            == [{token: value} for token, value in zip(found.tokens, found.token_logprobs, strict=True)][1:]
        )
        spans = itertools.pairwise([*found.text_offset, len(choice.text)])
        for (start, end), token in zip(spans, found.tokens, strict=True):
            # a model that has learnt nothing begins characters that it does not end
            assert choice.text[start:end].lstrip("\ufffd") == token or token.startswith(("bytes:", "<|"))
    texts = ["", ""]
    tokens = [[], []]
    for chunk in client.completions.create(**asked, logprobs=0, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]


def test_usage_tells_what_was_found_in_pages(client):
    prompt = [number % 200 for number in range(60)]
    counts = [
        client.completions.create(**MODEL, prompt=prompt, max_tokens=1).usage.prompt_tokens_details.cached_tokens
        for _ in range(2)
    ]
    assert counts == [0, 48]


def test_text_looks_as_it_was_asked_to(client):
    schema = {
        "type": "object",
        "properties": {"heat": {"enum": ["low", "high"]}},
        "required": ["heat"],
        "additionalProperties": False,
    }
    asked = {**MODEL, "messages": [{"role": "user", "content": "how hot?"}], "max_tokens": 60, "seed": 2}
    named = {"type": "json_schema", "json_schema": {"name": "heat", "schema": schema}}
    for settings in ({"response_format": named}, {"extra_body": {"guided_json": schema}}):
        (choice,) = client.chat.completions.create(**asked, **settings).choices
        assert json.loads(choice.message.content)["heat"] in ("low", "high")
        assert choice.finish_reason == "stop"
    (choice,) = client.completions.create(
        **MODEL, prompt="a", max_tokens=60, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    ).choices
    assert choice.text in ("yes", "no")


@pytest.mark.parametrize("parameter", ["guided_regex", "guided_grammar"])
def test_grammar_that_does_not_compile_is_refused_by_the_parameters_name(client, parameter):
    with pytest.raises(openai.BadRequestError, match="does not compile") as caught:
        client.completions.create(**MODEL, prompt="a", extra_body={parameter: "((("})
    assert caught.value.param == parameter
