"""Pictures through OpenAI's and Anthropic's clients, on a tiny model that reads them."""

import base64

import anthropic
import httpx
import openai
import pytest

from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
from tests.model.picture_files import drawn, encoded, png_header, write_picture_model
from tests.serving.engine import FakeEngine

PNG = encoded(drawn(40, 30, seed=1))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_picture_model(folder)
    return Engine(folder, device="cpu", config=EngineConfig(kv_memory=0.01))


def uri(data=PNG, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(url):
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def direct(engine, max_tokens=8):
    """The engine's own answer."""
    content = [{"type": "image", "image": PNG}, {"type": "text", "text": "what is this?"}]
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return engine.chat([{"role": "user", "content": content}], params)


def test_openais_client_sends_pictures_and_streams_the_answer(engine, connected):
    client = connected(openai.OpenAI, engine, "/v1")
    messages = [{"role": "user", "content": [part(uri()), {"type": "text", "text": "what is this?"}]}]
    sent = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    answer, wanted = client.chat.completions.create(**sent), direct(engine)
    assert answer.choices[0].message.content == wanted.text
    assert answer.usage.prompt_tokens == wanted.prompt_tokens > 60
    chunks = list(client.chat.completions.create(**sent, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted.text
    both = client.chat.completions.create(**sent | {"messages": [*messages, {"role": "assistant", "content": "a"}, *messages]})
    assert both.usage.prompt_tokens > 2 * wanted.prompt_tokens - 10


def test_anthropics_client_sends_pictures(engine, connected):
    client = connected(anthropic.Anthropic, engine)
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(PNG).decode()}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "what is this?"}]
    messages = [{"role": "user", "content": content}]
    answer = client.messages.create(model="tiny", messages=messages, max_tokens=8, extra_body={"temperature": 0})
    wanted = direct(engine)
    assert "".join(block.text for block in answer.content) == wanted.text
    assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == wanted.prompt_tokens
    assert client.messages.count_tokens(model="tiny", messages=messages).input_tokens == wanted.prompt_tokens
    with pytest.raises(anthropic.BadRequestError, match="this server fetches no url"):
        source = {"type": "url", "url": "https://example.org/a.png"}
        client.messages.create(
            model="tiny", messages=[{"role": "user", "content": [{"type": "image", "source": source}]}], max_tokens=1
        )


REFUSED = {
    "address": ("https://example.org/a.png", "this server fetches no addresses"),
    "file": ("file:///etc/passwd", "this server fetches no addresses"),
    "not base64": ("data:image/png;base64,%%%", "a picture's data is not base64"),
    "no picture": (uri(b"a letter"), "picture 1 is no picture that is read"),
    "bomb": (uri(png_header(50_000, 50_000)), "picture 1 has more than|picture 1 has 50,000"),
    "cut off": (uri(PNG[:300]), "picture 1 is damaged or cut off"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_bad_pictures_are_refused_in_one_line(case, engine, connected):
    url, message = REFUSED[case]
    client = connected(openai.OpenAI, engine, "/v1")
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part(url)]}], max_tokens=1)
    assert "\n" not in refused.value.body["message"]


def test_a_model_of_text_and_other_roles_take_no_pictures(engine, start):
    url = start(FakeEngine()) + "/v1/chat/completions"
    body = {"model": "tiny", "messages": [{"role": "user", "content": [part(uri())]}]}
    refused = httpx.post(url, json=body)
    assert refused.status_code == 400 and "this model reads no pictures" in refused.json()["error"]["message"]
    body = {"model": "tiny", "messages": [{"role": "assistant", "content": [part(uri())]}, {"role": "user", "content": "a"}]}
    assert "pictures are of a message of role 'user'" in httpx.post(url, json=body).json()["error"]["message"]


def test_more_pictures_than_are_read_or_the_context_holds_are_refused(engine, connected):
    client = connected(openai.OpenAI, engine, "/v1")
    with pytest.raises(openai.BadRequestError, match="the conversation has 17 pictures, at most 16 are read"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part(uri())] * 17}], max_tokens=1)
    large = uri(encoded(drawn(64, 64)))
    with pytest.raises(openai.BadRequestError, match="this model's context is 512 tokens, and the first 5 pictures take 540"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part(large)] * 8}], max_tokens=1)
