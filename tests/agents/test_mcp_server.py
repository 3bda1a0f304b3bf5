"""Our abilities as an MCP server, asked by the official SDK's client and by ours."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading

import httpx
import pytest
import uvicorn

from bessemer.agents.config import McpServerConfig
from bessemer.agents.mcp_client import McpServers
from bessemer.agents.mcp_config import ApprovedTools
from bessemer.agents.mcp_server import http_app, make_server
from bessemer.core.errors import ConfigError
from bessemer.pipeline.abilities import INSTRUCTIONS, Abilities
from tests.serving.running import quick_stops

pytest.importorskip("mcp")
from mcp import Client
from mcp.client.stdio import StdioServerParameters


@pytest.fixture(scope="module")
def abilities(tmp_path_factory):
    """A small model and an index of two documents."""
    from bessemer.model.storage.folder import save_model
    from tests.model.randomised import SHAPES, random_decoder
    from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

    path = tmp_path_factory.mktemp("abilities")
    shape = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE, max_position_embeddings=2048)
    save_model(random_decoder(shape), path / "model", tokenizer=write_small_tokenizer(path / "tokenizer"))
    index = path / "index"
    with Abilities({"tiny": path / "model"}, {"book": index}, "cpu") as abilities:
        _index(path / "docs", index)
        yield abilities


def _index(documents, index):
    from bessemer.data.sources.source import Tally
    from bessemer.retrieval.documents import documents_of, sources_of
    from bessemer.retrieval.index import CACHE, IndexConfig, build_index

    documents.mkdir()
    (documents / "furnace.md").write_text("# The furnace\n\nThe converter blows air through molten iron.\n", encoding="utf-8")
    (documents / "coal.md").write_text("# Coal\n\nCoke is made of coal.\n", encoding="utf-8")
    build_index(documents_of(sources_of(str(documents)), index / CACHE, Tally()), index, IndexConfig(embedder="none"))


@pytest.fixture(scope="module")
def url(abilities):
    """The abilities over HTTP."""
    app = http_app(make_server(abilities.tools(), instructions=INSTRUCTIONS), api_key="secret")
    with quick_stops():
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/mcp"
        server.should_exit = True
        thread.join()


def called(abilities, name, **arguments):
    """The JSON, or the text, of a call by the SDK's client, in one process."""

    async def call():
        async with Client(make_server(abilities.tools())) as client:
            return await client.call_tool(name, arguments)

    result = asyncio.run(call())
    assert not result.is_error, result.content[0].text
    text = result.content[0].text
    return text if name == "generate" else json.loads(text)


def test_an_index_is_searched_and_asked(abilities):
    (hit, *_) = called(abilities, "search_documents", query="What blows air through iron?", count=1)
    assert "converter" in hit["text"] and hit["document"].startswith("furnace.md")
    answer = called(abilities, "ask_documents", question="What blows air through iron?")
    assert answer["sources"][0]["text"] == hit["text"] and isinstance(answer["answer"], str)


def test_a_model_writes_is_inspected_and_evaluated(abilities):
    assert isinstance(called(abilities, "generate", prompt="The furnace", max_tokens=4), str)
    facts = called(abilities, "inspect_model", text="The furnace")
    assert facts["layers"] == len(facts["predictions_by_layer"]) - 1 and facts["parameters"] > 1000
    scores = called(abilities, "evaluate", task="arithmetic", limit=2)
    assert 0 <= next(iter(scores.values()))["accuracy"] <= 1


def test_a_run_is_planned(abilities):
    plan = called(abilities, "plan_run", recipe="125m", gpus=8)
    assert plan["parameters"] == 125_856_512 and plan["gpus"] == 8
    shallow = called(abilities, "plan_run", recipe="125m", overrides=["model.num_hidden_layers=2"])
    assert shallow["parameters"] < plan["parameters"]


@pytest.mark.slow  # the refinery's loops are loaded
def test_a_text_is_explained(abilities):
    assert called(abilities, "explain_document", text="Buy cheap watches!")["text"] == "Buy cheap watches!"


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("plan_run", {"recipe": "/etc/passwd"}, "there is no recipe '/etc/passwd'"),
        ("plan_run", {"recipe": "125m", "overrides": ["pretrain.objective=own.py:loss"]}, "is not model.NAME=VALUE"),
        ("evaluate", {"task": "../task.yaml"}, "there is no task"),
        ("generate", {"prompt": "x", "model": "/etc"}, "is not one of"),
        ("search_documents", {}, "'query' is a required property"),
        ("sudo", {}, "there is no tool 'sudo'"),
    ],
)
def test_what_a_client_must_not_name_is_one_line(abilities, name, arguments, said):
    async def call():
        async with Client(make_server(abilities.tools())) as client:
            return await client.call_tool(name, arguments)

    result = asyncio.run(call())
    assert result.is_error and said in result.content[0].text and "\n" not in result.content[0].text


def test_the_command_speaks_over_standard_output_alone():
    async def call(mode):
        paths = os.pathsep.join(path for path in sys.path if path)
        command = StdioServerParameters(command=sys.executable, args=["-m", "bessemer", "mcp"], env={"PYTHONPATH": paths})
        async with Client(command, mode=mode) as client:
            names = [tool.name for tool in (await client.list_tools()).tools]
            return names, client.protocol_version

    # without models and indexes there are no tools for them; clients of today and of before are answered
    assert asyncio.run(call("auto")) == (["plan_run", "explain_document"], "2026-07-28")


def test_over_http_our_client_calls_them_with_the_key_and_nobody_without(url):
    lines = []
    config = McpServerConfig(url=url, headers={"Authorization": "Bearer secret"})
    with McpServers({"b": config}, ApprovedTools(None), lines.append) as servers:
        tools = {tool.name: tool for tool in servers.tools()}
        assert servers.is_repeatable("b__plan_run") and not servers.is_repeatable("b__none")
        assert "converter" in tools["b__search_documents"].call({"query": "air through iron"}).text
    assert lines == []
    with McpServers({"b": McpServerConfig(url=url)}, ApprovedTools(None), lines.append) as servers:
        assert servers.tools() == []
    assert len(lines) == 1 and "cannot be reached" in lines[0]


def test_a_page_of_elsewhere_cannot_call_the_server(url):
    headers = {"Authorization": "Bearer secret", "Accept": "application/json, text/event-stream"}
    request = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    assert httpx.post(url, json=request, headers={**headers, "Host": "evil.example"}).status_code == 421
    assert httpx.post(url, json=request, headers={**headers, "Origin": "https://evil.example"}).status_code == 403


def test_other_machines_need_a_key():
    with pytest.raises(ConfigError, match="give --api-key too"):
        http_app(make_server([]), host="0.0.0.0")
