"""Coding agents on the local server: Claude Code, Codex, opencode, with the environment that makes them use it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.http_client import ApiError, HttpClient, TransientError


@dataclass(frozen=True)
class CodingAgent:
    """A program and how it is installed."""

    program: str
    package: str


CODING_AGENTS = {
    "claude": CodingAgent("claude", "@anthropic-ai/claude-code"),
    "codex": CodingAgent("codex", "@openai/codex"),
    "opencode": CodingAgent("opencode", "opencode-ai"),
}


def launch_command(
    name: str, url: str, model: str, arguments: Sequence[str] = (), api_key: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command line of a coding agent, and the environment variables that it needs beside those that are there.

    url: of the server, without `/v1`. Raises ConfigError for a name that is none, and ArtefactError, with the command that
    installs it,
    for a program that is not here.
    """
    if name not in CODING_AGENTS:
        raise ConfigError(f"there is no coding agent {name!r}{nearest(name, list(CODING_AGENTS))}")
    agent = CODING_AGENTS[name]
    if (program := shutil.which(agent.program)) is None:
        raise ArtefactError(f"{agent.program} is not installed: npm install -g {agent.package}")
    # the programs insist on a key; a server without keys takes any
    key = api_key or "none"
    url = url.rstrip("/")
    if name == "claude":
        environment = {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_AUTH_TOKEN": key,
            "ANTHROPIC_MODEL": model,
            "ANTHROPIC_DEFAULT_OPUS_MODEL": model,
            "ANTHROPIC_DEFAULT_SONNET_MODEL": model,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
        return [program, *arguments], environment
    if name == "codex":
        provider = f"{{name = 'Bessemer', base_url = '{url}/v1', wire_api = 'responses', env_key = 'BESSEMER_CODEX_KEY'}}"
        settings = ("-c", "model_provider=bessemer", "-c", f"model_providers.bessemer={provider}")
        return [program, *settings, "--model", model, *arguments], {"BESSEMER_CODEX_KEY": key}
    of_opencode = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Bessemer",
        "options": {"baseURL": f"{url}/v1", "apiKey": key},
        "models": {model: {"name": model}},
    }
    config = {"provider": {"bessemer": of_opencode}, "model": f"bessemer/{model}", "small_model": f"bessemer/{model}"}
    return [program, *arguments], {"OPENCODE_CONFIG_CONTENT": json.dumps(config)}


def served_model(url: str, wanted: str | None, key_variable: str = "") -> str:
    """The name of a model that a server has: the wanted one, or the first.

    key_variable: environment variable with the server's key. Raises ArtefactError where there is no server, or it lacks the
    model, and ConfigError for a URL that is none.
    """
    client = HttpClient(url.rstrip("/"), key_variable=key_variable, timeout=10.0)
    try:
        listed = client.get("/v1/models")
    except TransientError as error:
        raise ArtefactError(f"no server answers at {url} ({error}): start one with bessemer serve MODEL") from None
    except ApiError as error:
        raise ArtefactError(str(error)) from None
    models = listed.get("data") if isinstance(listed, Mapping) else None
    names = [str(model["id"]) for model in models or () if isinstance(model, Mapping) and "id" in model]
    if not names:
        raise ArtefactError(f"{url}: this server lists no models; is it one of bessemer serve?")
    if wanted is not None and wanted not in names:
        raise ArtefactError(f"{url} has no model {wanted!r}{nearest(wanted, names)}")
    return wanted or names[0]


def start_agent(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command in this process's place, where the system can; elsewhere beside it, and return its exit code."""
    whole = {**os.environ, **environment}
    if os.name == "posix":
        os.execvpe(command[0], list(command), whole)
    import subprocess

    return subprocess.run(list(command), env=whole, check=False).returncode
