"""Clients that others use, unchanged: `llm`, litellm, LangChain's and LlamaIndex's OpenAI classes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.serving.running import babbling_engine, servers

pytestmark = pytest.mark.peer(name="clients")

#: A name that LlamaIndex insists on: it looks up a model's context by it.
KNOWN = "gpt-4o-mini"
SAID = [{"role": "user", "content": "the end of the line"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    made = babbling_engine(tmp_path_factory.mktemp("served"), 512)
    with servers() as start:
        yield start(made, aliases=[KNOWN])


def test_llm(url, tmp_path):
    (tmp_path / "extra-openai-models.yaml").write_text(f"- model_id: mine\n  model_name: tiny\n  api_base: {url}/v1\n")
    for options in ([], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", "-m", "mine", "-o", "max_tokens", "8", *options, "the end"]
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "any"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_litellm(url, monkeypatch):
    # it asks for a table of prices over the network otherwise
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    there = {"api_base": f"{url}/v1", "api_key": "any"}
    answer = litellm.completion(model="openai/tiny", messages=SAID, max_tokens=6, **there)
    assert answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens <= 6
    parts = list(litellm.completion(model="openai/tiny", messages=SAID, max_tokens=6, temperature=0, stream=True, **there))
    whole = litellm.completion(model="openai/tiny", messages=SAID, max_tokens=6, temperature=0, **there)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == (whole.choices[0].message.content or "")
    text = litellm.text_completion(model="text-completion-openai/tiny", prompt="the end", max_tokens=6, **there)
    assert text.choices[0].finish_reason in ("length", "stop")
    vectors = litellm.embedding(model="openai/tiny", input=["the end", "of"], **there)
    assert len(vectors.data) == 2


def test_langchain(url):
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    there = {"base_url": f"{url}/v1", "api_key": "any", "model": "tiny"}
    chat = ChatOpenAI(max_tokens=6, temperature=0, **there)
    whole = chat.invoke("the end")
    assert whole.usage_metadata["output_tokens"] <= 6
    assert "".join(part.content for part in chat.stream("the end")) == whole.content
    held = ChatOpenAI(max_tokens=60, temperature=0, **there).with_structured_output(
        {"title": "Answer", "type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
         "additionalProperties": False},
        method="json_schema",
    )  # fmt: skip
    assert isinstance(held.invoke("the end")["yes"], bool)
    assert isinstance(OpenAI(max_tokens=6, **there).invoke("the end"), str)
    assert len(OpenAIEmbeddings(check_embedding_ctx_length=False, **there).embed_documents(["the end", "of"])) == 2


def test_llama_index(url):
    from llama_index.core.llms import ChatMessage
    from llama_index.embeddings.openai import OpenAIEmbedding
    from llama_index.llms.openai import OpenAI

    there = {"api_base": f"{url}/v1", "api_key": "any"}
    model = OpenAI(model=KNOWN, max_tokens=6, temperature=0, **there)
    whole = model.chat([ChatMessage(role="user", content="the end")])
    *_, last = model.stream_chat([ChatMessage(role="user", content="the end")])
    assert (last.message.content or "") == (whole.message.content or "")
    assert isinstance(model.complete("the end").text, str)
    assert len(OpenAIEmbedding(model_name="tiny", **there).get_text_embedding("the end")) > 0
