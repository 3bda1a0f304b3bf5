from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bessemer.agents.config import McpServerConfig
from bessemer.agents.mcp_client import McpServers
from bessemer.agents.mcp_config import ApprovedTools
from tests.assistant.conftest import tokenizer  # noqa: F401

SCRIPTED = str(Path(__file__).with_name("scripted_server.py"))


@pytest.fixture
def connect():
    """Starts the scripted server, `connect("changes", timeout=1.0)`: the servers, and the lines that were reported."""
    opened = []

    def start(*behaviour, approved=None, timeout=20.0, **options):
        pytest.importorskip("mcp")
        config = McpServerConfig(command=sys.executable, args=[SCRIPTED, *behaviour], timeout=timeout)
        lines = []
        servers = McpServers({"city": config}, approved or ApprovedTools(None), lines.append, **options)
        opened.append(servers)
        return servers, lines

    yield start
    for servers in opened:
        servers.close()
