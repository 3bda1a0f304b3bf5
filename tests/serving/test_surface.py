"""Embeddings, tokens, metrics and what a load balancer asks, of the real engine."""

from __future__ import annotations

import base64

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import bessemer
from bessemer.inference.engine import Engine
from bessemer.model.storage.folder import save_model
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

TEXTS = ["the end", "in the thin", "9"]
ASKED = [{"role": "user", "content": "the end"}]


@pytest.fixture
def engine(tmp_path):
    tokenizer = write_small_tokenizer(tmp_path / "tokenizer")
    save_model(random_decoder(SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE)), tmp_path / "model", tokenizer=tokenizer)
    return Engine(tmp_path / "model", device="cpu")


@pytest.fixture
def url(engine, start):
    return start(engine)


def test_embeddings_are_the_engines_in_both_forms(engine, url):
    expected = engine.embed(TEXTS).numpy()
    with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0) as client:
        # OpenAI's client asks for base64 by itself
        found = client.embeddings.create(model="tiny", input=TEXTS)
        as_numbers = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
        of_tokens = client.embeddings.create(model="tiny", input=engine.tokenizer.encode(TEXTS[0]))
        with pytest.raises(openai.BadRequestError, match="'dimensions' must be") as caught:
            client.embeddings.create(model="tiny", input="a", dimensions=3)
    assert caught.value.param == "dimensions"
    for answer in (found, as_numbers):
        assert [one.index for one in answer.data] == [0, 1, 2]
        np.testing.assert_allclose(np.array([one.embedding for one in answer.data]), expected, atol=1e-5)
    np.testing.assert_allclose(of_tokens.data[0].embedding, expected[0], atol=1e-5)
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(len(engine.tokenizer.encode(text)) for text in TEXTS)
    body = {"model": "tiny", "input": TEXTS[0], "encoding_format": "base64"}
    raw = httpx.post(url + "/v1/embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(raw), "<f4"), expected[0], atol=1e-5)


def test_tokens_and_their_text(engine, url):
    found = httpx.post(url + "/tokenize", json={"prompt": "the end", "return_token_strs": True}).json()
    assert found["tokens"] == engine.tokenizer.encode("the end") and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == engine.context_length and len(found["token_strs"]) == found["count"]
    assert httpx.post(url + "/detokenize", json={"tokens": found["tokens"]}).json()["prompt"].endswith("the end")
    chat = httpx.post(url + "/tokenize", json={"messages": ASKED}).json()
    assert chat["tokens"] == engine.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)
    refused = httpx.post(url + "/tokenize", json={"prompt": "a", "messages": ASKED})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"


def metrics_of(url):
    answer = httpx.get(url + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, sample.labels.get("finished_reason") or sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_add_up_under_vllms_names(engine, url):
    with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0) as client:
        for _ in range(2):
            client.completions.create(model="tiny", prompt="the end", max_tokens=5, n=2, extra_body={"ignore_eos": True})
    found = metrics_of(url)
    prompt = len(engine.tokenizer.encode("the end"))
    assert found["vllm:prompt_tokens_total", None] == 2 * prompt and found["vllm:generation_tokens_total", None] == 2 * 2 * 5
    assert found["vllm:request_success_total", "length"] == 4 and found["vllm:request_success_total", "stop"] == 0
    assert found["vllm:num_requests_running", None] == found["vllm:num_requests_waiting", None] == 0
    assert found["vllm:kv_cache_usage_perc", None] == 0
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "request_decode_time_seconds"):
        assert found[f"vllm:{name}_count", None] == found[f"vllm:{name}_bucket", "+Inf"] == 4
    assert found["vllm:inter_token_latency_seconds_count", None] == 4 * 4
    assert found["vllm:request_generation_tokens_sum", None] == 4 * 5
    assert found["vllm:cache_config_info", None] == found["vllm:lora_requests_info", None] == 1
    text = httpx.get(url + "/metrics").text
    assert 'running_lora_adapters=""' in text and "max_lora=" in text


def test_what_a_load_balancer_asks(url):
    assert httpx.get(url + "/ready").json()["status"] == httpx.get(url + "/health").json()["status"] == "ok"
    assert httpx.get(url + "/version").json() == {"version": bessemer.__version__}


def test_a_key_guards_all_that_computes(engine, start):
    url = start(engine, api_key="secret")
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []}), ("/v1/embeddings", {})):
        assert httpx.post(url + path, json=body).status_code == 401
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert httpx.get(url + path).status_code == 200
