"""Our client with servers that others wrote: npm's `server-everything` and PyPI's `mcp-server-time`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from bessemer.agents.config import McpServerConfig
from bessemer.agents.mcp_client import McpServers
from bessemer.agents.mcp_config import ApprovedTools
from bessemer.agents.tool_choice import choose_tools

pytestmark = pytest.mark.peer(name="mcp")


def opened(config):
    lines = []
    servers = McpServers({"peer": config}, ApprovedTools(None), lines.append)
    assert lines == []
    return servers


@pytest.fixture(scope="module")
def everything():
    """The program of npm's server."""
    # `make test-peer-mcp` installs it there
    where = os.pathsep.join([f"{sys.prefix}/npm/node_modules/.bin", os.environ["PATH"]])
    program = shutil.which("mcp-server-everything", path=where)
    if program is None:
        pytest.skip("npm")
    return program


def check(servers):
    """What both of its transports must give."""
    tools = {tool.name: tool for tool in servers.tools()}
    assert len(tools) >= 8
    assert tools["peer__echo"].call({"message": "furnace"}).text == "Echo: furnace"
    assert "42" in tools["peer__get-sum"].call({"a": 17, "b": 25}).text
    assert "[image, image/png" in tools["peer__get-tiny-image"].call({}).text
    assert tools["peer__get-sum"].call({"a": "x", "b": 1}).is_error
    (first, *_) = choose_tools(list(tools.values()), "What is the sum of 17 and 25?", 1, count=lambda tool: 1)
    assert first.name == "peer__get-sum"


def test_server_everything_over_standard_input_and_output(everything):
    with opened(McpServerConfig(command=everything, args=["stdio"])) as servers:
        check(servers)


def test_server_everything_over_http(everything):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [everything, "streamableHttp"],
        env=os.environ | {"PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        with opened(McpServerConfig(url=f"http://127.0.0.1:{port}/mcp")) as servers:
            check(servers)
    finally:
        process.terminate()
        process.wait()


def test_mcp_server_time():
    pytest.importorskip("mcp_server_time")
    paths = os.pathsep.join(path for path in sys.path if path)
    config = McpServerConfig(command=sys.executable, args=["-m", "mcp_server_time"], env={"PYTHONPATH": paths})
    with opened(config) as servers:
        tools = {tool.name: tool for tool in servers.tools()}
        arguments = {"source_timezone": "Europe/Oslo", "time": "12:00", "target_timezone": "Asia/Kolkata"}
        result = tools["peer__convert_time"].call(arguments)
        assert not result.is_error and "Asia/Kolkata" in result.text
        assert tools["peer__get_current_time"].call({"timezone": "Nowhere/None"}).is_error
