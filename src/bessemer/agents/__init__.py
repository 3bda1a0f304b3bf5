"""Agents: assistants that act, within budgets, with approvals, and with a journal from which a killed task goes on.

`loop.py` is the agent, `journal.py` what it has done, `approvals.py` who lets it. Its tools: `toolbox.py` (Python, files,
documents, the web), `skills.py`, and those of MCP servers (`mcp_client.py`), of which `tool_choice.py` offers what a question
needs. `mcp_server.py` serves tools of ours to other agents.
"""
